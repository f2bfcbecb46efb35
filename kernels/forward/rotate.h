// The rotation of the MQ formats and the activation, for a run of 256 that a wave holds: lane t has elements 8t … 8t + 7.
#pragma once
#include "device.h"

// One wave rotates a run of 256: y = S2 · H256 · S1 · x / 16, butterflies of stride 1, 2, … 128 as in formats/fwht.py.
DEVICE void rotate(float (&v)[PER_LANE], const float (&before)[PER_LANE], const float (&after)[PER_LANE]) {
  const int t = lane();
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] *= before[j];
#pragma unroll
  for (int stride = 1; stride < PER_LANE; stride *= 2) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      if ((j & stride) == 0) {
        const float a = v[j], b = v[j + stride];
        v[j] = a + b;
        v[j + stride] = a - b;
      }
    }
  }
  for (int mask = 1; mask < WAVE; mask *= 2) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      const float other = __shfl_xor(v[j], mask);
      v[j] = t & mask ? other - v[j] : v[j] + other;
    }
  }
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] *= after[j] * ROTATION_SCALE;
}

// The same with the signs of a table f32 [2, 256].
DEVICE void rotate(float (&v)[PER_LANE], const float* signs) {
  float before[PER_LANE], after[PER_LANE];
  load_eight(signs, lane(), before);
  load_eight(signs + GROUP, lane(), after);
  rotate(v, before, after);
}

DEVICE float silu_mul(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }
