// The kernels that read a quantised matrix, built once per format (FORMAT is a struct of formats.h): whole-tensor decode,
// embedding rows, matrix-vector products, and the two expert products, which find their matrices through the routed ids.
// Matrices are row-major payloads whose rows are whole groups of 256. A team of lanes multiplies ROWS rows, a step of groups
// at a time. A struct of dot.h or bits.h says how it multiplies, a struct of feed.h how the weights come.
#include "dot.h"
#include "bits.h"
#include "feed.h"
// Registers are limited so that RESIDENT_THREADS threads fit a multiprocessor; two steps are unrolled so that two register sets
// alternate without copies.
#ifdef MQ_RESIDENT
#undef KERNEL
#define KERNEL(threads) extern "C" __global__ void MQ_RESIDENT(threads, RESIDENT_THREADS / threads)
constexpr int LANE_STEPS = 2;
#else
constexpr int LANE_STEPS = 1;
#endif

// How the rows of a product lie in lanes, and what multiplies them. Where a vendor's GPU copies experts' rows into LDS,
// products of at most WHOLE matrices have all their rows there, and others use a ring; with WHOLE 0 rows come directly. A
// turn of the loop takes UNROLLED steps, or UNROLLED_WHOLE where all rows are in LDS.
template <class Format, class = void>
struct Product {
  using Weights = Format;
  using Dot = LaneDot<Format>;
  static constexpr int UNROLLED = LANE_STEPS, WHOLE = 0, UNROLLED_WHOLE = 1;
};
#ifdef MQ_BITS
template <class Format>
struct Product<Format, decltype((void)sizeof(typename Format::Counted))> {
  using Weights = typename Format::Counted;
  using Dot = BitDot<Weights>;
  static constexpr int UNROLLED = 1, WHOLE = Weights::WHOLE, UNROLLED_WHOLE = Weights::UNROLLED;
};
#endif
using How = Product<FORMAT>;
using Weights = How::Weights;
using Dot = How::Dot;
constexpr int SLICE = FORMAT::SLICE, SPAN = GROUP / SLICE;    // of decoding: elements of a lane, lanes of a group
constexpr int ROWS = Weights::ROWS;
constexpr int TEAM = GROUP / Weights::SLICE;    // lanes that share a row
constexpr int STAGES = Dot::STAGE ? CHUNK * Dot::STAGE : 1;

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

// Adds the products of `count` groups.
template <int UNROLLED, class Feed>
DEVICE void walk(Dot& dot, Feed& feed, const float* staged, const float* x, int count) {
#pragma unroll(UNROLLED)
  for (int g = 0; g < count; g += Feed::STEP) {
    feed.next();
#pragma unroll
    for (int i = 0; i < Feed::STEP; i++) {
      typename Weights::Raw raw[ROWS];
      feed.read(i, raw);
      dot.add(raw, staged + (g + i) * Dot::STAGE, x + (g + i) * GROUP);
    }
  }
}

template <int MATRICES>
DEVICE void store(float* const (&out)[MATRICES], const Rows<Weights, MATRICES>& share, Dot& dot) {
  const int kept = slice() / (TEAM / ROWS), row = share.number(kept);
  const float total = dot.total();
  if (slice() % (TEAM / ROWS) == 0 && row < share.rows) (kept < share.PER ? out[0] : out[MATRICES - 1])[row] = total;
}

// out[m] f32 [rows] = matrix m · x, for the rows of `share`, for which the feed was made. Every thread of the block calls it.
template <int MATRICES, class Feed>
DEVICE void multiply(float* const (&out)[MATRICES], const Rows<Weights, MATRICES>& share, Feed& feed, const float* x,
                     float* staged) {
  Dot dot;
  for (int first = 0; first < share.groups; first += CHUNK) {
    if (Dot::STAGE > 0 && first > 0) __syncthreads();    // no lane reads the groups before any more
    stage_x(staged, x, first, share.groups);
    if constexpr (Dot::STAGE > 0) __syncthreads();
    walk<How::UNROLLED>(dot, feed, staged, x + first * GROUP, min(CHUNK, share.groups - first));
  }
  store(out, share, dot);
}

