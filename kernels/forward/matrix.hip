// The kernels that read a quantised matrix, built once per format (FORMAT is a struct of formats.h): whole-tensor decode,
// embedding rows, matrix-vector products, and the two expert products, which find their matrices through the routed ids.
// Matrices are row-major payloads whose rows are whole groups of 256. A team of lanes multiplies ROWS rows, a group at a
// time. A struct of dot.h or bits.h says how it multiplies, a struct of feed.h how the weights come; stream.h has its own ways.
#include "feed.h"
#include "stream.h"

// How the rows of a product lie in lanes, and what multiplies them. A turn of the loop takes UNROLLED groups; with two, two
// register sets alternate without copies.
template <class Format, class = void>
struct Product {
  using Weights = Format;
  using Dot = LaneDot<Format>;
#ifdef MQ_RESIDENT
  static constexpr int UNROLLED = 2;
#else
  static constexpr int UNROLLED = 1;
#endif
};
#ifdef MQ_BITS
template <class Format>
struct Product<Format, decltype((void)sizeof(typename Format::Counted))> {
  using Weights = typename Format::Counted;
  using Dot = BitDot<Weights>;
  static constexpr int UNROLLED = 1;
};
#endif
using How = Product<FORMAT>;
using Weights = How::Weights;
using Dot = How::Dot;
constexpr int SLICE = FORMAT::SLICE, SPAN = GROUP / SLICE;    // of decoding: elements of a lane, lanes of a group
constexpr int ROWS = Weights::ROWS;
constexpr int TEAM = GROUP / Weights::SLICE;    // lanes that share a row
constexpr int STAGES = Dot::STAGE ? CHUNK * Dot::STAGE : 1;

// Registers are limited so that RESIDENT_THREADS threads fit a multiprocessor, or one block that streams.
constexpr bool STREAMS = Tiled<FORMAT>::STAGE > 0;
constexpr int EXPERT_STAGES = Tiled<FORMAT>::X_WORDS;
constexpr int EXPERT_LDS = EXPERT_STAGES > STAGES ? EXPERT_STAGES : STAGES;
#ifdef MQ_RESIDENT
template <int THREADS>
struct Bound {
  static constexpr int MOST = STREAMS || THREADS < DIRECT_THREADS ? THREADS : DIRECT_THREADS;
  static constexpr int BLOCKS = STREAMS && THREADS == EXPERT_THREADS ? 1 : RESIDENT_THREADS / MOST;
};
#undef KERNEL
#define KERNEL(threads) extern "C" __global__ void MQ_RESIDENT(Bound<threads>::MOST, Bound<threads>::BLOCKS)
#endif

DEVICE int slice() { return threadIdx.x % TEAM; }

// Puts groups first … first + CHUNK - 1 of x into LDS, as far as there are so many. A wave puts whole groups.
DEVICE void stage_x(float* staged, const float* x, int first, int groups) {
  if constexpr (Dot::STAGE > 0) {
    const int eights = min(CHUNK, groups - first) * (GROUP / PER_LANE);
    for (int i = threadIdx.x; i < eights; i += blockDim.x) {
      float v[PER_LANE];
      Dot::load_x(x + first * GROUP, i, v);
      Dot::stage(staged + i / WAVE * Dot::STAGE, v);
    }
  }
}

// The rows of this lane's team.
template <int MATRICES>
DEVICE Rows<Weights, MATRICES> share_of(const uint8_t* const (&matrix)[MATRICES], int rows, int groups) {
  Rows<Weights, MATRICES> share;
#pragma unroll
  for (int m = 0; m < MATRICES; m++) share.matrix[m] = matrix[m];
  share.rows = rows;
  share.groups = groups;
  share.first = (blockIdx.x * blockDim.x + threadIdx.x) / WAVE * share.TILE + lane() / TEAM;
  return share;
}

template <int MATRICES>
DEVICE void store(float* const (&out)[MATRICES], const Rows<Weights, MATRICES>& share, Dot& dot) {
  const int kept = slice() / (TEAM / ROWS), row = share.number(kept);
  const float total = dot.total();
  if (slice() % (TEAM / ROWS) == 0 && row < share.rows) (kept < share.PER ? out[0] : out[MATRICES - 1])[row] = total;
}

// out[m] f32 [rows] = matrix m · x, for the rows of `share`, for which the feed was made. Every thread of the block calls it.
template <int MATRICES>
DEVICE void multiply(float* const (&out)[MATRICES], const Rows<Weights, MATRICES>& share, Direct<Weights, MATRICES>& feed,
                     const float* x, float* staged) {
  Dot dot;
  for (int first = 0; first < share.groups; first += CHUNK) {
    if (Dot::STAGE > 0 && first > 0) __syncthreads();    // no lane reads the groups before any more
    stage_x(staged, x, first, share.groups);
    if constexpr (Dot::STAGE > 0) __syncthreads();
    const int count = min(CHUNK, share.groups - first);
#pragma unroll(How::UNROLLED)
    for (int g = 0; g < count; g++) {
      feed.next();
      dot.add(feed.raw, staged + g * Dot::STAGE, x + (first + g) * GROUP);
    }
  }
  store(out, share, dot);
}

