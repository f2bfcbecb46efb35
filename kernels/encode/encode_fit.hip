// Rounding under a group's Hessian, with the bits of lloyd/codes/, lloyd/levels/refit.py and lloyd/dense/:
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

// For a dense H, `sums` holds sums over its rows: of a codebook f32 [groups of the launch, count, LEVELS, 256], those of the
// columns of each code; of a grid f32 [count, 256·groups], H · codes.
constexpr int KEPT = GRID ? 1 : LEVELS;
DEVICE int64_t sums_of(int row, int count, int64_t at) {
  return GRID ? at : ((int64_t)blockIdx.y * count + row) * KEPT * GROUP;
}

// turned += sign · H · (what a row stands for), given its sums, and H · 1 in `ones`.
DEVICE void add_decoded(float (&turned)[PER_LANE], float sign, const float* param, const float* sums, const float* ones) {
  float v[PER_LANE];
  if (GRID) {
    load_group(v, ones);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) turned[j] = fmaf(sign * param[0], v[j], turned[j]);
  }
#pragma unroll
  for (int k = 0; k < KEPT; k++) {
    load_group(v, sums + k * GROUP);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) turned[j] = fmaf(sign * param[GRID ? 1 : k], v[j], turned[j]);
  }
}

// Where the pull H · (rows - levels) comes from: from channel weights; from sums, with H · rows in `turned`; or it is `turned`.
constexpr int FROM_WEIGHTS = 0, FROM_SUMS = 1;

// Sweeps of coordinate descent: each column takes the level that is best given all others. Targets are shifted by `share` of
// the row's error under H, up or down as signs f32 [sweeps, 256] say. `matrix` is H, `inverse` f32 [256] holds 1 / H_cc. `from`
// says where the pull comes from; but from weights, left_over f32 [count, 256·groups] gets what it is in the end.
// A wave has a row, and its lane t columns 8t .. 8t+7. All lanes look for the next column that moves, so that columns that
// stay cost little. Which of a lane's eight it is, is a branch that the whole wave takes: registers have no index.
KERNEL(DESCENT_THREADS) descend(uint8_t* __restrict__ codes, float* __restrict__ left_over, const float* __restrict__ rows,
                                const float* __restrict__ params, const float* __restrict__ matrix,
                                const float* __restrict__ inverse, const float* __restrict__ weights,
                                const float* __restrict__ turned, const float* __restrict__ sums,
                                const float* __restrict__ ones, const float* __restrict__ rotation,
                                const float* __restrict__ signs, int from, int sweeps, float share, int count,
                                int groups, int first) {
  LDS(float, spread, DESCENT_WAVES * 2 * GROUP);
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
  if (from != FROM_WEIGHTS) {
    load_group(c.pull, turned + at);
    if (from == FROM_SUMS) add_decoded(c.pull, -1.0f, param, sums + sums_of(row, count, at), ones + group * GROUP);
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
  float total = 0.0f;
  if (from != FROM_WEIGHTS) {
    float* mine = spread + wave() * 2 * GROUP;
    store_group(mine, error);
    store_group(mine + GROUP, c.pull);
    __syncthreads();
    total = dot_in_parts(mine, mine + GROUP);
  } else {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) total = fmaf(error[j], c.pull[j], total);
    total = wave_sum(total);
  }
  const float energy = total * (1.0f / (float)GROUP);
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
  if (r >= count) return;
  store_codes(codes + at + PER_LANE * t, c.code);
  if (from != FROM_WEIGHTS) store_group(left_over + at, c.pull);
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

// Solves for new levels, sorts them, and renumbers the codes; rank[k] is what level k has become. `system` holds gram and rhs: row
// k begins at k · (LEVELS + 1), and rhs is its last element.
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

// Lets a row's sums follow the columns whose code was `old` and is `now`, both u8 [256] in LDS, ascending; or adds all columns up,
// which for a grid is not asked: code LEVELS / 2, which most have, then gets what the others leave of `ones`, H · 1. Codes of 32
// columns are looked at together, so that the waves of a multiprocessor read about the same rows of H at a time, and no wave
// branches for an addition.
DEVICE void follow(float (&sums)[KEPT][PER_LANE], const float* h, const float* ones, const uint8_t* old, const uint8_t* now,
                   bool all) {
  constexpr int MOST = LEVELS / 2;
  for (int at = 0; at < GROUP; at += WAVE) {
    const int code = now[at + lane()], was = all ? LEVELS : old[at + lane()];
    const float* lines = h + at * GROUP;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
      if (!GRID && all && k == MOST) continue;
      const uint32_t into = lanes_where(code != was && (GRID || code == k));
      uint32_t left = GRID ? into : into | lanes_where(code != was && was == k);
      while (left) {
        const int one = first_bit(left);
        left &= left - 1;
        const bool more = left != 0;
        const int two = more ? first_bit(left) : one;
        left &= left - 1;
        float a[PER_LANE], b[PER_LANE];
        load_group(a, lines + one * GROUP);
        load_group(b, lines + two * GROUP);
        const float step = GRID ? (float)__shfl(code - was, one) : into >> one & 1 ? 1.0f : -1.0f;
        const float next = GRID ? (float)__shfl(code - was, two) : into >> two & 1 ? 1.0f : -1.0f;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) sums[k][j] = fmaf(step, a[j], sums[k][j]);
        if (more) {
#pragma unroll
          for (int j = 0; j < PER_LANE; j++) sums[k][j] = fmaf(next, b[j], sums[k][j]);
        }
      }
    }
  }
  if constexpr (!GRID) {
    if (!all) return;
    load_group(sums[MOST], ones);
#pragma unroll
    for (int k = 0; k < LEVELS; k++) {
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) {
        if (k != MOST) sums[MOST][j] = sums[MOST][j] - sums[k][j];
      }
    }
  }
}

