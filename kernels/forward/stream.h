// Experts' rows through LDS, for GPUs whose header defines MQ_COPY. What a launch multiplies is one list of tiles: for each slot
// the rows of its expert's matrices, some at a time. The blocks, one for each multiprocessor, take equal shares of the list.
// One wave of a block copies: tiles go to the stages of a ring, one after the other, as far ahead as the ring is long. Most waves
// multiply: they form teams that take tiles in turns, and a wave of a team multiplies at most SHARE groups of a run of ROWS rows.
// The last wave adds up what they have made of a tile. x lies in LDS, some rows of it where there is room.
// The copies begin before the kernel before this one has ended. What a multiprocessor asks for comes in turns, x behind the rows
// that were asked for before it: so few of them are asked for before it, and later no more are under way than memory needs.
#pragma once
#include "bits.h"
#include "bytes.h"
#include "forward_constants.h"    // made by geometry.py
#include "rotate.h"

// What a launch multiplies: for each of `slots` slots MATRICES matrices [rows, 256 · groups] of its expert. Expert e's lie at
// at[m][e] bytes of matrices[m], or at -1; `per_x` slots that follow one another share a row of x.
template <int MATRICES>
struct Job {
  const uint8_t* matrices[MATRICES];
  const int64_t* at[MATRICES];
  float* out[MATRICES];
  const int32_t* ids;
  int experts, rows, groups, slots, per_x;

  // A slot's matrix, or null where the id is out of range or that expert is not loaded.
  DEVICE_MEMBER const uint8_t* matrix(int m, int slot) const {
    const int id = fetch_new(ids + slot);
    const int64_t offset = id >= 0 && id < experts ? fetch_new((m ? at[MATRICES - 1] : at[0]) + id) : -1;
    return offset < 0 ? nullptr : (m ? matrices[MATRICES - 1] : matrices[0]) + offset;
  }

  DEVICE_MEMBER float* row(int m, int slot) const { return (m ? out[MATRICES - 1] : out[0]) + (int64_t)slot * rows; }
};

// How the rows of a format are multiplied by tiles, where they are.
template <class Format, class = void>
struct Tiled {
  static constexpr int STAGE = 0, X_WORDS = 1;
};
#ifdef MQ_COPY
template <class DotOfFormat, class Format>
struct TiledBy {
  using Dot = DotOfFormat;
  using Weights = Format;
  static constexpr int STAGE = Dot::STAGE, X_WORDS = Dot::X_GROUPS * STAGE;    // of a group of x, of x in LDS
};
template <class Format>
struct Tiled<Format, decltype((void)sizeof(typename Format::Counted))>
    : TiledBy<BitDot<typename Format::Counted>, typename Format::Counted> {};
template <class Format>
struct Tiled<Format, decltype((void)sizeof(typename Format::Bytes))>
    : TiledBy<ByteDot<typename Format::Bytes>, typename Format::Bytes> {};

// Rows of x as they lie in memory.
template <class Dot>
struct Given {
  static constexpr int AT_FIRST = Dot::AT_FIRST;
  const float* x;
  DEVICE_MEMBER void stage(int64_t group, float* staged) const {
    float v[PER_LANE];
    Dot::load_x(x + group * GROUP, lane(), v);
    Dot::stage(staged, v);
  }
};

// Rows of x that are made of rows of gate and up: silu(gate) ∘ up, rotated if asked.
template <class Dot>
struct Activated {
  static constexpr int AT_FIRST = Dot::AT_FIRST_ACTIVATED;
  const float *gate, *up, *signs;
  int rotated;
  DEVICE_MEMBER void stage(int64_t group, float* staged) const {
    float v[PER_LANE], u[PER_LANE], before[PER_LANE], after[PER_LANE];    // all are under way at once
    load_eight(gate + group * GROUP, lane(), v);
    load_eight(up + group * GROUP, lane(), u);
    load_eight(signs, lane(), before);
    load_eight(signs + GROUP, lane(), after);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) v[j] = silu_mul(v[j], u[j]);
    if (rotated) rotate(v, before, after);
    // Formats take the columns of each 32 in an order of their own: through LDS, where half a group has room.
    static_assert(Dot::STAGE >= GROUP / 2);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float* run = staged - half * (GROUP / 2);
      sync_wave();
      if (lane() / (WAVE / 2) == half) {
        Quad* to = reinterpret_cast<Quad*>(run) + 2 * lane();
        to[0] = {{v[0], v[1], v[2], v[3]}};
        to[1] = {{v[4], v[5], v[6], v[7]}};
      }
      sync_wave();
      if (lane() / (WAVE / 2) == half) Dot::load_x(run, lane(), v);
    }
    sync_wave();
    Dot::stage(staged, v);
  }
};

struct Ring {
  Arrival filled[MOST_STAGES], emptied[MOST_STAGES], met;
};

template <class Format, int MATRICES>
struct Stream {
  using Dot = typename Tiled<Format>::Dot;
  using Weights = typename Tiled<Format>::Weights;
  static constexpr int LANES = 4, APART = WAVE / LANES, ROWS = APART * Dot::ROWS;    // LANES share a row; rows of a wave

  // A stage of the ring, and how often the ring was gone round before.
  struct Place {
    int stages, stage = 0, rounds = 0;
    DEVICE_MEMBER explicit Place(int stages) : stages(stages) {}
    DEVICE_MEMBER void move(int by) {    // no more than once round
      stage += by;
      if (stage >= stages) {
        stage -= stages;
        rounds++;
      }
    }
  };

  // Where a tile of the list lies.
  struct Tile {
    int number, matrix, slot;
    DEVICE_MEMBER Tile(int tiles, int at) {
      const int before = at / tiles;    // matrices
      number = at - before * tiles;
      matrix = before % MATRICES;
      slot = before / MATRICES;
    }
    DEVICE_MEMBER void next_matrix() {
      number = 0;
      slot += matrix == MATRICES - 1;
      matrix = matrix == MATRICES - 1 ? 0 : matrix + 1;
    }
  };

  // Two halves of a row's sum.
  struct alignas(8) Halves {
    float v[2];
  };

  const Job<MATRICES>& job;
  Ring* ring;
  uint8_t* lds;
  float* staged;                     // rows of x
  int stages, waves;                 // waves that multiply
  int rows, tiles, runs, members;    // of a tile, tiles of a matrix, runs of ROWS rows of a tile, waves that share a run
  int line, shift, size;             // bytes of a row, between some rows, of a stage
  int first, count;                  // the block's share of the list

  // `share`: the tiles of a block, but for the rest of the list, of which the first blocks have a tile more each.
  DEVICE_MEMBER Stream(const Job<MATRICES>& job, Ring* ring, uint8_t* lds, float* staged, int stages, int rows, int tiles,
                       int share)
      : job(job), ring(ring), lds(lds), staged(staged), stages(stages), waves((int)blockDim.x / WAVE - 2), rows(rows),
        tiles(tiles), runs(rows / ROWS), members((job.groups + SHARE - 1) / SHARE), line(job.groups * Format::BYTES),
        shift(Dot::SHIFTS && line % CONFLICT == 0 ? SHIFT : 0), size(rows * line + rows / SHIFTED * shift) {
    const int rest = job.slots * MATRICES * tiles - share * (int)gridDim.x;
    first = (int)blockIdx.x * share + min((int)blockIdx.x, rest);
    count = share + ((int)blockIdx.x < rest);
  }

  // Where a row of the first stage lies: SHIFTED rows follow one another, and the next ones lie `shift` bytes further.
  DEVICE_MEMBER int place_of(int r) const { return r * line + r / SHIFTED * shift; }

  // What was made of a stage's rows, [members, rows], in two places by turns.
  DEVICE_MEMBER Halves* made(const Place& place) const {
    return reinterpret_cast<Halves*>(lds + stages * size) + (place.rounds % 2 * stages + place.stage) * members * rows;
  }

  // One wave's work: to fill stages. Where rows take long to multiply, few are asked for (`at_first`) before x has come.
  DEVICE_MEMBER void copy(int at_first) const {
    if (lane() < stages) {
      prepare(ring->filled + lane(), 1);
      prepare(ring->emptied + lane(), members * runs + 1);
    }
    if (lane() == 0) prepare(&ring->met, waves);
    show_prepared();
    sync_wave();
    pass_block();
    Tile tile(tiles, first);
    Place place(stages), before(stages);    // of the tile, of the one that has to be there first
    const int under_way = min(Dot::UNDER_WAY, stages);
    const int all = rows * line, piece = shift ? SHIFTED * line : all;
    const uint8_t* matrix = job.matrix(tile.matrix, tile.slot);
    for (int i = 0; i < count; i++) {
      if (i == at_first) await_arrival(&ring->met, 0);
      if (i >= under_way) {
        await_arrival(ring->filled + before.stage, before.rounds % 2);
        before.move(1);
      }
      if (place.rounds > 0) await_arrival(ring->emptied + place.stage, (place.rounds - 1) % 2);
      if (lane() == 0) {
        const int left = job.rows - tile.number * rows, bytes = !matrix ? 0 : left < rows ? left * line : all;
        const uint8_t* from = matrix + (int64_t)tile.number * all;
        uint8_t* to = lds + place.stage * size;
        expect(ring->filled + place.stage, bytes);
        for (int at = 0; at < bytes; at += piece, to += piece + shift) {
          copy_run(to, from + at, min(piece, bytes - at), ring->filled + place.stage);
        }
      }
      if (++tile.number == tiles && i + 1 < count) {
        tile.next_matrix();
        matrix = job.matrix(tile.matrix, tile.slot);
      }
      place.move(1);
    }
  }

  // Another wave's work: to add up what was made of rows, members in order. It need not be quick: a stage may be filled anew as soon
  // as its rows were multiplied, if what was made of the rows before them was read.
  DEVICE_MEMBER void finish() const {
    sync_block();
    if (lane() < stages) arrive(ring->emptied + lane());    // nothing was made before the first round
    Tile tile(tiles, first);
    Place place(stages);
    const uint8_t* matrix = job.matrix(tile.matrix, tile.slot);
    float* out = job.row(tile.matrix, tile.slot);
    for (int i = 0; i < count; i++) {
      await_arrival(ring->emptied + place.stage, place.rounds % 2);
      const Halves* halves = made(place);
      const int row = tile.number * rows, left = min(rows, job.rows - row);
      for (int r = lane(); r < left; r += WAVE) {
        float total = 0.0f;
#pragma unroll 1
        for (int m = 0; m < members; m++) total += halves[m * rows + r].v[0] + halves[m * rows + r].v[1];
        out[row + r] = matrix ? total : not_a_number();
      }
      sync_wave();
      if (lane() == 0) arrive(ring->emptied + place.stage);
      if (++tile.number == tiles && i + 1 < count) {
        tile.next_matrix();
        matrix = job.matrix(tile.matrix, tile.slot);
        out = job.row(tile.matrix, tile.slot);
      }
      place.move(1);
    }
  }

  // The other waves' work.
  template <class Input>
  DEVICE_MEMBER void multiply(const Input& x) const {
    const int member = wave() % members, run = wave() / members % runs, team = wave() / (members * runs);
    const int teams = min(waves / (members * runs), stages);
    const int lead = lane() / LANES, quarter = lane() % LANES;
    // Arrivals tell an even round from an odd one and no more, so the tile of the round before must have been there. It was asked
    // for before a tile that this team has had, and came before it, unless as many stages may be under way.
    const bool early = stages - teams < Dot::UNDER_WAY;
    const int span = tiles * MATRICES * job.per_x;    // tiles that have the same row of x
    const int groups = (job.groups - member + members - 1) / members;
    const int keeps = Dot::ROWS == 2 ? quarter % 2 : 0;    // the row of which this lane has a half in the end
    const int own = member * rows + run * ROWS + keeps * APART + lead;
    const int last_x = (first + count - 1) / span;
    const int held = Dot::X_GROUPS / job.groups;           // rows of x that LDS has room for
    int x_row = first / span, at_row = 0, met = 0;
    int until = (x_row + 1) * span - first;
    int row[Dot::ROWS];
#pragma unroll
    for (int r = 0; r < Dot::ROWS; r++) row[r] = place_of(run * ROWS + r * APART + lead) + member * Format::BYTES;
    await_previous();
    take(x, x_row, min(held, last_x - x_row + 1));
    sync_block();
    meet(met);
    Dot dot;
    Place place(stages);
    place.move(team);
    // The next row of x. Every wave passes to every row, whether it multiplies by it or not: no wave reads the old ones any more
    // when new ones come, and every wave finds the new ones.
    const auto pass = [&] {
      until += span;
      x_row++;
      if (++at_row < held) return;
      at_row = 0;
      meet(met);
      take(x, x_row, min(held, last_x - x_row + 1));
      meet(met);
    };
    for (int i = team < teams ? team : count; i < count; i += teams) {
      while (i >= until) pass();
      if (early && place.rounds > 0) await_arrival(ring->emptied + place.stage, (place.rounds - 1) % 2);
      await_arrival(ring->filled + place.stage, place.rounds % 2);
      typename Dot::Staged from(staged + (at_row * job.groups + member) * Dot::STAGE);
      const uint8_t* at[Dot::ROWS];
      typename Weights::Raw raw[Dot::ROWS];
#pragma unroll
      for (int r = 0; r < Dot::ROWS; r++) {
        dot.sum[r] = 0.0f;
        at[r] = lds + place.stage * size + row[r];
        raw[r] = Weights::read(at[r], quarter);
      }
#pragma unroll(Dot::AT_ONCE)
      for (int left = groups; left > 0; left--) {
        dot.add(raw, from);
        from.move(members);
#pragma unroll
        for (int r = 0; r < Dot::ROWS; r++) {    // the next group's, or the last one's again
          at[r] += left > 1 ? members * Format::BYTES : 0;
          raw[r] = Weights::read(at[r], quarter);
        }
      }
      const float upper = dot.sum[0], lower = dot.sum[Dot::ROWS - 1];
      const float half = (keeps ? lower : upper) + __shfl_xor(keeps ? upper : lower, 1);
      if (Dot::ROWS == 2 || quarter % 2 == 0) made(place)[own].v[quarter / 2] = half;
      sync_wave();
      if (lane() == 0) arrive(ring->emptied + place.stage);
      place.move(teams);
    }
    while (count > until) pass();
  }

  // Waits for all waves that multiply.
  DEVICE_MEMBER void meet(int& met) const {
    sync_wave();
    if (lane() == 0) arrive(&ring->met);
    await_arrival(&ring->met, met);
    met ^= 1;
  }

  // Puts rows of x into LDS, a group to a wave.
  template <class Input>
  DEVICE_MEMBER void take(const Input& x, int x_row, int rows_of_x) const {
    for (int group = wave(); group < rows_of_x * job.groups; group += waves) {
      x.stage((int64_t)x_row * job.groups + group, staged + group * Dot::STAGE);
    }
  }
};
#endif
