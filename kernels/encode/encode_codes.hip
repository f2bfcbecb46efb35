// The last steps of encoding a row: levels in the precision of the format, nearest codes, the gain, and the bytes. A wave has
// one group of one row. Shapes are those of encode_fit.hip.
#include "encode_levels.h"

constexpr int BYTES = Block::BYTES;
constexpr int CODES = BYTES - Block::HEAD;    // bytes of a group's codes
constexpr int REBIAS = 127 - 15;              // from the exponent of a float to that of a half

// f32 of magnitude up to 65504 to the nearest f16, ties to even.
DEVICE uint32_t half_bits(float f) {
  const uint32_t bits = __float_as_uint(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const int exponent = (int)(magnitude >> 23) - REBIAS;      // of the half
  if (exponent > 0) {
    const uint32_t shifted = magnitude - ((uint32_t)REBIAS << 23);
    return sign | (shifted + 0xfff + (shifted >> 13 & 1)) >> 13;
  }
  if (exponent < -10) return sign;
  const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
  const int shift = 14 - exponent;
  return sign | (mantissa + (1u << (shift - 1)) - 1 + (mantissa >> shift & 1)) >> shift;
}

// A level as the format stores it.
DEVICE float stored_level(float level) {
  if (GRID) return level;
  level = level < -HALF_MAX ? -HALF_MAX : level;
  level = level > HALF_MAX ? HALF_MAX : level;
  return half_to_float((uint16_t)half_bits(level));
}

// Rounds params f32 [count, groups, PARAMS] to the format's precision. For a grid that was fitted under a Hessian, zero and
// scale are those of its first and last level. A thread has a row, grid (rows / threads, groups from `first` on).
KERNEL(BLOCK_THREADS) round_levels(float* __restrict__ params, int fitted, int count, int groups, int first) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= count) return;
  float* mine = params + ((int64_t)row * groups + first + blockIdx.y) * PARAMS;
  if (GRID && fitted) {
    const float low = level_of(mine, 0), high = level_of(mine, LEVELS - 1);
    mine[0] = low;
    mine[1] = (float)(((double)high - (double)low) / (double)(LEVELS - 1));
  }
#pragma unroll
  for (int k = 0; k < PARAMS; k++) mine[k] = stored_level(mine[k]);
}

// Codes of the nearest level. Grid (rows, groups from `first` on).
KERNEL(WAVE) nearest(uint8_t* __restrict__ codes, const float* __restrict__ rows, const float* __restrict__ params,
                     int groups, int first) {
  const int64_t at = (int64_t)blockIdx.x * groups + first + blockIdx.y;
  float v[PER_LANE];
  int code[PER_LANE];
  Levels<GRID> levels;
  load_levels(levels, params + at * PARAMS);
  load_group(v, rows + at * GROUP);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) assign(levels, v[j], code[j]);
  store_codes(codes + at * GROUP + PER_LANE * lane(), code);
}

DEVICE void residual(float (&e)[PER_LANE], const float (&y)[PER_LANE], const uint8_t* codes, const float* params) {
  const Codes mine = load_codes(codes + PER_LANE * lane());
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) e[j] = y[j] - level_of(params, code_of(mine, j));
}

// errors f32 [rows, 256·groups]: rows minus what the decoder gives. Grid (rows, groups from `first` on).
KERNEL(WAVE) residual_rows(float* __restrict__ errors, const float* __restrict__ rows, const float* __restrict__ params,
                           const uint8_t* __restrict__ codes, int groups, int first) {
  const int64_t at = (int64_t)blockIdx.x * groups + first + blockIdx.y;
  float y[PER_LANE], e[PER_LANE];
  load_group(y, rows + at * GROUP);
  residual(e, y, codes + at * GROUP, params + at * PARAMS);
  store_group(errors + at * GROUP, e);
}

// values f32 [rows, 256·groups]: what the decoder gives. Grid (rows, groups from `first` on).
KERNEL(WAVE) decoded_rows(float* __restrict__ values, const float* __restrict__ params, const uint8_t* __restrict__ codes,
                          int groups, int first) {
  const int64_t at = (int64_t)blockIdx.x * groups + first + blockIdx.y;
  const Codes mine = load_codes(codes + at * GROUP + PER_LANE * lane());
  float v[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] = level_of(params + at * PARAMS, code_of(mine, j));
  store_group(values + at * GROUP, v);
}

