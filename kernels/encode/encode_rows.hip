// The encoder's kernels that no block format matters to: weights into the rotated basis, products with a dense Hessian, and the
// Hessians of diagonal importances. They have the bits of formats/fwht.py and lloyd/.
#include "encode_tile.h"

// out = rotate(weights · scale) of f32 [rows, 256·groups]; scale f32 [256·groups], signs as formats/fwht.py has them. A wave
// per group, grid (groups, rows).
KERNEL(WAVE) rotate_rows(float* __restrict__ out, const float* __restrict__ weights, const float* __restrict__ scale,
                         const float* __restrict__ signs) {
  const int64_t at = ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * GROUP;
  float v[PER_LANE], factor[PER_LANE];
  load_group(v, weights + at);
  load_group(factor, scale + blockIdx.x * GROUP);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] = v[j] * factor[j];
  load_group(factor, signs);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] = v[j] * factor[j];
  hadamard(v);
  load_group(factor, signs + GROUP);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] = v[j] * (factor[j] * ROTATION_SCALE);
  store_group(out + at, v);
}

// out = matrix · y for y f32 [count, 256·groups], with `matrix` f32 [groups, 256, 256] transposed. The CPU takes the opposite of
// -matrix · y. Grid (tiles of rows, of columns, groups from `first` on).
KERNEL(PRODUCT_THREADS) multiply_rows(float* __restrict__ out, const float* __restrict__ y, const float* __restrict__ matrix,
                                      int count, int groups, int first) {
  LDS(ProductTiles, tiles, 1);
  const int group = first + blockIdx.z, row = blockIdx.x * PRODUCT_ROWS, column = blockIdx.y * PRODUCT_COLUMNS;
  const int64_t width = (int64_t)groups * GROUP;
  float sums[SIDE][SIDE] = {};
  subtract_products(sums, tiles[0], y + min(row + (int)threadIdx.x, count - 1) * width + group * GROUP,
                    matrix + (int64_t)group * SQUARE + column, GROUP);
  for (int i = 0; i < SIDE; i++) {
    if (row + tile_row(i) >= count) continue;
    float* mine = out + (row + tile_row(i)) * width + group * GROUP + column;
    for (int j = 0; j < SIDE; j++) mine[tile_column(j)] = -1.0f * sums[i][j];
  }
}

// out f32 = codes u8, of n elements.
KERNEL(BLOCK_THREADS) widen_codes(float* __restrict__ out, const uint8_t* __restrict__ codes, int64_t n) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = (float)codes[i];
}

// out = rows, of one group, moved by the errors of `number` groups from group `from` on: minus errors · matrixᵀ of each in
// order. Where rows are not `given`, out is what they would be moved by, the other way round. rows, errors and out f32
// [count, 256·groups]; matrices f32 [number, 256, 256] come transposed. Grid (tiles of rows, of columns, matrices that lie
// side by side); of several matrices the groups lie next to each other, the first of each, then the second of each, and so do
// what a group answers.
KERNEL(PRODUCT_THREADS) answer_errors(float* __restrict__ out, const float* __restrict__ rows,
                                      const float* __restrict__ errors, const float* __restrict__ matrices, int given,
                                      int from, int number, int count, int groups, int group) {
  LDS(ProductTiles, tiles, 1);
  const int row = blockIdx.x * PRODUCT_ROWS, column = blockIdx.y * PRODUCT_COLUMNS, beside = gridDim.z, one = blockIdx.z;
  const int64_t width = (int64_t)groups * GROUP, at = (int64_t)(group * beside + one) * GROUP + column;
  float sums[SIDE][SIDE] = {};
  if (given) {
    for (int i = 0; i < SIDE; i++) {
      const float* mine = rows + min(row + tile_row(i), count - 1) * width + at;
      for (int j = 0; j < SIDE; j++) sums[i][j] = mine[tile_column(j)];
    }
  }
  const float* error = errors + min(row + (int)threadIdx.x, count - 1) * width;
  for (int other = 0; other < number; other++) {
    subtract_products(sums, tiles[0], error + ((from + other) * beside + one) * GROUP,
                      matrices + (int64_t)(other * beside + one) * SQUARE + column, GROUP);
  }
  const float sign = given ? 1.0f : -1.0f;
  for (int i = 0; i < SIDE; i++) {
    if (row + tile_row(i) >= count) continue;
    float* mine = out + (row + tile_row(i)) * width + at;
    for (int j = 0; j < SIDE; j++) mine[tile_column(j)] = sign * sums[i][j];
  }
}

// out = rows + share · errors: rows and out f32 [count, 256·groups], share f32 [count, before], `before` a multiple of 16, and
// errors f32 [before, 256·groups]. Sums begin with the rows. Grid (tiles of rows, of columns).
KERNEL(PRODUCT_THREADS) answer_rows(float* __restrict__ out, const float* __restrict__ rows, const float* __restrict__ share,
                                    const float* __restrict__ errors, int count, int before, int groups) {
  LDS(ProductTiles, tiles, 1);
  const int row = blockIdx.x * PRODUCT_ROWS, column = blockIdx.y * PRODUCT_COLUMNS;
  const int64_t width = (int64_t)groups * GROUP;
  float sums[SIDE][SIDE];
  for (int i = 0; i < SIDE; i++) {
    const float* mine = rows + min(row + tile_row(i), count - 1) * width + column;
    for (int j = 0; j < SIDE; j++) sums[i][j] = -mine[tile_column(j)];
  }
  subtract_products(sums, tiles[0], share + (int64_t)min(row + (int)threadIdx.x, count - 1) * before, errors + column, width,
                    before);
  for (int i = 0; i < SIDE; i++) {
    if (row + tile_row(i) >= count) continue;
    float* mine = out + (row + tile_row(i)) * width + column;
    for (int j = 0; j < SIDE; j++) mine[tile_column(j)] = -sums[i][j];
  }
}

