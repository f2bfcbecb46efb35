// The rotation of the MQ formats and the activation, for a run of 256 that a wave holds: lane t has elements 8t … 8t + 7.
#pragma once
#include "hadamard.h"

// y = S2 · H256 · S1 · x / 16.
DEVICE void rotate(float (&v)[PER_LANE], const float (&before)[PER_LANE], const float (&after)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] *= before[j];
  hadamard(v);
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
