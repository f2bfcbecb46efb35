// Rounding under a group's Hessian, with the bits of lloyd/codes/feedback.py, lloyd/codes/descent.py and lloyd/levels/refit.py:
// error feedback, coordinate descent, and the levels that fit the codes of a row best.
//
// rows f32 [count, 256·groups], codes u8 of the same shape, params f32 [count, groups, PARAMS]; per group `matrix` and
// `feedback` f32 [256, 256], `weights` f32 [256]. Grids are (tiles or blocks of rows, groups from `first` on).
#include "encode_levels.h"

// Rounds every column in turn, and moves the targets of the later ones by its error.
KERNEL(WAVE) feedback(uint8_t* __restrict__ codes, const float* __restrict__ rows, const float* __restrict__ params,
                      const float* __restrict__ factors, int count, int groups, int first) {
  LDS(float, work, GROUP* PITCH);
  LDS(Quad, panel, 2 * GROUP);
  const int group = first + blockIdx.y, tile = blockIdx.x * TILE, t = lane();
  const int64_t width = (int64_t)groups * GROUP;
  const float* factor = factors + (int64_t)group * SQUARE;
  for (int r = 0; r < TILE; r++) {
    const float* y = rows + min(tile + r, count - 1) * width + group * GROUP;
#pragma unroll
    for (int m = 0; m < GROUP / WAVE; m++) work[(t + WAVE * m) * PITCH + r] = y[t + WAVE * m];
  }
  const int64_t row = min(tile + t, count - 1);
  Levels<GRID> levels;
  load_levels(levels, params + (row * groups + group) * PARAMS);
  for (int at = 0; at < GROUP; at += PANEL) {
    __syncthreads();
    stage_panel(panel, factor, GROUP, at, at);
    __syncthreads();
    float target[PANEL], error[PANEL];
    int code[PANEL];
#pragma unroll
    for (int j = 0; j < PANEL; j++) target[j] = work[(at + j) * PITCH + t];
#pragma unroll
    for (int j = 0; j < PANEL; j++) {
      error[j] = target[j] - assign(levels, target[j], code[j]);
#pragma unroll
      for (int i = j + 1; i < PANEL; i++) {
        target[i] = fmaf(-panel[2 * (at + i) + j / 4].v[j % 4], error[j], target[i]);
      }
    }
#pragma unroll 4
    for (int i = at + PANEL; i < GROUP; i++) {
      float sum = work[i * PITCH + t];
      const Quad low = panel[2 * i], high = panel[2 * i + 1];
#pragma unroll
      for (int b = 0; b < 4; b++) sum = fmaf(-low.v[b], error[b], sum);
#pragma unroll
      for (int b = 0; b < 4; b++) sum = fmaf(-high.v[b], error[4 + b], sum);
      work[i * PITCH + t] = sum;
    }
    if (tile + t < count) store_codes(codes + row * width + group * GROUP + at, code);
  }
}

// The eight columns of a lane under descent: what they stand for and their codes, H · error, 1 / H_cc, and the shifts of their
// targets. Of a codebook, a column stays while its target lies beyond `low` and not beyond `high`, the midpoints around its
// level; bit j of `floors` says whether column j has a level below.
struct Columns {
  float now[PER_LANE], pull[PER_LANE], reciprocal[PER_LANE], shift[PER_LANE], low[PER_LANE], high[PER_LANE];
  int code[PER_LANE];
  uint32_t floors;
};

DEVICE float target_of(const Columns& c, int j) { return c.now[j] + c.pull[j] * c.reciprocal[j] + c.shift[j]; }

DEVICE void bound(Columns& c, const Levels<true>&, int) {}
DEVICE bool moves(const Columns& c, const Levels<true>& levels, int j) {
  int nearest;
  return assign(levels, target_of(c, j), nearest) != c.now[j];
}

template <class Book>
DEVICE void bound(Columns& c, const Book& levels, int j) {
  const float now = c.now[j], never = __int_as_float(0x7f800000);
  float low = never, high = never;
  bool floor = now != now;           // no number: such a column always moves
#pragma unroll
  for (int k = 0; k < LEVELS - 1; k++) {
    const bool below = levels.level[k] < now;
    low = below ? levels.mid[k] : low;
    floor = floor || below;
  }
#pragma unroll
  for (int k = LEVELS - 2; k >= 0; k--) high = levels.level[k + 1] > now ? levels.mid[k] : high;
  c.low[j] = low;
  c.high[j] = high;
  c.floors = floor ? c.floors | 1u << j : c.floors & ~(1u << j);
}