// Of dense H f32 [groups, 256, 256]: the sum of all elements one after the other, f32 [groups], that of its rows, and 1 / H_cc,
// both f32 [groups, 256]. Grid (groups).
KERNEL(GROUP) dense_sums(float* __restrict__ totals, float* __restrict__ ones, float* __restrict__ inverse,
                         const float* __restrict__ matrix) {
  LDS(float, line, 2 * GROUP);
  const int k = threadIdx.x;
  const float* h = matrix + (int64_t)blockIdx.x * SQUARE;
  inverse[blockIdx.x * GROUP + k] = 1.0f / h[k * GROUP + k];
  float total = 0.0f, below = 0.0f, next = h[k];
  for (int i = 0; i < GROUP; i++) {
    float* now = line + (i & 1) * GROUP;
    now[k] = next;
    below = below + next;
    __syncthreads();
    if (i + 1 < GROUP) next = h[(i + 1) * GROUP + k];
    if (k == 0) {
#pragma unroll 16
      for (int c = 0; c < GROUP; c++) total = total + now[c];
    }
  }
  ones[blockIdx.x * GROUP + k] = below;
  if (k == 0) totals[blockIdx.x] = total;
}

// The transform of f64 [256] by 256 threads, in place.
DEVICE void transform(double* x) {
  for (int stride = 1; stride < GROUP; stride *= 2) {
    __syncthreads();
    const int i = threadIdx.x;
    const double mine = x[i], other = x[i ^ stride];
    __syncthreads();
    x[i] = i & stride ? other - mine : mine + other;
  }
  __syncthreads();
}

// The Hessian of each group from channel weights f64 [groups, 256] of mean 1: matrix and feedback f32 [groups, 256, 256] (of
// the feedback only what lies below the diagonal), weights and 1 / diagonal f32 [groups, 256]; failed i32 [groups] is 1
// where the factorisation broke down. `upper` f64 [groups, 256, 256] is scratch. Grid (groups).
KERNEL(GROUP) diagonal_hessian(float* __restrict__ matrix, float* __restrict__ feedback, float* __restrict__ weights,
                               float* __restrict__ inverse, int32_t* __restrict__ failed, double* __restrict__ upper,
                               const double* __restrict__ given, const float* __restrict__ signs) {
  LDS(double, spectrum, GROUP);
  LDS(double, strip, STRIP* GROUP);
  LDS(double, factors, STRIP* GROUP);
  LDS(float, sign, GROUP);
  const int k = threadIdx.x;
  const int64_t square = (int64_t)blockIdx.x * SQUARE;
  const double w = given[blockIdx.x * GROUP + k];
  double* u = upper + square;
  sign[k] = signs[GROUP + k];
  spectrum[k] = w;
  transform(spectrum);
  for (int i = 0; i < GROUP; i++) {
    matrix[square + i * GROUP + k] = (float)(spectrum[i ^ k] * (double)(sign[i] * sign[k]) / (double)GROUP);
  }
  weights[blockIdx.x * GROUP + k] = (float)w;
  inverse[blockIdx.x * GROUP + k] = 1.0f / (float)(spectrum[0] / (double)GROUP);
  __syncthreads();
  spectrum[k] = 1.0 / w;
  transform(spectrum);
  bool sound = true;
  for (int at = 0; at < GROUP; at += STRIP) {
    for (int q = k; q < at * STRIP; q += GROUP) factors[q] = u[q / STRIP * GROUP + at + q % STRIP];
    __syncthreads();
    double sums[STRIP];
#pragma unroll
    for (int r = 0; r < STRIP; r++) {
      sums[r] = spectrum[(at + r) ^ k] * (double)(sign[at + r] * sign[k]) / (double)GROUP;
    }
    // A wave whose columns all lie below the diagonal has nothing to sum.
    const int rows = at < (k | (WAVE - 1)) ? at : 0;
#pragma unroll 8
    for (int j = 0; j < rows; j++) {
      const double mine = u[j * GROUP + k];
#pragma unroll
      for (int r = 0; r < STRIP; r++) sums[r] = sums[r] - factors[j * STRIP + r] * mine;
    }
#pragma unroll
    for (int r = 0; r < STRIP; r++) {
      double* row = strip + r * GROUP;
      row[k] = sums[r];
      __syncthreads();
      const double pivot = row[at + r];
      sound = sound && pivot > 0.0;
      const double factor = sums[r] * (1.0 / sqrt(pivot > 0.0 ? pivot : 1.0));
      __syncthreads();
      row[k] = factor;
      __syncthreads();
      sums[r] = factor;
#pragma unroll
      for (int below = r + 1; below < STRIP; below++) sums[below] = sums[below] - row[at + below] * factor;
    }
    float out[STRIP];
#pragma unroll
    for (int r = 0; r < STRIP; r++) {
      u[(at + r) * GROUP + k] = sums[r];
      out[r] = (float)(sums[r] / strip[r * GROUP + at + r]);
    }
    if (k > at) {
#pragma unroll
      for (int r = 0; r < STRIP; r++) {
        if (k > at + r) feedback[square + k * GROUP + at + r] = out[r];
      }
    }
    __syncthreads();
  }
  if (k == 0) failed[blockIdx.x] = sound ? 0 : 1;
}
