// What all kernels use beside HIP itself: sums over waves and blocks in a fixed order, and loads of weights that are aligned
// to 2 bytes only. A product and a sum are rounded separately unless fmaf is written, so a kernel gives the same bits on every
// back end, as far as expf and division do; products that count bits (bits.h) are the exception. Waves have 32 lanes, and
// blocks are whole waves.
#pragma once
#ifndef __HIPCC_RTC__    // hiprtc needs no header
#include <hip/hip_runtime.h>
#endif

#include "block_table.h"    // made by block_table.py

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#ifndef LDS
#define LDS(type, name, count) __shared__ type name[count]
#endif

DEVICE int lane() { return threadIdx.x % WAVE; }
DEVICE int wave() { return threadIdx.x / WAVE; }

DEVICE float not_a_number() { return __int_as_float(0x7fc00000); }

// Behind this call, each lane of a wave sees what the others wrote to LDS before it.
#ifndef MQ_SYNC_WAVE
DEVICE void sync_wave() {
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
}
#endif

// Every lane gets the number of the first lane whose `found` is true, or WAVE.
#ifndef MQ_FIRST_LANE
DEVICE int first_lane(bool found) {
  const uint32_t lanes = __builtin_amdgcn_ballot_w32(found);
  return lanes ? __builtin_ctz(lanes) : WAVE;
}
#endif

// Bit by bit, for which lanes `found` is true; every lane gets it.
#ifndef MQ_LANES_WHERE
DEVICE uint32_t lanes_where(bool found) { return __builtin_amdgcn_ballot_w32(found); }
#endif

// The number of the lowest bit that is set in a word that is not 0.
#ifndef MQ_FIRST_BIT
DEVICE int first_bit(uint32_t bits) { return __builtin_ctz(bits); }
#endif

DEVICE float wave_sum(float v) {
  for (int mask = WAVE / 2; mask > 0; mask /= 2) v += __shfl_xor(v, mask);
  return v;
}

DEVICE float wave_max(float v) {
  for (int mask = WAVE / 2; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor(v, mask));
  return v;
}

// Every thread gets the sum over its block. `scratch` holds one float per wave, and may be in use until the call.
DEVICE float block_sum(float v, float* scratch) {
  v = wave_sum(v);
  __syncthreads();
  if (lane() == 0) scratch[wave()] = v;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < (int)blockDim.x / WAVE; w++) total += scratch[w];
  return total;
}

DEVICE float block_max(float v, float* scratch) {
  v = wave_max(v);
  __syncthreads();
  if (lane() == 0) scratch[wave()] = v;
  __syncthreads();
  float most = scratch[0];
  for (int w = 1; w < (int)blockDim.x / WAVE; w++) most = fmaxf(most, scratch[w]);
  return most;
}

DEVICE uint32_t load_u16(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }
DEVICE uint32_t load_u32(const uint8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }
DEVICE float load_f32(const uint8_t* p) { return *reinterpret_cast<const float*>(p); }
// hip_fp16.h would have it, but hiprtc does not always find that; the other vendors' headers have their own.
#ifndef MQ_HALF_TO_FLOAT
DEVICE float half_to_float(uint16_t bits) { return (float)__builtin_bit_cast(_Float16, bits); }
#endif
DEVICE float load_f16(const uint8_t* p) { return half_to_float(load_u16(p)); }

// A vendor's header may know a faster way.
#ifndef MQ_AND_OR
DEVICE uint32_t and_or(uint32_t v, uint32_t mask, uint32_t bits) { return (v & mask) | bits; }
#endif

