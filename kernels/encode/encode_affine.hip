// Evenly spaced levels that are best in plain squared error, with the bits of lloyd/levels/affine.py: a search over both ends
// of the range, then least squares.
#include "encode_levels.h"

constexpr float TOP = (float)(LEVELS - 1);

DEVICE float grid_code(float value, float zero, float inverse) {
  float q = (value - zero) * inverse;
  q = q > 0.0f ? q : 0.0f;
  q = q > TOP ? TOP : q;
  return (q + ROUNDER) - ROUNDER;
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

// The best grid so far: its squared error, and the shares of the range that it leaves out at either end.
struct Best {
  float error, a, b;
};

struct Range {
  float low, width, step;
};

DEVICE void attempt(Best& best, const float* y, const Range& range, float a, float b) {
  const float error = grid_error(y, fmaf(a, range.width, range.low), range.step * (1.0f - a - b));
  if (best.error > error) best = {error, a, b};
}

// First shares are cut off at both ends, then one end at a time moves in and out.
DEVICE Best search(const float* y, const Range& range, const float* both_ends, int both, const float* one_end, int one) {
  Best best = {__int_as_float(0x7f800000), 0.0f, 0.0f};
  attempt(best, y, range, 0.0f, 0.0f);
  for (int i = 0; i < both; i++) attempt(best, y, range, both_ends[i], both_ends[i]);
  for (int i = 0; i < one; i++) {
    const float by = one_end[i], a = best.a, b = best.b;
    attempt(best, y, range, a - by, b);
    attempt(best, y, range, a + by, b);
    const float moved = best.a;
    attempt(best, y, range, moved, b - by);
    attempt(best, y, range, moved, b + by);
  }
  return best;
}

// params f32 [count, groups, 2] of rows f32 [count, 256·groups]; `both_ends` and `one_end` are the shares of the search, as
// many as the numbers behind them say. Lane t has row t of a tile. Grid (tiles, groups from `first` on).
KERNEL(WAVE) affine_levels(float* __restrict__ params, const float* __restrict__ rows, const float* __restrict__ both_ends,
                           int both, const float* __restrict__ one_end, int one, int steps, int count, int groups,
                           int first) {
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
  const float span = high - low, spacing = span * (1.0f / TOP);
  const bool flat = !(spacing > SMALLEST_SCALE);
  const Range range = {low, span, flat ? 1.0f : spacing};
  const Best best = search(y, range, both_ends, both, one_end, one);
  float zero = flat ? low : fmaf(best.a, span, low);
  float scale = flat ? 1.0f : range.step * (1.0f - best.a - best.b);
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
    bool usable = determinant > DETERMINANT_FLOOR;
    const float safe = usable ? determinant : 1.0f;
    const float new_scale = (n * syq - sq * sy) / safe, new_zero = zero + (sy * sqq - sq * syq) / safe;
    usable = usable && new_scale > SMALLEST_SCALE;
    zero = usable ? new_zero : zero;
    scale = usable ? new_scale : scale;
  }
  if (tile + t < count) {
    float* out = params + ((int64_t)(tile + t) * groups + group) * PARAMS;
    out[0] = zero;
    out[1] = scale;
  }
}
