// The HIP surface that the kernels use, for the host: see fiber.h and runtime.cpp. Shuffles and barriers need every lane,
// as on the GPU, and the runtime reports a kernel that breaks this. `__shared__` is refused: LDS (device.h) comes from an
// arena that is filled with poison before every block and guarded behind every array.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include "../fiber.h"

namespace mq {
static thread_local Block* self = nullptr;

template <class To, class From>
static inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &value, sizeof(To));
  return to;
}

template <class T>
static inline T shuffle(T value, unsigned source) {
  return bits_as<T>(self->exchange(self, bits_as<uint32_t>(value))[source % 32]);
}

static inline unsigned lane() { return self->fiber->number % 32; }
}  // namespace mq

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define LDS(type, name, count) type* const name = static_cast<type*>(mq::self->lds(mq::self, sizeof(type) * (count)))
#define HIP_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(mq::self->dynamic_lds);

#define threadIdx (mq::self->fiber->thread)
#define blockIdx (mq::self->block)
#define blockDim (mq::self->block_dim)
#define gridDim (mq::self->grid_dim)

static inline void __syncthreads() { mq::self->barrier(mq::self); }

template <class T>
static inline T __shfl(T value, int source) {
  return mq::shuffle(value, source & 31);
}
template <class T>
static inline T __shfl_xor(T value, int mask) {
  return mq::shuffle(value, (mq::lane() ^ mask) & 31);
}
template <class T>
static inline T __shfl_down(T value, unsigned delta) {
  return mq::shuffle(value, mq::lane() + delta > 31 ? mq::lane() : mq::lane() + delta);
}

using std::min;
#define MQ_HALF_TO_FLOAT
static inline float half_to_float(uint16_t bits) { return static_cast<float>(mq::bits_as<_Float16>(bits)); }
static inline float __int_as_float(int v) { return mq::bits_as<float>(v); }
static inline uint32_t __float_as_uint(float v) { return mq::bits_as<uint32_t>(v); }
static inline int __double2loint(double v) { return static_cast<int>(mq::bits_as<uint64_t>(v)); }
static inline int __double2hiint(double v) { return static_cast<int>(mq::bits_as<uint64_t>(v) >> 32); }
static inline double __hiloint2double(int high, int low) {
  return mq::bits_as<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}
#define MQ_LANES_WHERE
static inline uint32_t lanes_where(bool found) {
  const uint32_t* all = mq::self->exchange(mq::self, found ? 1 : 0);
  uint32_t lanes = 0;
  for (int lane = 0; lane < 32; lane++) lanes |= all[lane] << lane;
  return lanes;
}
#define MQ_FIRST_LANE
static inline int first_lane(bool found) {
  const uint32_t lanes = lanes_where(found);
  return lanes ? __builtin_ctz(lanes) : 32;
}
#define MQ_SYNC_WAVE
static inline void sync_wave() { __shfl(0, 0); }
#define MQ_BOOK
struct Book {
  float level[8];
};
static inline Book make_book(uint32_t l01, uint32_t l23, uint32_t l45, uint32_t l67) {
  const uint32_t pairs[4] = {l01, l23, l45, l67};
  Book book;
  for (int i = 0; i < 8; i++) book.level[i] = half_to_float(pairs[i / 2] >> (16 * (i % 2)) & 0xffff);
  return book;
}
static inline void pick4(const Book& book, uint32_t codes, float (&w)[4]) {
  for (int i = 0; i < 4; i++) w[i] = book.level[codes >> (4 * i) & 7];
}
