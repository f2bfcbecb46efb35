// Levels of a codebook: one-dimensional k-means of each group of a row, with the bits of lloyd/levels/kmeans.py. A wave has a
// row. Where the search is exact, the eight rows of a block search the union of their ranges of boundaries, as the eight
// lanes of the CPU do. All sums are f64, and taken in order.
#include "encode_levels.h"

constexpr int ROWS = KMEANS_ROWS;
constexpr int ENDS = GROUP + 1;
constexpr int SPAN = GROUP + 2;      // doubles from one row's sums to the next: the place of a row's values too, in 16 bytes
constexpr uint32_t SIGN = 0x80000000;

// One row's place in LDS, as both kernels use it.
struct Row {
  float* values;
  double* sums;
  const double* inverse;             // 1 / n
  int* bounds;
};

DEVICE double shuffle_xor(double v, int mask) {
  return __hiloint2double(__shfl_xor(__double2hiint(v), mask), __shfl_xor(__double2loint(v), mask));
}

DEVICE double shuffle(double v, int from) {
  return __hiloint2double(__shfl(__double2hiint(v), from), __shfl(__double2loint(v), from));
}

// Sorts 256 keys, element 8·lane + j in register j: a bitonic network.
DEVICE void sort_keys(uint32_t (&key)[PER_LANE]) {
#pragma unroll
  for (int size = 2; size <= GROUP; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      if (stride >= PER_LANE) {
        const int mask = stride / PER_LANE;
        const bool rising = (PER_LANE * lane() & size) == 0, upper = (lane() & mask) != 0;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
          const uint32_t other = __shfl_xor(key[j], mask);
          key[j] = (other < key[j]) == (rising != upper) ? other : key[j];
        }
      } else {
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
          if ((j & stride) == 0) {
            const bool rising = ((PER_LANE * lane() + j) & size) == 0;
            const uint32_t a = key[j], b = key[j | stride];
            const bool swap = (b < a) == rising;
            key[j] = swap ? b : a;
            key[j | stride] = swap ? a : b;
          }
        }
      }
    }
  }
}

DEVICE void sort_values(float* values, const float* group) {
  float v[PER_LANE];
  uint32_t key[PER_LANE];
  load_group(v, group);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    const uint32_t bits = __float_as_uint(v[j]);
    key[j] = bits & SIGN ? ~bits : bits | SIGN;
  }
  sort_keys(key);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    v[j] = __int_as_float((int)(key[j] & SIGN ? key[j] & ~SIGN : ~key[j]));
  }
  store_group(values, v);
}

// Running sums about the mean, which lane 0 returns.
DEVICE double prefix_sums(const float* values, double* sums) {
  double mean = 0.0;
#pragma unroll 8
  for (int i = 0; i < GROUP; i++) mean += (double)values[i];
  mean /= (double)GROUP;
  double sum = 0.0;
  sums[0] = 0.0;
#pragma unroll 8
  for (int i = 0; i < GROUP; i++) {
    sum = sum + ((double)values[i] - mean);
    sums[i + 1] = sum;
  }
  return mean;
}

DEVICE void lloyd_bounds(const Row& row, double mean, int iterations) {
  for (int step = 0; step < iterations; step++) {
    bool moved = false;
    for (int k = 1; k < LEVELS; k++) {
      const int low = row.bounds[k - 1], at = row.bounds[k], high = row.bounds[k + 1];
      const int left = at - low, right = high - at;
      if (left <= 0 || right <= 0) continue;
      const double below = (row.sums[at] - row.sums[low]) / (double)left;
      const double above = (row.sums[high] - row.sums[at]) / (double)right;
      const double mid = mean + 0.5 * (below + above);
      int b = at;
      while (b > low + 1 && (double)row.values[b - 1] > mid) b--;
      while (b < high - 1 && (double)row.values[b] <= mid) b++;
      moved = moved || b != at;
      row.bounds[k] = b;
    }
    if (!moved) return;
  }
}