// Of rows whose codes were fitted under another H: their sums, those of a grid given, `before` as refit_dense reads it, and
// pulled = H · y of the targets y that have the pulls given. Shapes are those of refit_dense.
KERNEL(REFIT_THREADS) begin_again(float* __restrict__ sums, float* __restrict__ pulled, uint8_t* __restrict__ before,
                                  const float* __restrict__ params, const uint8_t* __restrict__ codes,
                                  const float* __restrict__ pulls, const float* __restrict__ matrix,
                                  const float* __restrict__ ones, int count, int groups, int first) {
  LDS(uint8_t, letters, DENSE_WAVES* GROUP);
  const int group = first + blockIdx.y, r = blockIdx.x * DENSE_WAVES + wave(), t = lane();
  const int64_t row = min(r, count - 1), at = (row * groups + group) * GROUP;
  const Codes mine = load_codes(codes + at + PER_LANE * t);
  float* own = sums + sums_of(row, count, at);
  if constexpr (!GRID) {
    uint8_t* now = letters + wave() * GROUP;
    *reinterpret_cast<Codes*>(now + PER_LANE * t) = mine;
    __syncthreads();
    float kept[KEPT][PER_LANE] = {};
    follow(kept, matrix + (int64_t)group * SQUARE, ones + group * GROUP, now, now, true);
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
      if (r < count) store_group(own + k * GROUP, kept[k]);
    }
  }
  if (r >= count) return;
  float turned[PER_LANE];
  load_group(turned, pulls + at);
  add_decoded(turned, 1.0f, params + (row * groups + group) * PARAMS, own, ones + group * GROUP);
  store_group(pulled + at, turned);
  *reinterpret_cast<Codes*>(before + at + PER_LANE * t) = mine;
}

// Element `entry` of what a codebook's refit solves: first the lower gram row by row, then the right side.
DEVICE void place_of(int entry, int& k, int& m) {
  k = 0;
  m = entry;
  while (k < LEVELS && m > k) m -= ++k;
}

