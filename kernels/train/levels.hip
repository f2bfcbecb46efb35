// Values of stored matrices from codes u8 [groups, 256] and the numbers at the head of each group, f32 [groups, count]: `count`
// levels of a codebook or, where `even` is 1, scale and zero of an even grid; and from the gradients of values those of heads.
// A wave has a group. Grid (blocks of groups).
#include "encode_tile.h"

constexpr int TRAIN_WAVES = BLOCK_THREADS / WAVE;

// values f32 [groups, 256].
KERNEL(BLOCK_THREADS) spread_levels(float* __restrict__ values, const uint8_t* __restrict__ codes,
                                    const float* __restrict__ heads, int even, int count, int64_t groups) {
  const int64_t group = (int64_t)blockIdx.x * TRAIN_WAVES + wave();
  if (group >= groups) return;
  const Codes mine = load_codes(codes + group * GROUP + PER_LANE * lane());
  const float* head = heads + group * count;
  float v[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    const int code = code_of(mine, j);
    v[j] = even ? head[1] + head[0] * (float)code : head[code];
  }
  store_group(values + group * GROUP, v);
}

// out f32 [groups, count] from gradients f32 [groups, 256]. A lane sums its own eight in order, then the wave sums its lanes.
KERNEL(BLOCK_THREADS) level_gradients(float* __restrict__ out, const float* __restrict__ gradients,
                                      const uint8_t* __restrict__ codes, int even, int count, int64_t groups) {
  const int64_t group = (int64_t)blockIdx.x * TRAIN_WAVES + wave();
  if (group >= groups) return;
  const int t = lane();
  const Codes mine = load_codes(codes + group * GROUP + PER_LANE * t);
  float g[PER_LANE];
  load_group(g, gradients + group * GROUP);
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
