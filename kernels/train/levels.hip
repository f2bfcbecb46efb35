// Values of stored matrices from codes u8 [matrices, groups, 256] and the numbers at the head of each group: `count` levels of a
// codebook or, where `even` is 1, scale and zero of an even grid; and from the gradients of values those of heads. Of all matrices
// the `chosen` ones take part, whose values and heads lie one after the other. Values are f32, or bf16 in half of the space.
// A wave has a group. Grid (blocks of groups).
#include "encode_tile.h"

constexpr int TRAIN_WAVES = BLOCK_THREADS / WAVE;

struct alignas(16) Halves {           // eight bf16
  uint32_t v[4];
};

// The upper half of an f32, rounded to nearest, ties to even; no number stays none.
DEVICE uint32_t to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fc0u : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

DEVICE void store_values(float* values, int64_t group, const float (&v)[PER_LANE]) { store_group(values + group * GROUP, v); }

DEVICE void store_values(uint16_t* values, int64_t group, const float (&v)[PER_LANE]) {
  Halves out;
#pragma unroll
  for (int j = 0; j < 4; j++) out.v[j] = to_bf16(v[2 * j]) | to_bf16(v[2 * j + 1]) << 16;
  reinterpret_cast<Halves*>(values + group * GROUP)[lane()] = out;
}

DEVICE void load_values(float (&v)[PER_LANE], const float* values, int64_t group) { load_group(v, values + group * GROUP); }

DEVICE void load_values(float (&v)[PER_LANE], const uint16_t* values, int64_t group) {
  const Halves in = reinterpret_cast<const Halves*>(values + group * GROUP)[lane()];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    v[2 * j] = __int_as_float((int)(in.v[j] << 16));
    v[2 * j + 1] = __int_as_float((int)(in.v[j] & 0xffff0000u));
  }
}

// The codes that this lane has of a group of the chosen matrices, of `each` groups a matrix.
DEVICE Codes chosen_codes(const uint8_t* codes, const int32_t* chosen, int64_t group, int64_t each) {
  const int64_t there = chosen[group / each] * each + group % each;
  return load_codes(codes + there * GROUP + PER_LANE * lane());
}

template <class T>
DEVICE void spread(T* values, const uint8_t* codes, const float* heads, const int32_t* chosen, int even, int count, int64_t each,
                   int64_t groups) {
  const int64_t group = (int64_t)blockIdx.x * TRAIN_WAVES + wave();
  if (group >= groups) return;
  const Codes mine = chosen_codes(codes, chosen, group, each);
  const float* head = heads + group * count;
  float v[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    const int code = code_of(mine, j);
    v[j] = even ? head[1] + head[0] * (float)code : head[code];
  }
  store_values(values, group, v);
}

// A lane sums its own eight in order, then the wave sums its lanes.
template <class T>
DEVICE void gradients_of_heads(float* out, const T* gradients, const uint8_t* codes, const int32_t* chosen, int even, int count,
                               int64_t each, int64_t groups) {
  const int64_t group = (int64_t)blockIdx.x * TRAIN_WAVES + wave();
  if (group >= groups) return;
  const int t = lane();
  const Codes mine = chosen_codes(codes, chosen, group, each);
  float g[PER_LANE];
  load_values(g, gradients, group);
  float kept = 0.0f;
  for (int k = 0; k < count; k++) {
    float part = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      const int code = code_of(mine, j);
      part = part + (even ? (k ? g[j] : g[j] * (float)code) : (code == k ? g[j] : 0.0f));
    }
    const float total = wave_sum(part);
    kept = t == k ? total : kept;
  }
  if (t < count) out[group * count + t] = kept;
}

KERNEL(BLOCK_THREADS) spread_levels_f32(float* __restrict__ values, const uint8_t* __restrict__ codes,
                                        const float* __restrict__ heads, const int32_t* __restrict__ chosen, int even, int count,
                                        int64_t each, int64_t groups) {
  spread(values, codes, heads, chosen, even, count, each, groups);
}

KERNEL(BLOCK_THREADS) level_gradients_f32(float* __restrict__ out, const float* __restrict__ gradients,
                                          const uint8_t* __restrict__ codes, const int32_t* __restrict__ chosen, int even,
                                          int count, int64_t each, int64_t groups) {
  gradients_of_heads(out, gradients, codes, chosen, even, count, each, groups);
}

KERNEL(BLOCK_THREADS) spread_levels_bf16(uint16_t* __restrict__ values, const uint8_t* __restrict__ codes,
                                        const float* __restrict__ heads, const int32_t* __restrict__ chosen, int even, int count,
                                        int64_t each, int64_t groups) {
  spread(values, codes, heads, chosen, even, count, each, groups);
}

KERNEL(BLOCK_THREADS) level_gradients_bf16(float* __restrict__ out, const uint16_t* __restrict__ gradients,
                                          const uint8_t* __restrict__ codes, const int32_t* __restrict__ chosen, int even,
                                          int count, int64_t each, int64_t groups) {
  gradients_of_heads(out, gradients, codes, chosen, even, count, each, groups);
}