// New levels under a dense H: pulled f32 [count, 256·groups] holds H·y. `sums` are those of the codes `before`, and follow those
// that have moved since; where they are to be `fresh`, those of a codebook are added up, and those of a grid given. Sums over
// columns are taken in parts. A wave per row.
KERNEL(REFIT_THREADS) refit_dense(float* __restrict__ params, uint8_t* __restrict__ codes, float* __restrict__ sums,
                                  uint8_t* __restrict__ before, const float* __restrict__ pulled,
                                  const float* __restrict__ matrix, const float* __restrict__ totals,
                                  const float* __restrict__ ones, int fresh, int count, int groups, int first) {
  LDS(float, shared, DENSE_WAVES* DENSE_COLUMNS* COLUMN);
  LDS(float, systems, DENSE_WAVES* PARAMS*(PARAMS + 1));
  LDS(int, ranks, DENSE_WAVES* PARAMS);
  LDS(uint8_t, letters, DENSE_WAVES* 2 * GROUP);
  const int group = first + blockIdx.y, r = blockIdx.x * DENSE_WAVES + wave(), t = lane();
  const int64_t row = min(r, count - 1), at = (row * groups + group) * GROUP;
  float* param = params + (row * groups + group) * PARAMS;
  float* columns = shared + wave() * DENSE_COLUMNS * COLUMN;
  uint8_t* letter = letters + wave() * 2 * GROUP;
  float* own = sums + sums_of(row, count, at);
  float v[PER_LANE], kept[KEPT][PER_LANE] = {};
  const Codes mine = load_codes(codes + at + PER_LANE * t);
  *reinterpret_cast<Codes*>(letter + PER_LANE * t) = mine;
  if (!fresh) *reinterpret_cast<Codes*>(letter + GROUP + PER_LANE * t) = load_codes(before + at + PER_LANE * t);
  if (GRID || !fresh) {
#pragma unroll
    for (int k = 0; k < KEPT; k++) load_group(kept[k], own + k * GROUP);
  }
  load_group(v, pulled + at);
  store_group(columns + KEPT * COLUMN, v);
  __syncthreads();
  if (!(GRID && fresh)) {
    follow(kept, matrix + (int64_t)group * SQUARE, ones + group * GROUP, letter + GROUP, letter, fresh != 0);
  }
#pragma unroll
  for (int k = 0; k < KEPT; k++) store_group(columns + k * COLUMN, kept[k]);
  if constexpr (GRID) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) v[j] = (float)code_of(mine, j);
    store_group(columns + 2 * COLUMN, v);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) v[j] = 1.0f;
    store_group(columns + 3 * COLUMN, v);
    __syncthreads();
    // The halves of the wave sum H·y · 1 and H·codes · 1, then H·y · codes and H·codes · codes.
    const float* turned = columns + (t < PARTS ? COLUMN : 0);
    const float by_one = dot_in_parts(turned, columns + 3 * COLUMN), by_code = dot_in_parts(turned, columns + 2 * COLUMN);
    const float b0 = __shfl(by_one, 0), g10 = __shfl(by_one, PARTS), b1 = __shfl(by_code, 0), g11 = __shfl(by_code, PARTS);
    refit_grid(param, totals[group], g10, g11, b0, b1, r < count);
    if (r >= count) return;
    store_group(own, kept[0]);
    *reinterpret_cast<Codes*>(before + at + PER_LANE * t) = mine;
  } else {
    float* system = systems + wave() * PARAMS * (PARAMS + 1);
    int* rank = ranks + wave() * LEVELS;
    __syncthreads();
    constexpr int ENTRIES = LEVELS * (LEVELS + 3) / 2;
    for (int base = 0; base < ENTRIES; base += WAVE / PARTS) {
      const int entry = base + t / PARTS;
      int k, m;
      place_of(min(entry, ENTRIES - 1), k, m);
      const float* column = columns + k * COLUMN;
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < GROUP; i += PARTS) {
        part = part + (letter[i + t % PARTS] == m ? column[i + t % PARTS] : 0.0f);
      }
      part = join_parts(part);
      if (t % PARTS == 0 && entry < ENTRIES) system[k < LEVELS ? k * (LEVELS + 1) + m : m * (LEVELS + 1) + LEVELS] = part;
    }
    __syncthreads();
    refit_book(param, codes + at, system, rank, r < count);
    if (r >= count) return;
#pragma unroll
    for (int k = 0; k < KEPT; k++) store_group(own + rank[k] * GROUP, kept[k]);
    int code[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) code[j] = rank[code_of(mine, j)];
    store_codes(before + at + PER_LANE * t, code);
  }
}
