// Experts' rows through LDS, for GPUs whose header defines MQ_COPY. What a launch multiplies is one list of tiles: for each slot
// the rows of its expert's matrices, as many at a time as a block's waves can take. The blocks, one for each multiprocessor,
// take equal shares of the list. The last wave of a block copies: tiles go to the stages of a ring, one after the other, and
// it runs ahead of the others as far as the ring reaches. Each other wave multiplies a group of columns of a part of the
// tile's rows, and has that group of x in LDS for as long as x stays the same. Sums over groups are made for BATCH tiles at a time, in the
// order of the groups. The copies begin before the kernel before this one has ended, and the next kernel may begin once
// the last copies are under way, so that memory is never idle.
#pragma once
#include "bits.h"
#include "bytes.h"
#include "forward_constants.h"    // made by geometry.py

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
  static constexpr int STAGE = 0;
};
#ifdef MQ_COPY
template <class Dots, class Counts>
struct TiledBy {
  using Dot = Dots;
  using Weights = Counts;
  static constexpr int STAGE = Dot::STAGE;
};
template <class Format>
struct Tiled<Format, decltype((void)sizeof(typename Format::Counted))>
    : TiledBy<BitDot<typename Format::Counted>, typename Format::Counted> {};
template <class Format>
struct Tiled<Format, decltype((void)sizeof(typename Format::Bytes))>
    : TiledBy<ByteDot<typename Format::Bytes>, typename Format::Bytes> {};

struct Ring {
  Arrival filled[MOST_STAGES], emptied[MOST_STAGES], added;
  int missing[MOST_STAGES];    // whether the expert of a stage's tile is not there
};

template <class Format, int MATRICES>
struct Stream {
  using Dot = typename Tiled<Format>::Dot;
  using Weights = typename Tiled<Format>::Weights;
  static constexpr int ROWS = Dot::ROWS, TEAM = 4, TEAMS = WAVE / TEAM, WAVE_ROWS = TEAMS * ROWS;

  // Where a tile of the list lies.
  struct Tile {
    int tiles, number, matrix, slot;
    DEVICE_MEMBER Tile(int tiles, int at)
        : tiles(tiles), number(at % tiles), matrix(at / tiles % MATRICES), slot(at / tiles / MATRICES) {}
    DEVICE_MEMBER void next() {
      if (++number < tiles) return;
      number = 0;
      slot += matrix == MATRICES - 1;
      matrix = matrix == MATRICES - 1 ? 0 : matrix + 1;
    }
  };

  // A stage of the ring, and how often the ring was gone round, modulo 2.
  struct Turn {
    int stage = 0, parity = 0;
    DEVICE_MEMBER void next(int stages) {
      if (++stage < stages) return;
      stage = 0;
      parity ^= 1;
    }
  };

  const Job<MATRICES>& job;
  Ring* ring;
  uint8_t* lds;
  int stages, waves, parts, rows, tiles, line, apart;    // rows of a tile, tiles of a matrix, bytes of a row, and from row to row in LDS
  int first, count;                                      // the block's share of the list