// Compares two lanes that differ in bits `mask` of their numbers: both get the larger value, of equal values the lower place.
DEVICE void best_of(double& value, int& at, int mask) {
  const double other = shuffle_xor(value, mask);
  const int place = __shfl_xor(at, mask);
  const bool take = other > value || (other == value && place < at);
  value = take ? other : value;
  at = take ? place : at;
}

DEVICE void split_pairs(const Row& row, int sweeps) {
  for (int sweep = 0; sweep < sweeps; sweep++) {
    bool moved = false;
    for (int k = 1; k < LEVELS; k++) {
      const int left = row.bounds[k - 1], right = row.bounds[k + 1], was = row.bounds[k];
      const double from_left = row.sums[left], from_right = row.sums[right];
      double best = -1.0;
      int at = was;
      for (int b = left + 1 + lane(); b < right; b += WAVE) {
        const double d = row.sums[b] - from_left, e = from_right - row.sums[b];
        const double value = d * d * row.inverse[b - left] + e * e * row.inverse[right - b];
        if (value > best) {
          best = value;
          at = b;
        }
      }
#pragma unroll
      for (int mask = 1; mask < WAVE; mask *= 2) best_of(best, at, mask);
      moved = moved || at != was;
      sync_wave();
      if (lane() == 0) row.bounds[k] = at;
      sync_wave();
    }
    if (!moved) return;
  }
}

// Sorts a row and finds the partition from which both searches start; returns the mean to every lane.
DEVICE double start(const Row& row, const float* group, const int32_t* quantiles) {
  sort_values(row.values, group);
  sync_wave();
  double mean = 0.0;
  if (lane() == 0) {
    mean = prefix_sums(row.values, row.sums);
    for (int k = 0; k <= LEVELS; k++) row.bounds[k] = quantiles[k];
    lloyd_bounds(row, mean, LLOYD_STEPS);
  }
  sync_wave();
  mean = shuffle(mean, 0);
  split_pairs(row, PAIR_SWEEPS);
  sync_wave();
  return mean;
}

DEVICE void centroids(float* levels, const Row& row, double mean) {
  float last = row.values[0] + 0.0f;
  for (int k = 0; k < LEVELS; k++) {
    const int n = row.bounds[k + 1] - row.bounds[k];
    float level = last;
    if (n > 0) {
      level = (float)(mean + (row.sums[row.bounds[k + 1]] - row.sums[row.bounds[k]]) * row.inverse[n]);
    }
    if (k > 0) level = last > level ? last : level;
    levels[k] = level;
    last = level;
  }
}

// params f32 [count, groups, LEVELS] of rows f32 [count, 256·groups], for the groups listed in `chosen`; quantiles i32
// [LEVELS + 1] is where Lloyd iterations start. The search ends at a partition of which no single boundary can be improved.
// Grid (rows / 8, groups chosen).
KERNEL(KMEANS_THREADS) kmeans_pairs(float* __restrict__ params, const float* __restrict__ rows,
                                    const int32_t* __restrict__ chosen, const int32_t* __restrict__ quantiles, int count,
                                    int groups) {
  LDS(float, values, ROWS* GROUP);
  LDS(double, sums, ROWS* SPAN);
  LDS(double, inverse, ENDS);
  LDS(int, bounds, ROWS*(LEVELS + 1));
  const int w = wave(), r = blockIdx.x * ROWS + w;
  const int64_t at = (int64_t)min(r, count - 1) * groups + chosen[blockIdx.y];
  for (int n = threadIdx.x; n < ENDS; n += ROWS * WAVE) inverse[n] = n ? 1.0 / (double)n : 0.0;
  __syncthreads();
  const Row row{values + w * GROUP, sums + w * SPAN, inverse, bounds + w * (LEVELS + 1)};
  const double mean = start(row, rows + at * GROUP, quantiles);
  if (r < count && lane() == 0) centroids(params + at * LEVELS, row, mean);
}

