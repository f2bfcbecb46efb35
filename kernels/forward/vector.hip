// The kernels between the matrices: norms, rotary embedding, the rotation of the MQ formats, activations and sums.
// Activations are f32, row-major, one row per token; the tables (cos, sin, signs) come from the host.
#include "rotate.h"

// out = x · weight / sqrt(mean(x²) + eps), over rows of n. One block per row.
KERNEL(BLOCK_THREADS) rmsnorm(float* __restrict__ out, const float* __restrict__ x, const float* __restrict__ weight, int n,
                              float eps) {
  LDS(float, scratch, BLOCK_THREADS / WAVE);
  const float* row = x + (int64_t)blockIdx.x * n;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) squares = fmaf(row[i], row[i], squares);
  const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / (float)n + eps);
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[(int64_t)blockIdx.x * n + i] = row[i] * scale * weight[i];
}

// Rotate-half RoPE in place on the first 2·half of each head's head_dim: pairs (i, i + half). x f32 [tokens, heads,
// head_dim]; cos, sin f32 [positions, half], read at row positions[t]. Grid (heads, tokens).
KERNEL(WAVE) rope(float* __restrict__ x, const float* __restrict__ cos, const float* __restrict__ sin,
                  const int32_t* __restrict__ positions, int head_dim, int half) {
  float* head = x + ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * head_dim;
  const int64_t at = (int64_t)positions[blockIdx.y] * half;
  for (int i = threadIdx.x; i < half; i += WAVE) {
    const float c = cos[at + i], s = sin[at + i], a = head[i], b = head[i + half];
    head[i] = a * c - b * s;
    head[i + half] = b * c + a * s;
  }
}

// out = rotate(x / scale), or x / scale where `rotated` is 0. x f32 [tokens, 256·groups], scale f32 [256·groups],
// signs f32 [2, 256]. Grid (groups, tokens).
KERNEL(WAVE) scale_rotate(float* __restrict__ out, const float* __restrict__ x, const float* __restrict__ scale,
                          const float* __restrict__ signs, int rotated) {
  const int column = blockIdx.x * GROUP + PER_LANE * lane();
  const int64_t at = (int64_t)blockIdx.y * gridDim.x * GROUP + column;
  float v[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] = x[at + j] / scale[column + j];
  if (rotated) rotate(v, signs);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) out[at + j] = v[j];
}

// out = rotate(silu(gate) ∘ up), or unrotated where `rotated` is 0; all f32 [runs, 256]. One block per run.
KERNEL(WAVE) silu_mul_rotate(float* __restrict__ out, const float* __restrict__ gate, const float* __restrict__ up,
                             const float* __restrict__ signs, int rotated) {
  const int64_t at = (int64_t)blockIdx.x * GROUP + PER_LANE * lane();
  float v[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] = silu_mul(gate[at + j], up[at + j]);
  if (rotated) rotate(v, signs);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) out[at + j] = v[j];
}

// h += x, elementwise over n.
KERNEL(BLOCK_THREADS) add(float* __restrict__ h, const float* __restrict__ x, int64_t n) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) h[i] += x[i];
}

// h f32 [tokens, n] += Σ weights[t, slot] · x[t, slot], in slot order. Grid (n / 256, tokens).
KERNEL(BLOCK_THREADS) combine(float* __restrict__ h, const float* __restrict__ x, const float* __restrict__ weights,
                              int slots, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t first = (int64_t)blockIdx.y * slots;
  if (i < n) {
    float sum = 0.0f;
    for (int s = 0; s < slots; s++) sum = fmaf(weights[first + s], x[(first + s) * n + i], sum);
    h[(int64_t)blockIdx.y * n + i] += sum;
  }
}

// Routing: s = sigmoid(logits); the `slots` experts of largest s + bias, ties to the lower index, in that order; their
// weights s / Σ s. logits f32 [tokens, experts]; ids i32 and weights f32 [tokens, slots]. One wave per token. Where fewer
// than `slots` scores are numbers, the other slots get id -1 and weight NaN. Each round takes the next score in the order
// (score descending, index ascending) behind the one it took before, so that no score has to be kept or marked.
KERNEL(WAVE) router_top_k(int32_t* __restrict__ ids, float* __restrict__ weights, const float* __restrict__ logits,
                          const float* __restrict__ bias, int experts, int slots) {
  const float* row = logits + (int64_t)blockIdx.x * experts;
  const int64_t first = (int64_t)blockIdx.x * slots;
  const float infinite = __int_as_float(0x7f800000);
  float last = infinite, total = 0.0f;
  int last_id = -1;
  for (int slot = 0; slot < slots; slot++) {
    float best = -infinite;
    int best_id = experts;
    for (int e = lane(); e < experts; e += WAVE) {
      const float score = 1.0f / (1.0f + expf(-row[e])) + bias[e];
      const bool left = score < last || (score == last && e > last_id);
      if (left && (score > best || best_id == experts)) {
        best = score;
        best_id = e;
      }
    }
    for (int mask = WAVE / 2; mask > 0; mask /= 2) {
      const float score = __shfl_xor(best, mask);
      const int id = __shfl_xor(best_id, mask);
      if (id < experts && (best_id == experts || score > best || (score == best && id < best_id))) {
        best = score;
        best_id = id;
      }
    }
    const bool found = best_id < experts;
    const float weight = found ? 1.0f / (1.0f + expf(-row[best_id])) : not_a_number();
    total += weight;
    if (lane() == 0) {
      ids[first + slot] = found ? best_id : -1;
      weights[first + slot] = weight;
    }
    last = best;
    last_id = best_id;
  }
  __syncthreads();
  for (int slot = lane(); slot < slots; slot += WAVE) weights[first + slot] /= total;
}