template <class Book>
DEVICE bool moves(const Columns& c, const Book&, int j) {
  const float target = target_of(c, j);
  return (target > c.low[j]) != ((c.floors >> j & 1) != 0) || target > c.high[j];
}

// What column j gives up as it takes its nearest level; it does so where `owner` says that it is this lane's turn.
DEVICE float take(Columns& c, const Levels<GRID>& levels, int j, bool owner) {
  int nearest;
  const float value = assign(levels, target_of(c, j), nearest), moved = c.now[j] - value;
  if (owner) {
    c.now[j] = value;
    c.code[j] = nearest;
    bound(c, levels, j);
  }
  return moved;
}

// Sweeps of coordinate descent: each column takes the level that is best given all others. Targets are shifted by `share` of
// the row's error under H, up or down as signs f32 [sweeps, 256] say. `matrix` is H, `inverse` f32 [256] holds 1 / H_cc. For
// a `dense` H, turned f32 [count, 256·groups] holds H·(rows - levels); otherwise it is not read, and H is that of `weights`.
// A wave has a row, and its lane t columns 8t .. 8t+7. All lanes look for the next column that moves, so that columns that
// stay cost little. Which of a lane's eight it is, is a branch that the whole wave takes: registers have no index.
KERNEL(DESCENT_THREADS) descend(uint8_t* __restrict__ codes, const float* __restrict__ rows,
                                const float* __restrict__ params, const float* __restrict__ matrix,
                                const float* __restrict__ inverse, const float* __restrict__ weights,
                                const float* __restrict__ turned, const float* __restrict__ rotation,
                                const float* __restrict__ signs, int dense, int sweeps, float share, int count, int groups,
                                int first) {
  const int group = first + blockIdx.y, r = blockIdx.x * DESCENT_WAVES + wave(), t = lane();
  const int64_t row = min(r, count - 1), at = (row * groups + group) * GROUP;
  const float* h = matrix + (int64_t)group * SQUARE;
  const float* param = params + (row * groups + group) * PARAMS;
  Levels<GRID> levels;
  load_levels(levels, param);
  const Codes before = load_codes(codes + at + PER_LANE * t);
  Columns c;
  c.floors = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    c.code[j] = code_of(before, j);
    c.now[j] = level_of(param, c.code[j]);
    bound(c, levels, j);
  }
  float error[PER_LANE];
  load_group(error, rows + at);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) error[j] = error[j] - c.now[j];
  if (dense) {
    load_group(c.pull, turned + at);
  } else {
    float factor[PER_LANE], sign[PER_LANE];
    load_group(sign, rotation + GROUP);
    load_group(factor, weights + group * GROUP);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) c.pull[j] = error[j] * sign[j];
    hadamard(c.pull);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) c.pull[j] = c.pull[j] * (factor[j] / (float)GROUP);
    hadamard(c.pull);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) c.pull[j] = c.pull[j] * sign[j];
  }
  float part = 0.0f;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) part = fmaf(error[j], c.pull[j], part);
  const float energy = wave_sum(part) * (1.0f / (float)GROUP);
  const float heat = share * sqrtf(energy > 0.0f && energy < MOST_ENERGY ? energy : 0.0f);
  load_group(c.reciprocal, inverse + group * GROUP);
  for (int sweep = 0; sweep < sweeps; sweep++) {
    load_group(c.shift, signs + sweep * GROUP);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) c.shift[j] = heat * c.shift[j];
    bool moved = false;
    uint32_t left = 0xff;            // columns of this lane that come after the one that moved last
    for (;;) {
      uint32_t open = 0;
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) open |= moves(c, levels, j) ? 1u << j : 0u;
      open &= left;
      const int owner = first_lane(open != 0);
      if (owner == WAVE) break;
      moved = true;
      const int j = first_bit((uint32_t)__shfl((int)open, owner));
      const float* line = h + (PER_LANE * owner + j) * GROUP;
      float step = 0.0f, eight[PER_LANE];
      load_eight(line, t, eight);
      switch (j) {
        case 0: step = take(c, levels, 0, t == owner); break;
        case 1: step = take(c, levels, 1, t == owner); break;
        case 2: step = take(c, levels, 2, t == owner); break;
        case 3: step = take(c, levels, 3, t == owner); break;
        case 4: step = take(c, levels, 4, t == owner); break;
        case 5: step = take(c, levels, 5, t == owner); break;
        case 6: step = take(c, levels, 6, t == owner); break;
        default: step = take(c, levels, 7, t == owner);
      }
      step = __shfl(step, owner);