// The offset of a slot's expert matrix, or -1 where the id is out of range or that expert is not loaded.
DEVICE int64_t expert_offset(const int64_t* offsets, int expert, int experts) {
  return expert >= 0 && expert < experts ? fetch_new(offsets + expert) : -1;
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

// As `multiply`, but the weights are on their way before the kernel awaits the one before it.
template <int MATRICES>
DEVICE void await_and_multiply(float* const (&out)[MATRICES], const Rows<Weights, MATRICES>& share, const float* x,
                               float* staged, int copied, Arrival* arrival) {
#ifdef MQ_COPY
  if constexpr (How::WHOLE > 0) {
    HIP_DYNAMIC_SHARED(uint8_t, lds)
    if (copied > 0) {
      if constexpr (MATRICES <= How::WHOLE) {    // of at most CHUNK groups
        if (threadIdx.x == 0) Whole<Weights, MATRICES>::request(share, lds, copied, arrival);
        await_previous();
        stage_x(staged, x, 0, share.groups);
        __syncthreads();
        Dot dot;
        Whole<Weights, MATRICES> feed(share, lds, copied);
        await_arrival(arrival);
        walk<How::UNROLLED_WHOLE>(dot, feed, staged, x, share.groups);
        store(out, share, dot);
      } else {
        Ring<Weights, MATRICES> feed(share, lds);
        await_previous();
        multiply(out, share, feed, x, staged);
      }
      return;
    }
  }
#endif
  Direct<Weights, MATRICES> feed(share);
  await_previous();
  multiply(out, share, feed, x, staged);
}

// An expert that is not loaded gives NaN.
DEVICE void not_loaded(float* out, int rows) {
  for (int row = blockIdx.x * blockDim.x + threadIdx.x; row < rows; row += gridDim.x * blockDim.x) out[row] = not_a_number();
}

// gate, up f32 [tokens, slots, rows] = W1, W3 of expert ids[t, slot] · x f32 [tokens, cols]. Expert e's matrices [rows, cols]
// lie at gate_at[e] and up_at[e] bytes in the two buffers (which may be one), or at -1. Grid (blocks of rows, slots, tokens);
// a team makes ROWS / 2 rows of each matrix from one read of x. `copied`: the waves of a block whose rows come through the
// dynamic LDS, all of them or none.
KERNEL(EXPERT_THREADS) expert_gate_up(float* __restrict__ gate, float* __restrict__ up,
                                      const uint8_t* __restrict__ gate_matrices, const int64_t* __restrict__ gate_at,
                                      const uint8_t* __restrict__ up_matrices, const int64_t* __restrict__ up_at,
                                      const int32_t* __restrict__ ids, const float* __restrict__ x, int experts, int rows,
                                      int groups, int copied) {
  LDS(float, staged, STAGES);
  LDS(Arrival, arrival, 1);
  if constexpr (How::WHOLE >= 2) prepare(arrival);
  const int64_t slot = (int64_t)blockIdx.z * gridDim.y + blockIdx.y;
  const int id = fetch_new(ids + slot);
  const int64_t first = expert_offset(gate_at, id, experts), second = expert_offset(up_at, id, experts);
  float* const out[2] = {gate + slot * rows, up + slot * rows};
  if (first < 0 || second < 0) {    // the same for the whole block
    await_previous();
    for (int m = 0; m < 2; m++) not_loaded(out[m], rows);
    return;
  }
  const Rows<Weights, 2> share = share_of<2>({gate_matrices + first, up_matrices + second}, rows, groups);
  await_and_multiply<2>(out, share, x + (int64_t)blockIdx.z * groups * GROUP, staged, copied, arrival);
}

// out f32 [tokens, slots, rows] = W2 of expert ids[t, slot] · x f32 [tokens, slots, cols]. Grid (blocks of rows, slots,
// tokens); `copied` as above.
KERNEL(EXPERT_THREADS) expert_down(float* __restrict__ out, const uint8_t* __restrict__ matrices,
                                   const int64_t* __restrict__ at, const int32_t* __restrict__ ids,
                                   const float* __restrict__ x, int experts, int rows, int groups, int copied) {
  LDS(float, staged, STAGES);
  LDS(Arrival, arrival, 1);
  if constexpr (How::WHOLE >= 1) prepare(arrival);
  const int64_t slot = (int64_t)blockIdx.z * gridDim.y + blockIdx.y;
  const int64_t offset = expert_offset(at, fetch_new(ids + slot), experts);
  if (offset < 0) {
    await_previous();
    not_loaded(out + slot * rows, rows);
    return;
  }
  const Rows<Weights, 1> share = share_of<1>({matrices + offset}, rows, groups);
  await_and_multiply<1>({out + slot * rows}, share, x + slot * groups * GROUP, staged, copied, arrival);
}
