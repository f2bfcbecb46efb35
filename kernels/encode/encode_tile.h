// What the encoder's kernels share, whatever the format: the transform of a group by one wave, and products of a 256 × 256
// matrix with a tile of 32 rows. Every sum is taken in the order of the CPU's encoder, so that the bits are the same.
#pragma once
#include "device.h"
#include "encode_constants.h"    // made by geometry.py
#include "hadamard.h"

// Floats from one column of a tile to the next: odd, so that both rows and columns spread over the banks.
constexpr int PITCH = TILE + 1;
constexpr int SQUARE = GROUP * GROUP;

DEVICE Quad load_quad(const float* p) { return *reinterpret_cast<const Quad*>(p); }

// Registers from or to a run of 256: register j of a lane is element 8·lane + j.
DEVICE void load_group(float (&v)[PER_LANE], const float* group) { load_eight(group, lane(), v); }

DEVICE void store_group(float* group, const float (&v)[PER_LANE]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    Quad out;
#pragma unroll
    for (int j = 0; j < 4; j++) out.v[j] = v[4 * half + j];
    *reinterpret_cast<Quad*>(group + PER_LANE * lane() + 4 * half) = out;
  }
}

struct alignas(8) Codes {            // eight codes, a byte each
  uint32_t low, high;
};

DEVICE Codes load_codes(const uint8_t* p) { return *reinterpret_cast<const Codes*>(p); }
DEVICE int code_of(const Codes& c, int j) { return (j < 4 ? c.low >> (8 * j) : c.high >> (8 * (j - 4))) & 0xff; }
DEVICE void store_codes(uint8_t* p, const int (&code)[PER_LANE]) {
  Codes c;
  c.low = code[0] | code[1] << 8 | code[2] << 16 | (uint32_t)code[3] << 24;
  c.high = code[4] | code[5] << 8 | code[6] << 16 | (uint32_t)code[7] << 24;
  *reinterpret_cast<Codes*>(p) = c;
}

// Sums over 256 columns in parts: of columns that lie sixteen apart, one after the other, and then of the parts, as a tree. Each
// half of a wave has a sum of its own: `join_parts` that of its parts, dot_in_parts Σ left[i] · right[i]. See lloyd/dense/sums.py.
constexpr int PARTS = 16;
DEVICE float join_parts(float part) {
#pragma unroll
  for (int mask = PARTS / 2; mask > 0; mask /= 2) part = part + __shfl_xor(part, mask);
  return part;
}
DEVICE float dot_in_parts(const float* left, const float* right) {
  float part = 0.0f;
#pragma unroll
  for (int i = 0; i < GROUP; i += PARTS) part = fmaf(left[i + lane() % PARTS], right[i + lane() % PARTS], part);
  return join_parts(part);
}

// Columns first … first + 7 of rows `from` … 255 of a matrix whose rows are `pitch` floats apart; panel[2i] and panel[2i + 1]
// are row i.
DEVICE void stage_panel(Quad* panel, const float* matrix, int64_t pitch, int first, int from) {
  for (int q = 2 * from + lane(); q < 2 * GROUP; q += WAVE) {
    panel[q] = load_quad(matrix + (q >> 1) * pitch + first + 4 * (q & 1));
  }
}

// A tile of PRODUCT_ROWS × PRODUCT_COLUMNS of rows minus products, by a block of PRODUCT_THREADS. A thread has eight rows and
// eight columns, four and four that lie 32 apart. What it adds to an element, it adds in the order of the CPU.
constexpr int SIDE = 8, HALF_TILE = PRODUCT_ROWS / 2;
static_assert(PRODUCT_ROWS == PRODUCT_COLUMNS && PRODUCT_THREADS == PRODUCT_ROWS && PRODUCT_DEPTH == 16, "shape of a tile");

DEVICE int tile_place(int part, int n) { return n < 4 ? 4 * part + n : HALF_TILE + 4 * part + n - 4; }
DEVICE int tile_row(int i) { return tile_place(threadIdx.x / SIDE, i); }
DEVICE int tile_column(int j) { return tile_place(threadIdx.x % SIDE, j); }

struct ProductTiles {                // what a block works on: a run of PRODUCT_DEPTH of the sums
  Quad errors[PRODUCT_DEPTH * PRODUCT_ROWS / 4], factors[PRODUCT_DEPTH * PRODUCT_COLUMNS / 4];
};

// sums[i][j] -= Σ_b factors[b][tile_column(j)] · errors[tile_row(i)][b], b from 0 to depth - 1, depth a multiple of
// PRODUCT_DEPTH. `error` is `depth` floats of the tile's row threadIdx.x; `factors` begins at the tile's first column, its rows
// are `pitch` floats apart.
DEVICE void subtract_products(float (&sums)[SIDE][SIDE], ProductTiles& tiles, const float* error, const float* factors,
                              int64_t pitch, int depth = GROUP) {
  constexpr int QUADS = PRODUCT_DEPTH / 4;
  const int t = threadIdx.x;
  const float* mine = factors + t / 4 * pitch + t % 4 * PRODUCT_DEPTH;
  Quad error_next[QUADS], factor_next[QUADS];
#pragma unroll
  for (int q = 0; q < QUADS; q++) {
    error_next[q] = load_quad(error + 4 * q);
    factor_next[q] = load_quad(mine + 4 * q);
  }
  for (int at = 0; at < depth; at += PRODUCT_DEPTH) {
    __syncthreads();
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
#pragma unroll
      for (int n = 0; n < 4; n++) {
        reinterpret_cast<float*>(tiles.errors)[(4 * q + n) * PRODUCT_ROWS + t] = error_next[q].v[n];
      }
      tiles.factors[t * QUADS + q] = factor_next[q];
    }
    __syncthreads();
    if (at + PRODUCT_DEPTH < depth) {
#pragma unroll
      for (int q = 0; q < QUADS; q++) {
        error_next[q] = load_quad(error + at + PRODUCT_DEPTH + 4 * q);
        factor_next[q] = load_quad(mine + (at + PRODUCT_DEPTH) * pitch + 4 * q);
      }
    }
#pragma unroll 4
    for (int b = 0; b < PRODUCT_DEPTH; b++) {
      Quad e[2], f[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int quads = (b * PRODUCT_ROWS + half * HALF_TILE) / 4;
        e[half] = tiles.errors[quads + t / SIDE];
        f[half] = tiles.factors[quads + t % SIDE];
      }
#pragma unroll
      for (int i = 0; i < SIDE; i++) {
#pragma unroll
        for (int j = 0; j < SIDE; j++) sums[i][j] = fmaf(-f[j / 4].v[j % 4], e[i / 4].v[i % 4], sums[i][j]);
      }
    }
  }
}
