// The kernels that read a quantised matrix, built once per format (FORMAT is a struct of formats.h): whole-tensor decode,
// embedding rows, matrix-vector products, and the two expert products, which find their matrices through the routed ids.
// Matrices are row-major payloads whose rows are whole groups of 256. A team of lanes walks along ROWS rows at a time, a
// group a step, with the weights of the next step under way; how it multiplies is a struct of dot.h or tile.h.
#include "dot.h"
#include "tile.h"
#ifdef MQ_RESIDENT    // registers are kept to what this many threads of a multiprocessor leave
#undef KERNEL
#define KERNEL(threads) extern "C" __global__ void MQ_RESIDENT(threads, 768 / threads)
#endif

constexpr int SLICE = FORMAT::SLICE, ROWS = FORMAT::ROWS;
constexpr int TEAM = GROUP / SLICE;          // lanes that share a row
constexpr int CHUNK = 12;                    // groups of x in LDS at a time

#ifdef MQ_TILE
using Dot = Either<FORMAT::TILED, TileDot<FORMAT>, LaneDot<FORMAT>>::Type;
#else
using Dot = LaneDot<FORMAT>;
#endif
constexpr int STAGES = Dot::STAGE ? CHUNK * Dot::STAGE : 1;

DEVICE int teams() { return blockDim.x / TEAM; }
DEVICE int team() { return threadIdx.x / TEAM; }
DEVICE int slice() { return threadIdx.x % TEAM; }

// Puts groups [first, first + CHUNK) of x into LDS, as far as there are any. Whole waves have whole groups.
DEVICE void stage_x(float* staged, const float* x, int first, int groups) {
  if constexpr (Dot::STAGE > 0) {
    const int eights = min(CHUNK, groups - first) * (GROUP / PER_LANE);
    for (int i = threadIdx.x; i < eights; i += blockDim.x) {
      float v[PER_LANE];
      load_eight(x + first * GROUP, i, v);
      Dot::stage(staged + i / WAVE * Dot::STAGE, v);
    }
  }
}

// The product of row s / (TEAM / ROWS) with x, for lane s of the team. Every thread of the block calls it, after stage_x of
// the first groups. The order of sums is the same for any grid.
DEVICE float dot_rows(const uint8_t* const (&row)[ROWS], const float* x, int groups, float* staged) {
  Dot dot;
  typename FORMAT::Raw raw[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) raw[r] = FORMAT::load(row[r], slice());
  if constexpr (Dot::STAGE > 0) __syncthreads();
  for (int first = 0; first < groups; first += CHUNK) {
    if (Dot::STAGE > 0 && first > 0) {
      __syncthreads();    // the groups before are read
      stage_x(staged, x, first, groups);
      __syncthreads();
    }
    const int count = min(CHUNK, groups - first);
#pragma unroll 2    // the weights of the next step change places
    for (int g = 0; g < count; g++) {
      typename FORMAT::Raw next[ROWS];
      const int after = min(first + g + 1, groups - 1);
#pragma unroll
      for (int r = 0; r < ROWS; r++) next[r] = FORMAT::load(row[r] + after * FORMAT::BYTES, slice());
      dot.add(raw, staged + g * Dot::STAGE, x + (first + g) * GROUP);
#pragma unroll
      for (int r = 0; r < ROWS; r++) raw[r] = next[r];
    }
  }
  return dot.total();
}

DEVICE const uint8_t* row_of(const uint8_t* matrix, int row, int rows, int groups) {
  return matrix + (int64_t)min(row, rows - 1) * groups * FORMAT::BYTES;    // past the end: the last row, never stored
}

// The offset of a slot's expert matrix, or -1 where the id is out of range or that expert is not loaded.
DEVICE int64_t expert_offset(const int64_t* offsets, int expert, int experts) {
  return expert >= 0 && expert < experts ? offsets[expert] : -1;
}

// Formats of single values may end within a lane's slice; the others have no element there.
template <class F>
DEVICE void decode_tail(float* out, const uint8_t* payload, int64_t start, int64_t n) {
  if constexpr (F::VALUE > 0) {
    for (int64_t i = start; i < n; i++) out[i] = F::value(payload, i);
  }
}

DEVICE void decode_slice(float* out, const uint8_t* group) {
  float w[SLICE];
  FORMAT::weights(FORMAT::load(group, slice()), w);
#pragma unroll
  for (int j = 0; j < SLICE; j++) out[j] = w[j];
}

// out f32 [n]: the payload decoded in the stored basis. One lane per slice; n fills whole blocks of the format.
KERNEL(128) decode(float* __restrict__ out, const uint8_t* __restrict__ payload, int64_t n) {
  await_previous();
  const int64_t group = (int64_t)blockIdx.x * teams() + team(), start = group * GROUP + SLICE * slice();
  if (start + SLICE <= n) {
    decode_slice(out + start, payload + group * FORMAT::BYTES);
  } else {
    decode_tail<FORMAT>(out, payload, start, n);
  }
}

