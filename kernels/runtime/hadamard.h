// The unnormalised Walsh-Hadamard transform of a run of 256 that a wave holds, lane t elements 8t … 8t + 7: butterflies of stride
// 1, 2, … 128 as in formats/fwht.py.
#pragma once
#include "device.h"

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
