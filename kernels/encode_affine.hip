// Evenly spaced levels that are best in plain squared error, as lloyd/affine.py finds them, with the same bits: a search over
// both ends of the range, then least squares.
#include "encode_levels.h"

constexpr float MAGIC = 12582912.0f;          // 1.5 · 2²³: added and subtracted, it rounds to the nearest whole number
constexpr float SMALLEST = 4.70197740328915e-38f;    // 2⁻¹²⁴
constexpr float TOP = (float)(LEVELS - 1);

DEVICE float grid_code(float value, float zero, float inverse) {
  float q = (value - zero) * inverse;
  q = q > 0.0f ? q : 0.0f;
  q = q > TOP ? TOP : q;
  return (q + MAGIC) - MAGIC;
}

DEVICE float grid_error(const float* y, float zero, float scale) {
  const float inverse = 1.0f / scale, minus = 0.0f - scale;
  float error = 0.0f;
#pragma unroll 8
  for (int i = 0; i < GROUP; i++) {
    const float v = y[i * PITCH], d = fmaf(minus, grid_code(v, zero, inverse), v - zero);
    error = fmaf(d, d, error);
  }
  return error;
}

// params f32 [count, groups, 2] of rows f32 [count, 256·groups]; shrink f32 [trials] are the shares of the range that may be
// cut off at either end. Lane t has row t of a tile. Grid (tiles, groups from `first` on).
KERNEL(32) affine_levels(float* __restrict__ params, const float* __restrict__ rows, const float* __restrict__ shrink,
                         int trials, int steps, int count, int groups, int first) {
  LDS(float, block, GROUP* PITCH);
  const int group = first + blockIdx.y, tile = blockIdx.x * TILE, t = lane();
  const int64_t width = (int64_t)groups * GROUP;
  for (int r = 0; r < TILE; r++) {
    const float* row = rows + min(tile + r, count - 1) * width + group * GROUP;
#pragma unroll
    for (int m = 0; m < GROUP / WAVE; m++) block[(t + WAVE * m) * PITCH + r] = row[t + WAVE * m];
  }
  __syncthreads();
  const float* y = block + t;
  float low = y[0], high = low;
  for (int i = 1; i < GROUP; i++) {
    const float v = y[i * PITCH];
    low = low > v ? v : low;
    high = v > high ? v : high;
  }
  const float spacing = 1.0f / TOP, span = high - low;
  const bool flat = !(span * spacing > SMALLEST);
  float zero = low, scale = flat ? 1.0f : span * spacing;
  float best = grid_error(y, zero, scale);
  for (int trial = 1; trial < trials * trials; trial++) {
    const float a = shrink[trial / trials], b = shrink[trial % trials];
    const float tried_zero = fmaf(a, span, low);
    const float tried = flat ? 1.0f : span * spacing * (1.0f - a - b);
    const float error = grid_error(y, tried_zero, tried);
    const bool better = best > error;
    zero = better ? tried_zero : zero;
    scale = better ? tried : scale;
    best = better ? error : best;
  }
  zero = flat ? low : zero;
  for (int step = 0; step < steps; step++) {
    const float inverse = 1.0f / scale;
    float sq = 0.0f, sqq = 0.0f, sy = 0.0f, syq = 0.0f;
#pragma unroll 4
    for (int i = 0; i < GROUP; i++) {
      const float v = y[i * PITCH] - zero, q = grid_code(y[i * PITCH], zero, inverse);
      sq = sq + q;
      sqq = fmaf(q, q, sqq);
      sy = sy + v;
      syq = fmaf(v, q, syq);
    }
    const float n = (float)GROUP, determinant = n * sqq - sq * sq;
    bool usable = determinant > 0.5f;
    const float safe = usable ? determinant : 1.0f;
    const float new_scale = (n * syq - sq * sy) / safe, new_zero = zero + (sy * sqq - sq * syq) / safe;
    usable = usable && new_scale > SMALLEST;
    zero = usable ? new_zero : zero;
    scale = usable ? new_scale : scale;
  }
  if (tile + t < count) {
    float* out = params + ((int64_t)(tile + t) * groups + group) * PARAMS;
    out[0] = zero;
    out[1] = scale;
  }
}
