// The HIP surface that the kernels use, for nvrtc: integer names, shuffles of whole warps, halves.
#pragma once
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define HIP_DYNAMIC_SHARED(type, name) extern __shared__ type name[];
#define __shfl(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define __shfl_xor(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define __shfl_down(value, delta) __shfl_down_sync(0xffffffffu, value, delta)
struct __half {
  unsigned short bits;
};
static __device__ __forceinline__ __half __ushort_as_half(unsigned short bits) { return {bits}; }
static __device__ __forceinline__ float __half2float(__half h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
}
