// The kernels that read a quantised matrix, built once per format (FORMAT is a struct of formats.h): whole-tensor decode,
// embedding rows, matrix-vector products, and the two expert products, which find their matrices through the routed ids.
// Matrices are row-major payloads whose rows are whole runs of 256. One wave makes ROWS rows at a time, with x in registers.
#include "formats.h"

constexpr int ROWS = 4;      // rows that share one read of x
constexpr int LANES = WAVE / ROWS;    // lanes that end up with the same row's sum
constexpr int WAVES = 4;     // waves of a block
constexpr int CHUNK = 16;    // groups whose codebooks are in LDS at a time
constexpr int BOOK = FORMAT::LEVELS * ROWS * CHUNK;    // floats of LDS per wave
constexpr int BOOKS = BOOK ? BOOK * WAVES : 1;

// Puts the codebooks of groups [first, first + count) of each row into LDS, a group's by one lane; every thread of the block
// must call it. The barrier before the first write is left out where nothing was read yet.
template <int N>
DEVICE void stage_codebooks(const uint8_t* const (&row)[N], int first, int count, float* book) {
  if constexpr (FORMAT::LEVELS > 0) {
    if (first > 0) __syncthreads();
#pragma unroll
    for (int r = 0; r < N; r++) {
      for (int g = lane(); g < count; g += WAVE) {
        const uint8_t* group = row[r] + (int64_t)(first + g) * FORMAT::BYTES;
#pragma unroll
        for (int i = 0; i < FORMAT::LEVELS; i++) book[(r * CHUNK + g) * FORMAT::LEVELS + i] = load_f16(group + 2 * i);
      }
    }
    __syncthreads();
  }
}

// Sums each of four values over the wave; lane t receives that of row t / 8. Halves of the wave swap the rows that they
// do not keep, so that six shuffles do the work of twenty.
DEVICE float wave_sum_rows(const float (&v)[4]) {
  const bool high = lane() & 16, odd = lane() & 8;
  float pair[2];
#pragma unroll
  for (int r = 0; r < 2; r++) pair[r] = (high ? v[r + 2] : v[r]) + __shfl_xor(high ? v[r] : v[r + 2], 16);
  float sum = (odd ? pair[1] : pair[0]) + __shfl_xor(odd ? pair[0] : pair[1], 8);
  for (int mask = 4; mask > 0; mask /= 2) sum += __shfl_xor(sum, mask);
  return sum;
}

// The product of row t / LANES with x, for lane t. Sums run over a lane's elements in order, then over lanes: the same
// order for any grid and back end.
DEVICE float dot_rows(const uint8_t* const (&row)[ROWS], const float* x, int groups, float* books) {
  float sum[ROWS] = {};
  const int t = lane();
  float* book = books + wave() * BOOK;
  typename FORMAT::Raw raw[ROWS];    // loaded one group ahead
#pragma unroll
  for (int r = 0; r < ROWS; r++) raw[r] = FORMAT::load(row[r], t);
  for (int first = 0; first < groups; first += CHUNK) {
    const int count = min(CHUNK, groups - first);
    stage_codebooks(row, first, count, book);
#pragma unroll 2
    for (int g = 0; g < count; g++) {
      typename FORMAT::Raw next[ROWS];
      const int after = min(first + g + 1, groups - 1);
#pragma unroll
      for (int r = 0; r < ROWS; r++) next[r] = FORMAT::load(row[r] + (int64_t)after * FORMAT::BYTES, t);
      float eight[PER_LANE];
      load_eight(x + (first + g) * GROUP, t, eight);
      const float x_sum = ((eight[0] + eight[1]) + (eight[2] + eight[3])) + ((eight[4] + eight[5]) + (eight[6] + eight[7]));
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        sum[r] = FORMAT::dot(raw[r], books, wave() * BOOK + (r * CHUNK + g) * FORMAT::LEVELS, eight, x_sum, sum[r]);
        raw[r] = next[r];
      }
    }
  }
  return wave_sum_rows(sum);
}

DEVICE const uint8_t* row_of(const uint8_t* matrix, int row, int rows, int groups) {
  return matrix + (int64_t)min(row, rows - 1) * groups * FORMAT::BYTES;    // past the end: the last row, never stored
}

// The offset of a slot's expert matrix, or -1 where the id is out of range or that expert is not loaded.
DEVICE int64_t expert_offset(const int64_t* offsets, int expert, int experts) {
  return expert >= 0 && expert < experts ? offsets[expert] : -1;
}

// Formats of single values may end within a lane's eight; the others have no element there.
template <class F>
DEVICE void decode_tail(float* out, const uint8_t* payload, int64_t start, int64_t n) {
  if constexpr (F::VALUE > 0) {
    for (int64_t i = start; i < n; i++) out[i] = F::value(payload, i);
  }
}