// out f32 [tokens, cols]: row ids[t] of a table [rows, cols]; NaN where the id is out of range. One lane per slice, grid
// (blocks of a row, tokens).
KERNEL(128) embed(float* __restrict__ out, const uint8_t* __restrict__ table, const int32_t* __restrict__ ids, int rows,
                  int groups) {
  await_previous();
  const int id = ids[blockIdx.y], group = blockIdx.x * teams() + team();
  if (group >= groups) return;    // no barrier follows
  float* to = out + ((int64_t)blockIdx.y * groups + group) * GROUP + SLICE * slice();
  if (id >= 0 && id < rows) {
    decode_slice(to, table + ((int64_t)id * groups + group) * FORMAT::BYTES);
  } else {
    for (int j = 0; j < SLICE; j++) to[j] = not_a_number();
  }
}

// out f32 [tokens, rows] = matrix [rows, cols] · x f32 [tokens, cols]. Grid (blocks of rows, tokens).
KERNEL(128) matvec(float* __restrict__ out, const uint8_t* __restrict__ matrix, const float* __restrict__ x, int rows,
                   int groups) {
  await_previous();
  LDS(float, staged, STAGES);
  x += (int64_t)blockIdx.y * groups * GROUP;
  stage_x(staged, x, 0, groups);
  const int first = (blockIdx.x * teams() + team()) * ROWS;
  const uint8_t* row[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) row[r] = row_of(matrix, first + r, rows, groups);
  const float dot = dot_rows(row, x, groups, staged);
  const int mine = first + slice() / (TEAM / ROWS);
  if (slice() % (TEAM / ROWS) == 0 && mine < rows) out[(int64_t)blockIdx.y * rows + mine] = dot;
}

// gate, up f32 [tokens, slots, rows] = W1, W3 of expert ids[t, slot] · x f32 [tokens, cols]. Expert e's matrices [rows, cols]
// lie at gate_at[e] and up_at[e] bytes in the two buffers (which may be one); an expert that is not loaded (-1) gives NaN.
// Grid (blocks of rows, slots, tokens); a team makes ROWS / 2 rows of each matrix from one read of x.
KERNEL(256) expert_gate_up(float* __restrict__ gate, float* __restrict__ up, const uint8_t* __restrict__ gate_matrices,
                           const int64_t* __restrict__ gate_at, const uint8_t* __restrict__ up_matrices,
                           const int64_t* __restrict__ up_at, const int32_t* __restrict__ ids,
                           const float* __restrict__ x, int experts, int rows, int groups) {
  await_previous();
  LDS(float, staged, STAGES);
  constexpr int PAIR = ROWS / 2;
  const int64_t slot = (int64_t)blockIdx.z * gridDim.y + blockIdx.y;
  const int id = ids[slot];
  x += (int64_t)blockIdx.z * groups * GROUP;
  stage_x(staged, x, 0, groups);
  const int first = (blockIdx.x * teams() + team()) * PAIR;
  const int64_t at[2] = {expert_offset(gate_at, id, experts), expert_offset(up_at, id, experts)};
  float dot = not_a_number();
  if (at[0] >= 0 && at[1] >= 0) {    // the same for the whole block, so that barriers stay whole
    const uint8_t* row[ROWS];
#pragma unroll
    for (int r = 0; r < PAIR; r++) {
      row[r] = row_of(gate_matrices + at[0], first + r, rows, groups);
      row[PAIR + r] = row_of(up_matrices + at[1], first + r, rows, groups);
    }
    dot = dot_rows(row, x, groups, staged);
  }
  const int kept = slice() / (TEAM / ROWS), mine = first + kept % PAIR;
  if (slice() % (TEAM / ROWS) == 0 && mine < rows) (kept < PAIR ? gate : up)[slot * rows + mine] = dot;
}

// out f32 [tokens, slots, rows] = W2 of expert ids[t, slot] · x f32 [tokens, slots, cols]. Grid (blocks of rows, slots, tokens).
KERNEL(256) expert_down(float* __restrict__ out, const uint8_t* __restrict__ matrices, const int64_t* __restrict__ at,
                        const int32_t* __restrict__ ids, const float* __restrict__ x, int experts, int rows, int groups) {
  await_previous();
  LDS(float, staged, STAGES);
  const int64_t slot = (int64_t)blockIdx.z * gridDim.y + blockIdx.y;
  const int id = ids[slot];
  x += slot * groups * GROUP;
  stage_x(staged, x, 0, groups);
  const int first = (blockIdx.x * teams() + team()) * ROWS;
  const int64_t offset = expert_offset(at, id, experts);
  float dot = not_a_number();
  if (offset >= 0) {
    const uint8_t* row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) row[r] = row_of(matrices + offset, first + r, rows, groups);
    dot = dot_rows(row, x, groups, staged);
  }
  const int mine = first + slice() / (TEAM / ROWS);
  if (slice() % (TEAM / ROWS) == 0 && mine < rows) out[slot * rows + mine] = dot;
}
