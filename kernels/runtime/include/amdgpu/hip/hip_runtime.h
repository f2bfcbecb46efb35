// The HIP surface that the kernels use, for a bare clang without ROCm: enough to compile them for AMD GPUs and to look at
// the code (check.py). Programs that run use ROCm's own header.
#pragma once
#include <stdint.h>
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __launch_bounds__(threads) __attribute__((amdgpu_flat_work_group_size(1, threads)))
#define __forceinline__ inline __attribute__((always_inline))
#define HIP_DYNAMIC_SHARED(type, name) extern __shared__ type name[];
#define MQ_INLINE static __device__ __forceinline__

// A coordinate read from the hardware where it is used, as threadIdx.x and its like are.
#define MQ_INDEX(NAME, X, Y, Z)                                           \
  struct NAME##_type {                                                    \
    __declspec(property(get = get_x)) unsigned x;                         \
    __declspec(property(get = get_y)) unsigned y;                         \
    __declspec(property(get = get_z)) unsigned z;                         \
    __device__ __forceinline__ unsigned get_x() const { return X; }       \
    __device__ __forceinline__ unsigned get_y() const { return Y; }       \
    __device__ __forceinline__ unsigned get_z() const { return Z; }       \
  };                                                                      \
  extern const __device__ __attribute__((weak)) NAME##_type NAME

#define MQ_IMPLICIT(type) ((__attribute__((address_space(4))) const type*)__builtin_amdgcn_implicitarg_ptr())
MQ_INDEX(threadIdx, __builtin_amdgcn_workitem_id_x(), __builtin_amdgcn_workitem_id_y(), __builtin_amdgcn_workitem_id_z());
MQ_INDEX(blockIdx, __builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y(), __builtin_amdgcn_workgroup_id_z());
MQ_INDEX(blockDim, MQ_IMPLICIT(uint16_t)[6], MQ_IMPLICIT(uint16_t)[7], MQ_IMPLICIT(uint16_t)[8]);
MQ_INDEX(gridDim, MQ_IMPLICIT(uint32_t)[0], MQ_IMPLICIT(uint32_t)[1], MQ_IMPLICIT(uint32_t)[2]);

MQ_INLINE void __syncthreads() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
MQ_INLINE int mq_lane() { return __builtin_amdgcn_mbcnt_lo(~0u, 0u); }
template <class T>
MQ_INLINE T __shfl(T value, int lane) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return __builtin_bit_cast(T, __builtin_amdgcn_ds_bpermute((lane & 31) << 2, __builtin_bit_cast(int, value)));
}
template <class T>
MQ_INLINE T __shfl_xor(T value, int mask) {
  return __shfl(value, mq_lane() ^ mask);
}
template <class T>
MQ_INLINE T __shfl_down(T value, unsigned delta) {
  const int lane = mq_lane(), from = lane + (int)delta;
  return __shfl(value, from > 31 ? lane : from);
}
MQ_INLINE int min(int a, int b) { return a < b ? a : b; }
MQ_INLINE float expf(float x) { return __builtin_expf(x); }
MQ_INLINE float sqrtf(float x) { return __builtin_sqrtf(x); }
MQ_INLINE float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MQ_INLINE float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
MQ_INLINE float __int_as_float(int v) { return __builtin_bit_cast(float, v); }
MQ_INLINE uint32_t __float_as_uint(float v) { return __builtin_bit_cast(uint32_t, v); }
MQ_INLINE int __double2loint(double v) { return (int)__builtin_bit_cast(uint64_t, v); }
MQ_INLINE int __double2hiint(double v) { return (int)(__builtin_bit_cast(uint64_t, v) >> 32); }
MQ_INLINE double __hiloint2double(int high, int low) {
  return __builtin_bit_cast(double, (uint64_t)(uint32_t)high << 32 | (uint32_t)low);
}
MQ_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
MQ_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