  DEVICE_MEMBER Stream(const Job<MATRICES>& job, Ring* ring, uint8_t* lds, int stages)
      : job(job), ring(ring), lds(lds), stages(stages), waves((int)blockDim.x / WAVE - 1), parts(waves / job.groups),
        rows(parts * WAVE_ROWS), tiles((job.rows + rows - 1) / rows), line(job.groups * Format::BYTES),
        apart(line % ROW_CONFLICT ? line : line + ROW_SHIFT) {
    const int all = job.slots * MATRICES * tiles, share = all / (int)gridDim.x, rest = all % (int)gridDim.x;
    first = (int)blockIdx.x * share + min((int)blockIdx.x, rest);
    count = share + ((int)blockIdx.x < rest);
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; i++) {
        prepare(ring->filled + i, 1);
        prepare(ring->emptied + i, waves);
      }
      prepare(&ring->added, waves);
    }
    __syncthreads();
  }

  DEVICE_MEMBER uint8_t* stage(int i) const { return lds + i * rows * apart; }

  // The last wave's work.
  DEVICE_MEMBER void copy() const {
    Tile tile(tiles, first);
    Turn turn;
    const uint8_t* matrix = nullptr;
    const int last = count - LEAD > stages ? count - LEAD : stages;    // when the next kernel may begin
    for (int i = 0; i < count; i++) {
      if (i == 0 || tile.number == 0) matrix = job.matrix(tile.matrix, tile.slot);
      if (i >= stages) {
        if (i == stages) await_end();
        await_arrival(ring->emptied + turn.stage, turn.parity ^ 1);
      }
      if (i == last) begin_next();
      const int present = matrix ? min(rows, job.rows - tile.number * rows) : 0;
      if (lane() == 0) {
        ring->missing[turn.stage] = !matrix;
        expect(ring->filled + turn.stage, present * line);
      }
      sync_wave();
      const uint8_t* from = matrix + (int64_t)tile.number * rows * line;
      const int pieces = apart == line ? min(present, 1) : present, bytes = apart == line ? present * line : line;
      for (int p = lane(); p < pieces; p += WAVE) {
        copy_run(stage(turn.stage) + p * apart, from + p * line, bytes, ring->filled + turn.stage);
      }
      tile.next();
      turn.next(stages);
    }
    await_end();
    begin_next();
  }

  // The other waves' work.
  DEVICE_MEMBER void multiply(const float* x, float* staged) const {
    const int group = wave() / parts, part = wave() % parts, team = lane() / TEAM;
    float* own = staged + wave() * Dot::STAGE;
    float* sums = reinterpret_cast<float*>(stage(stages)) + wave() * WAVE_ROWS;
    Tile tile(tiles, first);
    Turn turn;
    int x_row = -1, batch = 0, held = 0;
    await_end();
    for (int i = 0; i < count; i++) {
      if (i == 0 || tile.number == 0) {
        if (const int row = tile.slot / job.per_x; row != x_row) {
          float v[PER_LANE];
          Dot::load_x(x + ((int64_t)row * job.groups + group) * GROUP, lane(), v);
          sync_wave();    // no lane reads the row before any more
          Dot::stage(own, v);
          sync_wave();
          x_row = row;
        }
      }
      await_arrival(ring->filled + turn.stage, turn.parity);
      const bool missing = ring->missing[turn.stage];
      const uint8_t* at = stage(turn.stage) + (part * WAVE_ROWS + team) * apart + group * Format::BYTES;
      typename Weights::Raw raw[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) raw[r] = Weights::read(at + r * TEAMS * apart, lane() % TEAM);
      sync_wave();
      if (lane() == 0) arrive(ring->emptied + turn.stage);
      Dot dot;
      dot.add(raw, own, nullptr);
      const float total = dot.total();
      constexpr int KEEPERS = TEAM / ROWS;    // lanes that have the total of a row
      const int kept = lane() % TEAM / KEEPERS;
      if (lane() % KEEPERS == 0) {
        sums[(batch % 2 * BATCH + held) * waves * WAVE_ROWS + kept * TEAMS + team] = missing ? not_a_number() : total;
      }
      if (++held == BATCH || i == count - 1) {
        add_up(first + i + 1 - held, held, batch++);
        held = 0;
      }
      tile.next();
      turn.next(stages);
    }
  }

  // Adds the groups' sums of `held` tiles from `at` on. The waves have two sets of sums in turns: whoever writes to one again has
  // seen all waves come here with the other, and so leave this one.
  DEVICE_MEMBER void add_up(int at, int held, int batch) const {
    sync_wave();
    if (lane() == 0) arrive(&ring->added);
    await_arrival(&ring->added, batch % 2);
    const float* sums = reinterpret_cast<const float*>(stage(stages)) + batch % 2 * BATCH * waves * WAVE_ROWS;
    for (int i = threadIdx.x; i < held * rows; i += waves * WAVE) {
      const Tile tile(tiles, at + i / rows);
      const int row = tile.number * rows + i % rows;
      float total = 0.0f;
      for (int g = 0; g < job.groups; g++) total += sums[(i / rows * job.groups + g) * rows + i % rows];
      if (row < job.rows) job.row(tile.matrix, tile.slot)[row] = total;
    }
  }
};
#endif
