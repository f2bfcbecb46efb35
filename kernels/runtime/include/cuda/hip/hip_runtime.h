// The HIP surface that the kernels use, for nvrtc: integer names, shuffles of whole warps, halves, bits, copies, fused
// instructions.
#pragma once
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define MQ_RESIDENT(threads, blocks) __launch_bounds__(threads, blocks)
#define HIP_DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[];
#define __shfl(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define __shfl_xor(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define __shfl_down(value, delta) __shfl_down_sync(0xffffffffu, value, delta)
#define MQ_FIRST_LANE
static __device__ __forceinline__ int first_lane(bool found) {
  const unsigned lanes = __ballot_sync(0xffffffffu, found);
  return lanes ? __ffs(lanes) - 1 : 32;
}
#define MQ_LANES_WHERE
static __device__ __forceinline__ uint32_t lanes_where(bool found) { return __ballot_sync(0xffffffffu, found); }
#define MQ_FIRST_BIT
static __device__ __forceinline__ int first_bit(uint32_t bits) { return __ffs((int)bits) - 1; }
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
static __device__ __forceinline__ void await_end() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
static __device__ __forceinline__ void begin_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
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
// How many bits rows of a tile of 16 × 256 bits have in common with columns of one of 256 × 8: lane 4g + c holds words c and
// c + 4 of row g (a0, a2) and of row g + 8 (a1, a3), those of column g, and the counts of both rows with columns 2c and 2c + 1.
#if __CUDA_ARCH__ >= 800
#define MQ_BITS
// Over a wave's whole numbers, to every lane.
static __device__ __forceinline__ int wave_most(int v) { return __reduce_max_sync(0xffffffffu, v); }
static __device__ __forceinline__ uint32_t wave_total(uint32_t v) { return __reduce_add_sync(0xffffffffu, v); }
// Bits of a where the mask has them, else of b: compilers take it apart, and then need one more.
static __device__ __forceinline__ uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(out) : "r"(mask), "r"(a), "r"(b));
  return out;
}
struct Counts {
  int v[4];
};
static __device__ __forceinline__ Counts count_common(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                      uint32_t b1) {
  Counts count;
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=r"(count.v[0]), "=r"(count.v[1]), "=r"(count.v[2]), "=r"(count.v[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
  return count;
}
// Products of a tile of 16 × 32 signed bytes and one of 32 × 8, added to `sum`: lane 4g + c holds words c and c + 4 of row g (a0,
// a2) and of row g + 8 (a1, a3), those of column g (b0, b1), and the sums of both rows with columns 2c and 2c + 1.
static __device__ __forceinline__ void multiply_bytes(Counts& sum, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                      uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum.v[0]), "+r"(sum.v[1]), "+r"(sum.v[2]), "+r"(sum.v[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Two whole numbers of up to 10 bits as f16 n · 2^-24. A product, since the units that shift have more to do.
static __device__ __forceinline__ uint32_t pair_of(int a, int b) {
  uint32_t out;
  asm("mad.lo.s32 %0, %1, 65536, %2;" : "=r"(out) : "r"(b), "r"(a));
  return out;
}
struct Sums {
  float v[4];
};
// Products of a tile of 16 × 16 f16 and one of 16 × 8, added to `sum`: lane 4g + c holds the pairs c and c + 4 of row g (a0, a2) and
// of row g + 8 (a1, a3), those of column g (b0, b1), and the sums of both rows with columns 2c and 2c + 1.
static __device__ __forceinline__ void multiply_halves(Sums& sum, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                       uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.v[0]), "+f"(sum.v[1]), "+f"(sum.v[2]), "+f"(sum.v[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same of the pairs c alone.
static __device__ __forceinline__ void multiply_halves(Sums& sum, uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum.v[0]), "+f"(sum.v[1]), "+f"(sum.v[2]), "+f"(sum.v[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
#endif
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
// Copies from memory into LDS that go on while the lanes do, in multiples of 16 bytes. An arrival is there once, of the number
// that `prepare` gave, all have arrived and the bytes that they expect have come; then it begins anew, and the parity of the
// times that it was there tells which one to await. Who has prepared some calls `show_prepared` before anyone uses them.
#if __CUDA_ARCH__ >= 900
#define MQ_COPY
typedef uint64_t Arrival;
static __device__ __forceinline__ uint32_t lds_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ void prepare(Arrival* arrival, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(lds_address(arrival)), "r"(count) : "memory");
}
static __device__ __forceinline__ void show_prepared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
static __device__ __forceinline__ void expect(Arrival* arrival, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(lds_address(arrival)), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void arrive(Arrival* arrival) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(lds_address(arrival)) : "memory");
}
static __device__ __forceinline__ void copy_run(uint8_t* lds, const uint8_t* from, int bytes, Arrival* arrival) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   lds_address(lds)), "l"(from), "r"(bytes), "r"(lds_address(arrival)) : "memory");
}
// All waves of a block wait for each other in `sync_block`; one that calls `pass_block` instead does not wait.
static __device__ __forceinline__ void sync_block() { asm volatile("barrier.cta.sync 1, %0;" ::"r"(blockDim.x) : "memory"); }
static __device__ __forceinline__ void pass_block() { asm volatile("barrier.cta.arrive 1, %0;" ::"r"(blockDim.x) : "memory"); }
static __device__ __forceinline__ void await_arrival(Arrival* arrival, int parity) {
  asm volatile("{.reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra wait;}" ::"r"(
                   lds_address(arrival)), "r"(parity) : "memory");
}
#endif
