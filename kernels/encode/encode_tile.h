// What the encoder's kernels share, whatever the format: the transform of a group by one wave, and products of a 256 × 256
// matrix with a tile of 32 rows. Every sum is taken in the order of the CPU's encoder, so that the bits are the same.
#pragma once
#include "device.h"
#include "encode_constants.h"    // made by geometry.py

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

// The unnormalised Walsh-Hadamard transform, butterflies of stride 1, 2, … 128.
template <class T>
DEVICE void hadamard(T (&v)[PER_LANE]) {
#pragma unroll
  for (int stride = 1; stride < PER_LANE; stride *= 2) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      if ((j & stride) == 0) {
        const T a = v[j], b = v[j + stride];
        v[j] = a + b;
        v[j + stride] = a - b;
      }
    }
  }
#pragma unroll
  for (int mask = 1; mask < WAVE; mask *= 2) {
    const bool upper = (lane() & mask) != 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      const T other = __shfl_xor(v[j], mask);
      v[j] = upper ? other - v[j] : v[j] + other;
    }
  }
}

// Columns first … first + 7 of rows `from` … 255 of a matrix whose rows are `pitch` floats apart; panel[2i] and panel[2i + 1]
// are row i.
DEVICE void stage_panel(Quad* panel, const float* matrix, int64_t pitch, int first, int from) {
  for (int q = 2 * from + lane(); q < 2 * GROUP; q += WAVE) {
    panel[q] = load_quad(matrix + (q >> 1) * pitch + first + 4 * (q & 1));
  }
}

// sums[n] -= Σ_b panel[b][n] · tile[b][lane], b ascending.
DEVICE void subtract_product(float (&sums)[PANEL], const Quad* panel, const float* tile) {
  const float* mine = tile + lane();
#pragma unroll 8
  for (int b = 0; b < GROUP; b++) {
    const float e = mine[b * PITCH];
    const Quad low = panel[2 * b], high = panel[2 * b + 1];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      sums[n] = fmaf(-low.v[n], e, sums[n]);
      sums[4 + n] = fmaf(-high.v[n], e, sums[4 + n]);
    }
  }
}