// A payload of single values may end within a lane's slice; payloads of blocks may not.
template <class F>
DEVICE void decode_tail(float* out, const uint8_t* payload, int64_t start, int64_t n) {
  if constexpr (F::VALUE > 0) {
    for (int64_t i = start; i < n; i++) out[i] = F::value(payload, i);
  }
}

DEVICE void decode_slice(float* out, const uint8_t* group) {
  float w[SLICE];
  FORMAT::weights(FORMAT::load(group, threadIdx.x % SPAN), w);
#pragma unroll
  for (int j = 0; j < SLICE; j++) out[j] = w[j];
}

// out f32 [n]: the payload decoded in the stored basis. One lane per slice; n fills whole blocks of the format.
KERNEL(MATRIX_THREADS) decode(float* __restrict__ out, const uint8_t* __restrict__ payload, int64_t n) {
  await_previous();
  const int64_t lanes = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, group = lanes / SPAN, start = SLICE * lanes;
  if (start + SLICE <= n) {
    decode_slice(out + start, payload + group * FORMAT::BYTES);
  } else {
    decode_tail<FORMAT>(out, payload, start, n);
  }
}

// out f32 [tokens, cols]: row ids[t] of a table [rows, cols]; NaN where the id is out of range. One lane per slice, grid
// (blocks of a row, tokens).
KERNEL(MATRIX_THREADS) embed(float* __restrict__ out, const uint8_t* __restrict__ table, const int32_t* __restrict__ ids,
                             int rows, int groups) {
  await_previous();
  const int id = ids[blockIdx.y], group = (blockIdx.x * blockDim.x + threadIdx.x) / SPAN;
  if (group >= groups) return;    // no barrier follows
  float* to = out + ((int64_t)blockIdx.y * groups + group) * GROUP + SLICE * (threadIdx.x % SPAN);
  if (id >= 0 && id < rows) {
    decode_slice(to, table + ((int64_t)id * groups + group) * FORMAT::BYTES);
  } else {
    for (int j = 0; j < SLICE; j++) to[j] = not_a_number();
  }
}

// out f32 [tokens, rows] = matrix [rows, cols] · x f32 [tokens, cols]. Grid (blocks of rows, tokens).
KERNEL(MATRIX_THREADS) matvec(float* __restrict__ out, const uint8_t* __restrict__ matrix, const float* __restrict__ x,
                              int rows, int groups) {
  LDS(float, staged, STAGES);
  const Rows<Weights, 1> share = share_of<1>({matrix}, rows, groups);
  Direct<Weights, 1> feed(share);
  await_previous();
  multiply<1>({out + (int64_t)blockIdx.y * rows}, share, feed, x + (int64_t)blockIdx.y * groups * GROUP, staged);
}

// An expert that is not loaded gives NaN.
DEVICE void not_loaded(float* out, int rows) {
  for (int row = blockIdx.x * blockDim.x + threadIdx.x; row < rows; row += gridDim.x * blockDim.x) out[row] = not_a_number();
}

// The rows of a block of a grid (blocks of rows, slots, tokens); the weights are on their way before the kernel awaits the one
// before it.
template <int MATRICES>
DEVICE void await_and_multiply_rows(const Job<MATRICES>& job, const float* x, float* staged) {
  const int slot = blockIdx.z * gridDim.y + blockIdx.y;
  const uint8_t* matrix[MATRICES];
  float* out[MATRICES];
  bool loaded = true;    // the same for the whole block
#pragma unroll
  for (int m = 0; m < MATRICES; m++) {
    matrix[m] = job.matrix(m, slot);
    out[m] = job.row(m, slot);
    loaded = loaded && matrix[m];
  }
  if (!loaded) {
    await_previous();
#pragma unroll
    for (int m = 0; m < MATRICES; m++) not_loaded(out[m], job.rows);
    return;
  }
  const Rows<Weights, MATRICES> share = share_of<MATRICES>(matrix, job.rows, job.groups);
  const float* own = x + (int64_t)(slot / job.per_x) * job.groups * GROUP;
  Direct<Weights, MATRICES> feed(share);
  await_previous();
  multiply<MATRICES>(out, share, feed, own, staged);
}