// Puts back the old codes and levels of each row in which the new ones do not cost less, as lloyd.again does. pulls and
// old_pulls f32 [rows, 256·groups] are H · (y - q) of the new and of the old. Grid (rows, groups from `first` on).
KERNEL(WAVE) keep_better(float* __restrict__ params, uint8_t* __restrict__ codes, const float* __restrict__ pulls,
                         const float* __restrict__ old_pulls, const float* __restrict__ old_params,
                         const uint8_t* __restrict__ old_codes, int groups, int first) {
  LDS(float, left, GROUP);
  LDS(float, right, GROUP);
  const int t = lane();
  const int64_t at = (int64_t)blockIdx.x * groups + first + blockIdx.y, mine = at * GROUP + PER_LANE * t;
  const Codes now = load_codes(codes + mine), was = load_codes(old_codes + mine);
  float a[PER_LANE], b[PER_LANE];
  load_group(a, old_pulls + at * GROUP);
  load_group(b, pulls + at * GROUP);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    a[j] = a[j] + b[j];
    b[j] = level_of(params + at * PARAMS, code_of(now, j)) - level_of(old_params + at * PARAMS, code_of(was, j));
  }
  store_group(left, a);
  store_group(right, b);
  __syncthreads();
  if (dot_in_parts(left, right) > 0.0f) return;
  if (t < PARAMS) params[at * PARAMS + t] = old_params[at * PARAMS + t];
  *reinterpret_cast<Codes*>(codes + mine) = was;
}

// Multiplies the levels by what lloyd.encode.partial_gains makes of (yᵀH y) / (yᵀH ŷ), or of 1 where that is beyond 2 or not
// positive; `noise` is 1 minus the gain that partial_gains is given. For a `dense` H, pulled holds H·y. Otherwise H is of
// `weights`, in the basis before the rotation, and pulled is not read. Grid (rows, groups).
KERNEL(WAVE) apply_gain(float* __restrict__ params, const float* __restrict__ rows, const uint8_t* __restrict__ codes,
                        const float* __restrict__ weights, const float* __restrict__ pulled,
                        const float* __restrict__ signs, int dense, float noise, int groups, int first) {
  LDS(float, left, GROUP);
  LDS(float, right, 2 * GROUP);
  const int group = first + blockIdx.y, t = lane();
  const int64_t at = (int64_t)blockIdx.x * groups + group;
  float* param = params + at * PARAMS;
  float y[PER_LANE], e[PER_LANE], a[PER_LANE];
  load_group(y, rows + at * GROUP);
  residual(e, y, codes + at * GROUP, param);
  if (dense) {
    load_group(a, pulled + at * GROUP);
  } else {
    load_group(a, signs + GROUP);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      y[j] = y[j] * a[j];
      e[j] = e[j] * a[j];
    }
    hadamard(y);
    hadamard(e);
    load_group(a, weights + group * GROUP);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) a[j] = a[j] * y[j];
  }
  store_group(left, a);
  store_group(right, y);
  store_group(right + GROUP, e);
  __syncthreads();
  float sum;
  if (dense) {
    sum = dot_in_parts(left, right + t / PARTS * GROUP);
  } else {
    // Of each of the two sums, four lanes take every fourth element: the order of lloyd.levels.refit.weighted_dot.
    const float *one = left + t % 4, *two = right + (t / 4 % 2) * GROUP + t % 4;
    sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < GROUP; i += 4) sum = fmaf(one[i], two[i], sum);
    sum = sum + __shfl_xor(sum, 1);
    sum = sum + __shfl_xor(sum, 2);
  }
  const float whole = __shfl(sum, 0), kept = whole - __shfl(sum, dense ? PARTS : 4);
  const float gain = whole > 0.0f && kept > SIGNAL_FLOOR * whole ? whole / kept : 1.0f;
  if (t < PARAMS) param[t] = stored_level(param[t] * (gain / (1.0f + noise * (gain - 1.0f))));
}

// The payload: BYTES per group, params already in the format's precision. Grid (rows · groups).
KERNEL(WAVE) pack(uint8_t* __restrict__ payload, const float* __restrict__ params, const uint8_t* __restrict__ codes) {
  LDS(uint8_t, out, CODES);
  const int t = lane();
  const int64_t at = blockIdx.x;
  const float* param = params + at * PARAMS;
  uint8_t* group = payload + at * BYTES;
  if (GRID && t < 2) *reinterpret_cast<float*>(group + 4 * t) = param[1 - t];      // scale, zero
  if (!GRID && t < LEVELS) *reinterpret_cast<uint16_t*>(group + 2 * t) = (uint16_t)half_bits(param[t]);
  const Codes mine = load_codes(codes + at * GROUP + PER_LANE * t);
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    low |= code_of(mine, j) << (BITS * j);
    high |= code_of(mine, 4 + j) << (BITS * j);
  }
  for (int i = 0; i < BITS; i++) {
    const int bit = 8 * i, half = 4 * BITS;
    uint32_t byte = bit < half ? low >> bit : high >> (bit - half);
    if (bit < half && bit + 8 > half) byte |= high << (half - bit);
    out[BITS * t + i] = (uint8_t)byte;
  }
  __syncthreads();
  uint8_t* body = group + Block::HEAD;
  for (int i = 2 * t; i < CODES; i += 2 * WAVE) {
    *reinterpret_cast<uint16_t*>(body + i) = (uint16_t)(out[i] | out[i + 1] << 8);
  }
}
