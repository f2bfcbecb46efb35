// The HIP surface that the kernels use, for nvrtc: integer names, shuffles of whole warps, halves, one fused instruction.
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
#define MQ_SYNC_WAVE
#define sync_wave() __syncwarp()
// One instruction where the compiler makes two of it.
#define MQ_AND_OR
static __device__ __forceinline__ uint32_t and_or(uint32_t v, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(v), "r"(mask), "r"(bits));
  return out;
}
#define MQ_HALF_TO_FLOAT
static __device__ __forceinline__ float half_to_float(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