#pragma unroll
      for (int n = 0; n < PER_LANE; n++) c.pull[n] = fmaf(eight[n], step, c.pull[n]);
      left = t < owner ? 0u : t > owner ? 0xffu : 0xffu << (j + 1) & 0xffu;
    }
    if (!moved && heat == 0.0f) break;
  }
  if (r < count) store_codes(codes + at + PER_LANE * t, c.code);
}

// Floats from one vector of 256 to the next in LDS: not a multiple of 32, so that eight vectors begin in different banks.
constexpr int COLUMN = GROUP + 4;
constexpr int WAVES = GRID ? GRID_WAVES : WAVE / LEVELS;
constexpr int ROW_WAVES = WAVE * WAVES;
constexpr int DENSE_COLUMNS = GRID ? 4 : LEVELS + 1;
constexpr int DENSE_WAVES = GRID ? GRID_WAVES : BOOK_WAVES;

// The end of a sum of products in the order of lloyd.levels.refit.weighted_dot: lane c of a quartet of lanes has summed
// elements c, c + 4, c + 8 … of the columns, and every lane gets the sum of the four.
DEVICE float join_chains(float chain) {
  chain = chain + __shfl_xor(chain, 1);
  return chain + __shfl_xor(chain, 2);
}

// Levels that solve gram · c = rhs, tied to the old levels by a ridge. Lane k < LEVELS has row k of the lower gram, its right
// side and its old level, and gets the new level; where a pivot is not positive, all lanes get the old ones.
DEVICE float solve(float (&a)[LEVELS], float rhs, float old) {
  const int k = lane();
  float trace = 0.0f;
#pragma unroll
  for (int m = 0; m < LEVELS; m++) trace = trace + __shfl(a[m], m);
  const float tie = trace * (RIDGE / (float)LEVELS), floor = tie * PIVOT_FLOOR;
  bool good = true;
  float z = fmaf(tie, old, rhs);
#pragma unroll
  for (int m = 0; m < LEVELS; m++) {
    float v = k == m ? a[m] + tie : a[m];
#pragma unroll
    for (int n = 0; n < m; n++) v = v - a[n] * __shfl(a[n], m);
    const float pivot = __shfl(v, m);
    const bool sound = pivot > floor;
    const float root = sqrtf(sound ? pivot : 1.0f);
    good = good && sound;
    a[m] = k == m ? root : v / root;
  }
#pragma unroll
  for (int m = 0; m < LEVELS; m++) {
    const float solved = __shfl(z / a[m], m);
    z = k == m ? solved : k > m ? z - a[m] * solved : z;
  }
#pragma unroll
  for (int m = LEVELS - 1; m >= 0; m--) {
    const float product = a[m] * z;
    float v = __shfl(z, m);
#pragma unroll
    for (int n = m + 1; n < LEVELS; n++) v = v - __shfl(product, n);
    const float solved = v / __shfl(a[m], m);
    z = k == m ? solved : z;
  }
  return good ? z : old;
}

// Solves for new levels, sorts them, and renumbers the codes. `system` holds gram and rhs: row k begins at k · (LEVELS + 1),
// and rhs is its last element.
DEVICE void refit_book(float* params, uint8_t* codes, const float* system, int* rank, bool live) {
  const int k = min(lane(), LEVELS - 1);
  float a[LEVELS];
#pragma unroll
  for (int m = 0; m < LEVELS; m++) a[m] = m <= k ? system[k * (LEVELS + 1) + m] : 0.0f;
  const float fitted = solve(a, system[k * (LEVELS + 1) + LEVELS], params[k]);
  int before = 0;
#pragma unroll
  for (int other = 0; other < LEVELS; other++) {
    const float v = __shfl(fitted, other);
    before += v < fitted || (v == fitted && other < k) ? 1 : 0;
  }
  if (lane() < LEVELS) rank[k] = before;
  __syncthreads();
  if (live && lane() < LEVELS) params[before] = fitted;
  const Codes old = load_codes(codes + PER_LANE * lane());
  int code[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) code[j] = rank[code_of(old, j)];
  if (live) store_codes(codes + PER_LANE * lane(), code);
}