// Where the last interval of prefix `end` starts best, among low … high (in `at`), and what all intervals then explain. `share`
// lanes divide the places among them, and each returns the best of its own.
DEVICE double scan(const double* sums, const double* previous, const double* inverse, int end, int low, int high,
                   int share, int& at) {
  const double total = sums[end];
  double best = -1.0;
  at = low;
#pragma unroll 2
  for (int j = low + lane() % share; j <= high; j += share) {
    const double d = total - sums[j], value = fma(d * d, inverse[end - j], previous[j]);
    if (value > best) {
      best = value;
      at = j;
    }
  }
  return best;
}

// As kmeans_pairs, by dynamic programming from there. `energies` f64 [blocks, 8, 2, 257] and `paths` u8 [blocks, LEVELS, 8,
// 256] are scratch.
KERNEL(KMEANS_THREADS) kmeans_exact(float* __restrict__ params, double* __restrict__ energies, uint8_t* __restrict__ paths,
                                    const float* __restrict__ rows, const int32_t* __restrict__ chosen,
                                    const int32_t* __restrict__ quantiles, int count, int groups) {
  LDS(double, all_sums, ROWS* SPAN);
  LDS(double, all_previous, ROWS* SPAN);
  LDS(double, inverse, ENDS);
  LDS(int, bounds, ROWS*(LEVELS + 1));
  LDS(uint8_t, starts, ROWS* GROUP);
  LDS(uint8_t, within, ROWS* GROUP);
  LDS(uint8_t, least, GROUP);
  LDS(uint8_t, most, GROUP);
  LDS(int, limits, ROWS + 1);
  const int w = wave(), t = lane(), r = blockIdx.x * ROWS + w;
  const int64_t at = (int64_t)min(r, count - 1) * groups + chosen[blockIdx.y];
  const int64_t block = (int64_t)blockIdx.y * gridDim.x + blockIdx.x;
  double* energy = energies + (block * ROWS + w) * 2 * ENDS;
  double* kept = energy + ENDS;
  uint8_t* path = paths + block * LEVELS * ROWS * GROUP + w * GROUP;
  double *sums = all_sums + w * SPAN, *previous = all_previous + w * SPAN;
  for (int n = threadIdx.x; n < ENDS; n += ROWS * WAVE) inverse[n] = n ? 1.0 / (double)n : 0.0;
  __syncthreads();
  // The sorted values lie where the first layer will.
  const Row row{reinterpret_cast<float*>(previous), sums, inverse, bounds + w * (LEVELS + 1)};
  const double mean = start(row, rows + at * GROUP, quantiles);
  const float smallest = row.values[0];
  double bound = 0.0;
  if (t == 0) {
    double explained = 0.0, running = 0.0;
    for (int k = 0; k < LEVELS; k++) {
      const double d = sums[row.bounds[k + 1]] - sums[row.bounds[k]];
      explained += d * d * inverse[row.bounds[k + 1] - row.bounds[k]];
    }
    energy[0] = 0.0;
    for (int i = 0; i < GROUP; i++) {
      const double d = (double)row.values[i] - mean;
      running = running + d * d;
      energy[i + 1] = running;
    }
    bound = running - explained + BOUND_SLACK * running;
  }
  bound = shuffle(bound, 0);
  __syncthreads();
  int reach = 0;
  for (int i = 1 + t; i < ENDS; i += WAVE) {
    const double s = sums[i], explained = s * s * inverse[i];
    previous[i] = explained;
    if (energy[i] - explained <= bound) reach = i;
  }
  if (t == 0) previous[0] = 0.0;
#pragma unroll
  for (int mask = 1; mask < WAVE; mask *= 2) {
    const int other = __shfl_xor(reach, mask);
    reach = other > reach ? other : reach;
  }
  if (t == 0) limits[w] = reach;
  __syncthreads();
  for (int other = 0; other < ROWS; other++) reach = limits[other] > reach ? limits[other] : reach;

  constexpr int LAST = GROUP - 1;
  for (int k = 1; k < LEVELS - 1; k++) {
    int start_of = 0;
    double last = scan(sums, previous, inverse, LAST, 0, min(LAST - 1, reach), WAVE, start_of);
#pragma unroll
    for (int mask = 1; mask < WAVE; mask *= 2) best_of(last, start_of, mask);
    if (t == 0) {
      starts[w * GROUP + LAST] = (uint8_t)start_of;
      starts[w * GROUP] = 0;
    }
    if (threadIdx.x == 0) {
      least[0] = 0;
      most[0] = 0;
      limits[ROWS] = GROUP;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int low = GROUP, high = 0;
      for (int other = 0; other < ROWS; other++) {
        const int s = starts[other * GROUP + LAST];
        low = min(low, s);
        high = s > high ? s : high;
      }
      least[LAST] = (uint8_t)low;
      most[LAST] = (uint8_t)high;
    }
    // Results go to `kept` until the layer is done, since it still reads those of the layer before.
#pragma unroll 1
    for (int level = 0; level < GROUP_BITS; level++) {
      const int stride = GROUP / 2 >> level, ends = 1 << level, share = ends < WAVE ? WAVE / ends : 1;
      __syncthreads();
      const int cut = limits[ROWS];
#pragma unroll 1
      for (int n = t / share; n < ends; n += WAVE) {
        const int end = stride * (2 * n + 1);
        const bool live = end < min(LAST, cut);
        const int upper = min(end + stride, LAST);
        int high = live ? (upper < cut ? most[upper] : reach) : -1;
        high = min(min(high, end - 1), reach);
        const int low = live ? min((int)least[end - stride], high) : 0;
        int place;
        double best = scan(sums, previous, inverse, end, low, high, share, place);
        for (int mask = 1; mask < share; mask *= 2) best_of(best, place, mask);
        if (live && t % share == 0) {
          kept[end] = best;
          starts[w * GROUP + end] = (uint8_t)place;
          within[w * GROUP + end] = energy[end] - best <= bound;
        }
      }
      __syncthreads();
      if (w == 0) {
        int first = GROUP;
        for (int n = t; n < ends; n += WAVE) {
          const int end = stride * (2 * n + 1);
          if (end < min(LAST, cut)) {
            int low = GROUP, high = 0, found = 0;
            for (int other = 0; other < ROWS; other++) {
              const int s = starts[other * GROUP + end];
              low = min(low, s);
              high = s > high ? s : high;
              found |= within[other * GROUP + end];
            }
            least[end] = (uint8_t)low;
            most[end] = (uint8_t)high;
            if (!found) first = min(first, end);
          }
        }
#pragma unroll
        for (int mask = 1; mask < WAVE; mask *= 2) first = min(first, __shfl_xor(first, mask));
        if (t == 0 && first < cut) limits[ROWS] = first;
      }
    }
    __syncthreads();
    const int cut = limits[ROWS];
    reach = cut < GROUP ? cut - 1 : LAST;
    for (int end = 1 + t; end < min(LAST, cut); end += WAVE) previous[end] = kept[end];
    if (t == 0) {
      previous[0] = 0.0;
      previous[LAST] = last;
    }
#pragma unroll
    for (int n = 0; n < GROUP / WAVE; n++) {
      path[k * ROWS * GROUP + t + WAVE * n] = starts[w * GROUP + t + WAVE * n];
    }
    __syncthreads();
  }
  int place;
  double best = scan(sums, previous, inverse, GROUP, 0, min(GROUP - 1, reach), WAVE, place);
#pragma unroll
  for (int mask = 1; mask < WAVE; mask *= 2) best_of(best, place, mask);
  if (t == 0) {
    row.bounds[LEVELS] = GROUP;
    row.bounds[LEVELS - 1] = place;
    for (int k = LEVELS - 2; k > 0; k--) row.bounds[k] = path[k * ROWS * GROUP + row.bounds[k + 1]];
    row.bounds[0] = 0;
    row.values[0] = smallest;
    if (r < count) centroids(params + at * LEVELS, row, mean);
  }
}
