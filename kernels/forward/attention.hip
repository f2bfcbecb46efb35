// Attention over a key-value cache. The softmax is updated chunk by chunk of the keys, so that scores need no memory and a
// context may have any length. All values are f32; a cache is [capacity, kv_heads · head_dim], and row p is that of the token
// at position p.
#include "device.h"
#include "forward_constants.h"    // made by geometry.py

constexpr int THREADS = ATTENTION_THREADS;
constexpr int COLUMNS = MAX_HEAD_DIM / THREADS;    // columns of the output that a thread sums, at most

// Writes k, v f32 [tokens, n] into row positions[t] of the caches. Grid (n / 256, tokens).
KERNEL(BLOCK_THREADS) kv_append(float* __restrict__ k_cache, float* __restrict__ v_cache, const float* __restrict__ k,
                                const float* __restrict__ v, const int32_t* __restrict__ positions, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    const int64_t from = (int64_t)blockIdx.y * n + i, to = (int64_t)positions[blockIdx.y] * n + i;
    k_cache[to] = k[from];
    v_cache[to] = v[from];
  }
}

// out f32 [tokens, heads, head_dim]: softmax(scale · q · Kᵀ) · V over rows 0 .. positions[t] of the caches; head h reads
// key-value head h / (heads / kv_heads); head_dim is a multiple of 4. Grid (heads, tokens). A thread scores one key of a
// chunk, then sums columns.
KERNEL(ATTENTION_THREADS) attention(float* __restrict__ out, const float* __restrict__ q, const float* __restrict__ k_cache,
                                    const float* __restrict__ v_cache, const int32_t* __restrict__ positions, int kv_heads,
                                    int head_dim, float scale) {
  LDS(float, query, MAX_HEAD_DIM);
  LDS(float, weight, THREADS);
  LDS(float, scratch, THREADS / WAVE);
  const int tid = threadIdx.x, heads = gridDim.x;
  const int keys = positions[blockIdx.y] + 1;
  const int stride = kv_heads * head_dim;
  const int64_t column = (int64_t)(blockIdx.x / (heads / kv_heads)) * head_dim;
  const int64_t at = ((int64_t)blockIdx.y * heads + blockIdx.x) * head_dim;
  const float infinite = __int_as_float(0x7f800000);
  for (int d = tid; d < head_dim; d += THREADS) query[d] = q[at + d];
  __syncthreads();

  float most = -infinite, total = 0.0f, sum[COLUMNS] = {};
  for (int first = 0; first < keys; first += THREADS) {
    float score = -infinite;
    if (first + tid < keys) {
      const float* key = k_cache + (int64_t)(first + tid) * stride + column;
      score = 0.0f;
#pragma unroll 8
      for (int d = 0; d < head_dim; d += 4) {
        const Quad part = *reinterpret_cast<const Quad*>(key + d);
#pragma unroll
        for (int j = 0; j < 4; j++) score = fmaf(query[d + j], part.v[j], score);
      }
      score *= scale;
    }
    const float now = fmaxf(most, block_max(score, scratch));
    const float shrink = expf(most - now);
    const float p = expf(score - now);
    total = total * shrink + block_sum(p, scratch);
    weight[tid] = p;    // the barriers of block_sum lie between this and the reads of the chunk before
    __syncthreads();
    const int count = min(THREADS, keys - first);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const int d = tid + c * THREADS;
      if (d < head_dim) {
        const float* value = v_cache + (int64_t)first * stride + column + d;
        float part = 0.0f;
#pragma unroll 8
        for (int i = 0; i < count; i++) part = fmaf(weight[i], value[(int64_t)i * stride], part);
        sum[c] = fmaf(sum[c], shrink, part);
      }
    }
    most = now;
  }
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    const int d = tid + c * THREADS;
    if (d < head_dim) out[at + d] = sum[c] / total;
  }
}
