// The HIP surface that the kernels use, for nvrtc: integer names, shuffles of whole warps, halves, tiles, one fused instruction.
#pragma once
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define MQ_RESIDENT(threads, blocks) __launch_bounds__(threads, blocks)
#define HIP_DYNAMIC_SHARED(type, name) extern __shared__ type name[];
#define __shfl(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define __shfl_xor(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define __shfl_down(value, delta) __shfl_down_sync(0xffffffffu, value, delta)
#define MQ_FIRST_LANE
static __device__ __forceinline__ int first_lane(bool found) {
  const unsigned lanes = __ballot_sync(0xffffffffu, found);
  return lanes ? __ffs(lanes) - 1 : 32;
}
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
#define MQ_AWAIT
static __device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");    // the next one may begin, now that all before this one is done
#endif
}
// One instruction picks four of eight bytes by nibbles.
#define MQ_BOOK
struct Book {
  uint32_t low[2], high[2];
};
static __device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t nibbles) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(nibbles));
  return out;
}
static __device__ __forceinline__ Book make_book(uint32_t l01, uint32_t l23, uint32_t l45, uint32_t l67) {
  return {{permute(l01, l23, 0x6420), permute(l45, l67, 0x6420)}, {permute(l01, l23, 0x7531), permute(l45, l67, 0x7531)}};
}
static __device__ __forceinline__ void halves(uint32_t pair, float& a, float& b) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(a), "=f"(b) : "r"(pair));
}
static __device__ __forceinline__ void pick_pairs(const Book& book, uint32_t codes, uint32_t& a, uint32_t& b) {
  const uint32_t low = permute(book.low[0], book.low[1], codes), high = permute(book.high[0], book.high[1], codes);
  a = permute(low, high, 0x5140);
  b = permute(low, high, 0x7362);
}
static __device__ __forceinline__ void pick4(const Book& book, uint32_t codes, float (&w)[4]) {
  uint32_t a, b;
  pick_pairs(book, codes, a, b);
  halves(a, w[0], w[1]);
  halves(b, w[2], w[3]);
}
// Tiles of 16 rows × 8 columns from halves: lane 4g + c holds row g and row g + 8 of the left factor, column g of the right
// one, and of the product columns 2c and 2c + 1 of both rows.
#define MQ_TILE
struct Tile {
  float v[4];
};
struct alignas(16) Words {
  uint32_t v[4];
};
static __device__ __forceinline__ Words load_words(const float* p) { return *reinterpret_cast<const Words*>(p); }
static __device__ __forceinline__ uint32_t pair_of_halves(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
static __device__ __forceinline__ void multiply_tile(Tile& sum, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                     uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.v[0]), "+f"(sum.v[1]), "+f"(sum.v[2]), "+f"(sum.v[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Volatile, or they would be moved to their first use.
#define MQ_FETCH
static __device__ __forceinline__ uint16_t fetch_u16(const uint8_t* p) {
  uint16_t out;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(out) : "l"(p));
  return out;
}
static __device__ __forceinline__ uint32_t fetch_u32(const uint8_t* p) {
  uint32_t out;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(out) : "l"(p));
  return out;
}
static __device__ __forceinline__ void fetch_pair(const uint8_t* p, uint32_t& a, uint32_t& b) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(p));
}
// Copies of 16 bytes from memory into LDS that go on while the lane does; batches of a lane's copies end in order.
#if __CUDA_ARCH__ >= 800
#define MQ_RING
typedef uint32_t LdsAddress;
static __device__ __forceinline__ LdsAddress lds_address(const uint8_t* p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ void copy_quad(LdsAddress lds, const uint8_t* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(lds), "l"(from) : "memory");
}
static __device__ __forceinline__ void close_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATER>
static __device__ __forceinline__ void await_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}
#endif