// The zero and scale that solve the two equations of an evenly spaced grid.
DEVICE void refit_grid(float* params, float g00, float g10, float g11, float b0, float b1, bool live) {
  const float determinant = g00 * g11 - g10 * g10;
  const bool posed = determinant > POSED_FLOOR * g00 * g11;
  const float safe = posed ? determinant : 1.0f;
  const float zero = (b0 * g11 - b1 * g10) / safe, scale = (b1 * g00 - b0 * g10) / safe;
  if (live && lane() == 0 && posed && scale > 0.0f) {
    params[0] = zero;
    params[1] = scale;
  }
}

// The equation of level k takes k + 2 sums, in runs of four sums. Finds the level k of run number `run`, and its first sum s.
DEVICE void find_run(int run, int& k, int& s) {
  k = 0;
  for (int runs = 1; run >= runs && k < PARAMS - 1; runs = (k + 5) / 4) {
    run -= runs;
    k++;
  }
  s = 4 * run;
}

DEVICE constexpr int count_runs() {
  int runs = 0;
  for (int k = 0; k < PARAMS; k++) runs += (k + 5) / 4;
  return runs;
}

// New levels under a diagonal importance: the equations from transformed columns. A wave per row.
KERNEL(REFIT_THREADS) refit(float* __restrict__ params, uint8_t* __restrict__ codes, const float* __restrict__ rows,
                            const float* __restrict__ weights, const float* __restrict__ signs, int count, int groups,
                            int first) {
  LDS(float, shared, WAVES*(PARAMS + 1) * COLUMN);
  LDS(float, systems, WAVES* PARAMS*(PARAMS + 1));
  LDS(int, ranks, WAVES* PARAMS);
  LDS(float, weight, GROUP);
  const int group = first + blockIdx.y, r = blockIdx.x * WAVES + wave(), t = lane();
  const int64_t row = min(r, count - 1), at = (row * groups + group) * GROUP;
  float* columns = shared + wave() * (PARAMS + 1) * COLUMN;
  float* system = systems + wave() * PARAMS * (PARAMS + 1);
  for (int i = threadIdx.x; i < GROUP; i += ROW_WAVES) weight[i] = weights[group * GROUP + i];
  float sign[PER_LANE], v[PER_LANE];
  load_group(sign, signs + GROUP);
  load_group(v, rows + at);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) v[j] *= sign[j];
  hadamard(v);
  store_group(columns + PARAMS * COLUMN, v);
  const Codes mine = load_codes(codes + at + PER_LANE * t);
#pragma unroll
  for (int k = 0; k < PARAMS; k++) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      const int code = code_of(mine, j);
      v[j] = GRID ? (k ? sign[j] * (float)code : sign[j]) : (code == k ? sign[j] : 0.0f);
    }
    hadamard(v);
    store_group(columns + k * COLUMN, v);
  }
  __syncthreads();
  const int chain = t % 4;
  for (int base = 0; base < count_runs(); base += WAVE / 4) {
    const int run = base + t / 4;
    int k, s;
    find_run(min(run, count_runs() - 1), k, s);
    const float* own = columns + k * COLUMN + chain;
    const float* others[4];
    float sums[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      others[e] = columns + (s + e <= k ? s + e : PARAMS) * COLUMN + chain;
      sums[e] = 0.0f;
    }
#pragma unroll 8
    for (int i = 0; i < GROUP; i += 4) {
      const float weighed = weight[i + chain] * own[i];
#pragma unroll
      for (int e = 0; e < 4; e++) sums[e] = fmaf(weighed, others[e][i], sums[e]);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float sum = join_chains(sums[e]);
      if (chain == 0 && run < count_runs() && s + e <= k + 1) {
        system[k * (PARAMS + 1) + (s + e <= k ? s + e : PARAMS)] = sum;
      }
    }
  }
  __syncthreads();
  float* param = params + (row * groups + group) * PARAMS;
  const bool live = r < count;
  if constexpr (GRID) {
    refit_grid(param, system[0], system[3], system[4], system[2], system[5], live);
  } else {
    refit_book(param, codes + at, system, ranks + wave() * PARAMS, live);
  }
}