// out f32 [n]: the payload decoded in the stored basis. One wave per run of 256; n fills whole blocks of the format.
KERNEL(128) decode(float* __restrict__ out, const uint8_t* __restrict__ payload, int64_t n) {
  LDS(float, books, WAVES * (FORMAT::LEVELS + 1));
  const int64_t run = (int64_t)blockIdx.x * WAVES + wave();
  const int64_t start = run * GROUP + PER_LANE * lane();
  const bool inside = run * GROUP < n;
  const uint8_t* group = payload + (inside ? run : 0) * FORMAT::BYTES;
  float* book = books + wave() * FORMAT::LEVELS;
  const uint8_t* const row[1] = {group};
  stage_codebooks(row, 0, 1, book);
  if (start + PER_LANE <= n) {
    float w[PER_LANE];
    FORMAT::weights(FORMAT::load(group, lane()), books, wave() * FORMAT::LEVELS, w);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) out[start + j] = w[j];
  } else {
    decode_tail<FORMAT>(out, payload, start, n);
  }
}

// out f32 [tokens, cols]: row ids[t] of a table [rows, cols]; NaN where the id is out of range. Grid (groups, tokens).
KERNEL(32) embed(float* __restrict__ out, const uint8_t* __restrict__ table, const int32_t* __restrict__ ids, int rows,
                 int groups) {
  LDS(float, books, FORMAT::LEVELS + 1);
  const int id = ids[blockIdx.y];
  const bool valid = id >= 0 && id < rows;
  const uint8_t* group = table + ((int64_t)(valid ? id : 0) * groups + blockIdx.x) * FORMAT::BYTES;
  const uint8_t* const row[1] = {group};
  stage_codebooks(row, 0, 1, books);
  float w[PER_LANE];
  FORMAT::weights(FORMAT::load(group, lane()), books, 0, w);
  float* to = out + ((int64_t)blockIdx.y * groups + blockIdx.x) * GROUP + PER_LANE * lane();
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) to[j] = valid ? w[j] : not_a_number();
}

// out f32 [tokens, rows] = matrix [rows, cols] · x f32 [tokens, cols]. Grid (rows / 16, tokens).
KERNEL(128) matvec(float* __restrict__ out, const uint8_t* __restrict__ matrix, const float* __restrict__ x, int rows,
                   int groups) {
  LDS(float, books, BOOKS);
  const int first = (blockIdx.x * WAVES + wave()) * ROWS;
  const uint8_t* row[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) row[r] = row_of(matrix, first + r, rows, groups);
  const float dot = dot_rows(row, x + (int64_t)blockIdx.y * groups * GROUP, groups, books);
  const int mine = first + lane() / LANES;
  if (lane() % LANES == 0 && mine < rows) out[(int64_t)blockIdx.y * rows + mine] = dot;
}

// gate, up f32 [tokens, slots, rows] = W1, W3 of expert ids[t, slot] · x f32 [tokens, cols]. Expert e's matrices [rows, cols]
// lie at gate_at[e] and up_at[e] bytes in the two buffers (which may be one); an expert that is not loaded (-1) gives NaN.
// Grid (rows / 8, slots, tokens): a wave makes two rows of each matrix from one read of x.
KERNEL(128) expert_gate_up(float* __restrict__ gate, float* __restrict__ up, const uint8_t* __restrict__ gate_matrices,
                           const int64_t* __restrict__ gate_at, const uint8_t* __restrict__ up_matrices,
                           const int64_t* __restrict__ up_at, const int32_t* __restrict__ ids,
                           const float* __restrict__ x, int experts, int rows, int groups) {
  LDS(float, books, BOOKS);
  constexpr int PAIR = ROWS / 2;
  const int first = (blockIdx.x * WAVES + wave()) * PAIR;
  const int64_t slot = (int64_t)blockIdx.z * gridDim.y + blockIdx.y;
  const int64_t at[2] = {expert_offset(gate_at, ids[slot], experts), expert_offset(up_at, ids[slot], experts)};
  const bool loaded = at[0] >= 0 && at[1] >= 0;
  float dot = not_a_number();
  if (loaded) {    // the same for the whole block, so that barriers stay whole
    const uint8_t* row[ROWS];
#pragma unroll
    for (int r = 0; r < PAIR; r++) {
      row[r] = row_of(gate_matrices + at[0], first + r, rows, groups);
      row[PAIR + r] = row_of(up_matrices + at[1], first + r, rows, groups);
    }
    dot = dot_rows(row, x + (int64_t)blockIdx.z * groups * GROUP, groups, books);
  }
  const int kept = lane() / LANES, mine = first + kept % PAIR;
  if (lane() % LANES == 0 && mine < rows) (kept < PAIR ? gate : up)[slot * rows + mine] = dot;
}

// out f32 [tokens, slots, rows] = W2 of expert ids[t, slot] · x f32 [tokens, slots, cols]. Grid (rows / 16, slots, tokens).
KERNEL(128) expert_down(float* __restrict__ out, const uint8_t* __restrict__ matrices, const int64_t* __restrict__ at,
                        const int32_t* __restrict__ ids, const float* __restrict__ x, int experts, int rows, int groups) {
  LDS(float, books, BOOKS);
  const int first = (blockIdx.x * WAVES + wave()) * ROWS;
  const int64_t slot = (int64_t)blockIdx.z * gridDim.y + blockIdx.y;
  const int64_t offset = expert_offset(at, ids[slot], experts);
  float dot = not_a_number();
  if (offset >= 0) {
    const uint8_t* row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) row[r] = row_of(matrices + offset, first + r, rows, groups);
    dot = dot_rows(row, x + slot * groups * GROUP, groups, books);
  }
  const int mine = first + lane() / LANES;
  if (lane() % LANES == 0 && mine < rows) out[slot * rows + mine] = dot;
}