// From sm_90 on, kernel N + 1 may start while kernel N runs, once a thread of each of N's blocks has called `begin_next` behind
// `await_end`, so that the kernels before N are done. Before `await_end`, kernel N + 1 writes nothing, and reads no buffer of a
// type that N writes (CudaBackend._dispatch checks that). Buffers that kernel N - 1 wrote are read with `fetch_new`, past the
// cache.
#ifndef MQ_AWAIT
DEVICE void await_end() {}
DEVICE void begin_next() {}
#endif
DEVICE void await_previous() {
  await_end();
  begin_next();
}
template <class T>
DEVICE T fetch_new(const T* p) {
  return *const_cast<const volatile T*>(p);    // volatile: not from the cache, which a running kernel may have filled before
}

struct alignas(16) Quad {
  float v[4];
};

// Eight of a run of activations, which begins at a multiple of 16 bytes.
DEVICE void load_eight(const float* run, int i, float (&x)[PER_LANE]) {
  const Quad* quads = reinterpret_cast<const Quad*>(run) + 2 * i;
  const Quad a = quads[0], b = quads[1];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    x[j] = a.v[j];
    x[4 + j] = b.v[j];
  }
}

struct alignas(8) Pair {
  uint32_t v[2];
};

// Loads of weights. A compiler that moves them to their first use would wait there; the vendors' headers keep them in place.
#ifndef MQ_FETCH
DEVICE uint16_t fetch_u16(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }
DEVICE uint32_t fetch_u32(const uint8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }
DEVICE void fetch_pair(const uint8_t* p, uint32_t& a, uint32_t& b) {
  const Pair pair = *reinterpret_cast<const Pair*>(p);
  a = pair.v[0];
  b = pair.v[1];
}
#endif

// N words that lie at a multiple of 8 bytes, or of 4 where N is odd.
template <int N>
DEVICE void fetch_words(const uint8_t* p, uint32_t (&words)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    if constexpr (N % 2 == 0) {
      fetch_pair(p + 4 * i, words[i], words[i + 1]);
    } else {
      words[i] = fetch_u32(p + 4 * i);
      if (i + 1 < N) words[i + 1] = fetch_u32(p + 4 * i + 4);
    }
  }
}

// The same from LDS.
template <int N>
DEVICE void read_words(const uint8_t* p, uint32_t (&words)[N]) {
  struct alignas(N % 2 ? 4 : 8) Run {
    uint32_t v[N];
  };
  const Run run = *reinterpret_cast<const Run*>(p);
#pragma unroll
  for (int i = 0; i < N; i++) words[i] = run.v[i];
}

// Eight f16 levels in registers. pick4 looks up the four levels whose numbers, below 8, are the lowest four nibbles of `codes`;
// higher nibbles are ignored. On AMD GPUs the low bytes of the levels are held apart from their high bytes, because one
// instruction picks four bytes.
#ifndef MQ_BOOK
struct Book {
  uint32_t low[2], high[2];
};
DEVICE Book make_book(uint32_t l01, uint32_t l23, uint32_t l45, uint32_t l67) {
  return {{__builtin_amdgcn_perm(l23, l01, 0x06040200), __builtin_amdgcn_perm(l67, l45, 0x06040200)},
          {__builtin_amdgcn_perm(l23, l01, 0x07050301), __builtin_amdgcn_perm(l67, l45, 0x07050301)}};
}
DEVICE void pick4(const Book& book, uint32_t codes, float (&w)[4]) {
  codes = (codes | codes << 8) & 0x00ff00ff;
  codes = (codes | codes << 4) & 0x0f0f0f0f;
  const uint32_t low = __builtin_amdgcn_perm(book.low[1], book.low[0], codes);
  const uint32_t high = __builtin_amdgcn_perm(book.high[1], book.high[0], codes);
  const uint32_t a = __builtin_amdgcn_perm(high, low, 0x05010400), b = __builtin_amdgcn_perm(high, low, 0x07030602);
  w[0] = half_to_float((uint16_t)a);
  w[1] = half_to_float((uint16_t)(a >> 16));
  w[2] = half_to_float((uint16_t)b);
  w[3] = half_to_float((uint16_t)(b >> 16));
}
#endif