#ifdef MQ_COPY
// All of a job, by any number of blocks, through a ring of `stages`.
template <class Format, int MATRICES, class Input>
DEVICE void await_and_stream(const Job<MATRICES>& job, const Input& x, float* staged, int stages, int tile, int tiles, int share) {
  HIP_DYNAMIC_SHARED(uint8_t, lds)
  LDS(Ring, ring, 1);
  const Stream<Format, MATRICES> stream(job, ring, lds, staged, stages, tile, tiles, share);
  if (wave() < stream.waves) {
    stream.multiply(x);
  } else if (wave() == stream.waves) {
    stream.copy(Input::AT_FIRST);
  } else {
    stream.finish();
  }
}
#endif

// All of a job, by any number of blocks, where it is streamed; else as above.
template <int MATRICES, class Format = FORMAT>
DEVICE void await_and_multiply(const Job<MATRICES>& job, const float* x, float* staged, int stages, int tile, int tiles,
                               int share) {
#ifdef MQ_COPY
  if constexpr (STREAMS) {
    if (stages > 0) {
      await_and_stream<Format>(job, Given<typename Tiled<Format>::Dot>{x}, staged, stages, tile, tiles, share);
      return;
    }
  }
#endif
  await_and_multiply_rows(job, x, staged);
}

// The same for x that is made of gate and up. What cannot be streamed is not a number.
template <class Format = FORMAT>
DEVICE void await_and_multiply_activated(const Job<1>& job, const float* gate, const float* up, const float* signs, int rotated,
                                         float* staged, int stages, int tile, int tiles, int share) {
#ifdef MQ_COPY
  if constexpr (STREAMS) {
    if (stages > 0) {
      const Activated<typename Tiled<Format>::Dot> x = {gate, up, signs, rotated};
      await_and_stream<Format>(job, x, staged, stages, tile, tiles, share);
      return;
    }
  }
#endif
  await_previous();
  not_loaded(job.out[0], job.slots * job.rows);
}

// gate, up f32 [tokens, slots, rows] = W1, W3 of expert ids[t, slot] · x f32 [tokens, cols]. Expert e's matrices [rows, cols]
// lie at gate_at[e] and up_at[e] bytes in the two buffers (which may be one), or at -1. Grid (blocks of rows, slots, tokens),
// and a team makes ROWS / 2 rows of each matrix from one read of x; or any grid, where the product is streamed through a
// ring of `stages` in the dynamic LDS, each a tile of `tile` rows: then a matrix has `tiles` of them, and each block a share.
KERNEL(EXPERT_THREADS) expert_gate_up(float* __restrict__ gate, float* __restrict__ up,
                                      const uint8_t* __restrict__ gate_matrices, const int64_t* __restrict__ gate_at,
                                      const uint8_t* __restrict__ up_matrices, const int64_t* __restrict__ up_at,
                                      const int32_t* __restrict__ ids, const float* __restrict__ x, int experts, int rows,
                                      int groups, int tokens, int slots, int stages, int tile, int tiles, int share) {
  LDS(float, staged, EXPERT_LDS);
  const Job<2> job = {
      {gate_matrices, up_matrices}, {gate_at, up_at}, {gate, up}, ids, experts, rows, groups, tokens * slots, slots};
  await_and_multiply<2>(job, x, staged, stages, tile, tiles, share);
}

// out f32 [tokens, slots, rows] = W2 of expert ids[t, slot] · x f32 [tokens, slots, cols]. Grid and last arguments as above.
KERNEL(EXPERT_THREADS) expert_down(float* __restrict__ out, const uint8_t* __restrict__ matrices,
                                   const int64_t* __restrict__ at, const int32_t* __restrict__ ids,
                                   const float* __restrict__ x, int experts, int rows, int groups, int tokens, int slots,
                                   int stages, int tile, int tiles, int share) {
  LDS(float, staged, EXPERT_LDS);
  const Job<1> job = {{matrices}, {at}, {out}, ids, experts, rows, groups, tokens * slots, 1};
  await_and_multiply<1>(job, x, staged, stages, tile, tiles, share);
}

// The same for x = rotate(silu(gate) ∘ up), or unrotated where `rotated` is 0: gate and up f32 [tokens, slots, cols], signs f32
// [2, 256]. Only for products that are streamed, whose blocks are few: each makes all rows of x that it needs.
KERNEL(EXPERT_THREADS) expert_activated_down(float* __restrict__ out, const uint8_t* __restrict__ matrices,
                                             const int64_t* __restrict__ at, const int32_t* __restrict__ ids,
                                             const float* __restrict__ gate, const float* __restrict__ up,
                                             const float* __restrict__ signs, int experts, int rows, int groups, int tokens,
                                             int slots, int rotated, int stages, int tile, int tiles, int share) {
  LDS(float, staged, EXPERT_LDS);
  const Job<1> job = {{matrices}, {at}, {out}, ids, experts, rows, groups, tokens * slots, 1};
  await_and_multiply_activated(job, gate, up, signs, rotated, staged, stages, tile, tiles, share);
}