// columns[k] += the rows of H whose code is k, ascending. `letters` holds the codes. Codes of 32 columns are looked at together,
// so that the waves of a multiprocessor read about the same rows of H at a time, and no wave branches for an addition.
DEVICE void sum_by_code(float (&columns)[LEVELS][PER_LANE], const float* h, const uint8_t* letters) {
  for (int at = 0; at < GROUP; at += WAVE) {
    const int code = letters[at + lane()];
    const float* lines = h + at * GROUP;
#pragma unroll
    for (int k = 0; k < LEVELS; k++) {
      uint32_t left = lanes_where(code == k);
      while (left) {
        const int one = first_bit(left);
        left &= left - 1;
        const bool more = left != 0;
        const int two = more ? first_bit(left) : one;
        left &= left - 1;
        float a[PER_LANE], b[PER_LANE];
        load_group(a, lines + one * GROUP);
        load_group(b, lines + two * GROUP);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) columns[k][j] += a[j];
        if (more) {
#pragma unroll
          for (int j = 0; j < PER_LANE; j++) columns[k][j] += b[j];
        }
      }
    }
  }
}

// Element `entry` of what a codebook's refit solves: first the lower gram row by row, then the right side.
DEVICE void place_of(int entry, int& k, int& m) {
  k = 0;
  m = entry;
  while (k < LEVELS && m > k) m -= ++k;
}

// New levels under a dense H: pulled f32 [count, 256·groups] holds H·y. For a grid `turned` holds -H·codes, and totals f32
// [groups] the sums over H; for a codebook rows of H are summed by code. A wave per row.
KERNEL(REFIT_THREADS) refit_dense(float* __restrict__ params, uint8_t* __restrict__ codes, const float* __restrict__ pulled,
                                  const float* __restrict__ turned, const float* __restrict__ matrix,
                                  const float* __restrict__ totals, int count, int groups, int first) {
  LDS(float, shared, DENSE_WAVES* DENSE_COLUMNS* COLUMN);
  LDS(float, systems, DENSE_WAVES* PARAMS*(PARAMS + 1));
  LDS(int, ranks, DENSE_WAVES* PARAMS);
  LDS(uint8_t, letters, DENSE_WAVES* GROUP);
  const int group = first + blockIdx.y, r = blockIdx.x * DENSE_WAVES + wave(), t = lane();
  const int64_t row = min(r, count - 1), at = (row * groups + group) * GROUP;
  float* param = params + (row * groups + group) * PARAMS;
  float* columns = shared + wave() * DENSE_COLUMNS * COLUMN;
  float* ys = columns + PARAMS * COLUMN;
  float v[PER_LANE];
  const Codes mine = load_codes(codes + at + PER_LANE * t);
  load_group(v, pulled + at);
  store_group(ys, v);
  if constexpr (GRID) {
    load_group(v, turned + at);
    store_group(columns, v);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) v[j] = (float)code_of(mine, j);
    store_group(columns + COLUMN, v);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) v[j] = 1.0f;
    store_group(columns + 3 * COLUMN, v);
    __syncthreads();
    // The four quartets of lanes sum H·y · 1, H·y · codes, -H·codes · codes, and -H·codes · 1.
    const int pair = t / 4 % 4, chain = t % 4;
    const float* a = (pair < 2 ? ys : columns) + chain;
    const float* b = columns + (pair == 1 || pair == 2 ? 1 : 3) * COLUMN + chain;
    float sum = 0.0f;
    for (int i = 0; i < GROUP; i += 4) sum = fmaf(a[i], b[i], sum);
    sum = join_chains(sum);
    const float b0 = __shfl(sum, 0), b1 = __shfl(sum, 4), g11 = -__shfl(sum, 8), g10 = -__shfl(sum, 12);
    refit_grid(param, totals[group], g10, g11, b0, b1, r < count);
  } else {
    uint8_t* letter = letters + wave() * GROUP;
    float* system = systems + wave() * PARAMS * (PARAMS + 1);
    *reinterpret_cast<Codes*>(letter + PER_LANE * t) = mine;
    __syncthreads();
    float sums[LEVELS][PER_LANE] = {};
    sum_by_code(sums, matrix + (int64_t)group * SQUARE, letter);
#pragma unroll
    for (int k = 0; k < LEVELS; k++) store_group(columns + k * COLUMN, sums[k]);
    __syncthreads();
    for (int entry = t; entry < LEVELS * (LEVELS + 3) / 2; entry += WAVE) {
      int k, m;
      place_of(entry, k, m);
      const float* column = columns + k * COLUMN;
      float sum = 0.0f;
#pragma unroll 8
      for (int i = 0; i < GROUP; i++) sum = letter[i] == m ? sum + column[i] : sum;
      system[k < LEVELS ? k * (LEVELS + 1) + m : m * (LEVELS + 1) + LEVELS] = sum;
    }
    __syncthreads();
    refit_book(param, codes + at, system, ranks + wave() * LEVELS, r < count);
  }
}
