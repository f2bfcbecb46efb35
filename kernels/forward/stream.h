// Experts' rows through LDS, for GPUs whose header defines MQ_COPY. What a launch multiplies is one list of tiles: for each slot
// the rows of its expert's matrices, some at a time. The blocks, one for each multiprocessor, take equal shares of the list.
// The last wave of a block copies: tiles go to the stages of a ring, one after the other, as far ahead as the ring is long.
// The other waves form teams that take tiles in turns. A wave of a team multiplies at most SHARE groups of a run of ROWS rows;
// the one that is the last to have done so adds up what all have made of the run, in the order of the waves. x lies in LDS for
// as long as it stays the same. The copies begin before the kernel before this one has ended.
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
template <class DotOfFormat, class Format>
struct TiledBy {
  using Dot = DotOfFormat;
  using Weights = Format;
  static constexpr int STAGE = Dot::STAGE;
};
template <class Format>
struct Tiled<Format, decltype((void)sizeof(typename Format::Counted))>
    : TiledBy<BitDot<typename Format::Counted>, typename Format::Counted> {};
template <class Format>
struct Tiled<Format, decltype((void)sizeof(typename Format::Bytes))>
    : TiledBy<ByteDot<typename Format::Bytes>, typename Format::Bytes> {};

struct Ring {
  Arrival filled[MOST_STAGES], emptied[MOST_STAGES], met;
  int missing[MOST_STAGES];          // whether the expert of a stage's tile is not there
  int done[MOST_STAGES][MOST_RUNS];  // waves that have multiplied their groups of a run
};

template <class Format, int MATRICES>
struct Stream {
  using Dot = typename Tiled<Format>::Dot;
  using Weights = typename Tiled<Format>::Weights;
  static constexpr int LANES = 4, APART = WAVE / LANES, ROWS = APART * Dot::ROWS;    // LANES share a row; rows of a wave

  // Where a tile of the list lies, and its stage of the ring with how often the ring was gone round before.
  struct Tile {
    int tiles, stages, number, matrix, slot, stage = 0, rounds = 0;
    DEVICE_MEMBER Tile(int tiles, int stages, int at)
        : tiles(tiles), stages(stages), number(at % tiles), matrix(at / tiles % MATRICES), slot(at / tiles / MATRICES) {}
    DEVICE_MEMBER void move(int by) {
      for (number += by; number >= tiles; number -= tiles) {
        slot += matrix == MATRICES - 1;
        matrix = matrix == MATRICES - 1 ? 0 : matrix + 1;
      }
      for (stage += by; stage >= stages; stage -= stages) rounds++;
    }
  };

  const Job<MATRICES>& job;
  Ring* ring;
  uint8_t* lds;
  int stages, waves;                  // waves that multiply
  int members, runs, teams;           // waves that share a run of ROWS rows, runs of a tile, teams of members · runs waves
  int rows, tiles, line, shift;       // of a tile, of a matrix, bytes of a row
  int first, count;                   // the block's share of the list
  const uint8_t* matrix = nullptr;    // of the first tile

  DEVICE_MEMBER Stream(const Job<MATRICES>& job, Ring* ring, uint8_t* lds, int stages)
      : job(job), ring(ring), lds(lds), stages(stages), waves((int)blockDim.x / WAVE - 1),
        members((job.groups + SHARE - 1) / SHARE), runs(MOST_RUNS / members), teams(min(waves / (members * runs), stages)),
        rows(runs * ROWS), tiles((job.rows + rows - 1) / rows), line(job.groups * Format::BYTES),
        shift(line % CONFLICT ? 0 : SHIFT) {
    const int all = job.slots * MATRICES * tiles, share = all / (int)gridDim.x, rest = all % (int)gridDim.x;
    first = (int)blockIdx.x * share + min((int)blockIdx.x, rest);
    count = share + ((int)blockIdx.x < rest);
    if (wave() == waves) matrix = job.matrix(first / tiles % MATRICES, first / tiles / MATRICES);
    if ((int)threadIdx.x < stages) {
      prepare(ring->filled + threadIdx.x, 1);
      prepare(ring->emptied + threadIdx.x, runs);
      for (int i = 0; i < runs; i++) ring->done[threadIdx.x][i] = 0;
    }
    if (threadIdx.x == 0) prepare(&ring->met, waves);
    __syncthreads();
  }

  // Where a row of a stage lies: SHIFTED rows follow one another, and the next ones lie `shift` bytes further.
  DEVICE_MEMBER uint8_t* row(int stage, int r) const {
    return lds + (stage * rows + r) * line + (stage * (rows / SHIFTED) + r / SHIFTED) * shift;
  }

  // What the members have made of a run.
  DEVICE_MEMBER float* sums(int stage, int run) const {
    return reinterpret_cast<float*>(row(stages, 0)) + (stage * runs + run) * members * ROWS;
  }

  // The last wave's work.
  DEVICE_MEMBER void copy() {
    Tile tile(tiles, stages, first);
    for (int i = 0; i < count; i++) {
      if (i > 0 && tile.number == 0) matrix = job.matrix(tile.matrix, tile.slot);
      if (tile.rounds > 0) await_arrival(ring->emptied + tile.stage, (tile.rounds - 1) % 2);
      if (lane() == 0) {
        const int present = matrix ? min(rows, job.rows - tile.number * rows) : 0, piece = shift ? SHIFTED : rows;
        ring->missing[tile.stage] = !matrix;
        expect(ring->filled + tile.stage, present * line);
        for (int at = 0; at < present; at += piece) {
          copy_run(row(tile.stage, at), matrix + (int64_t)(tile.number * rows + at) * line, min(piece, present - at) * line,
                   ring->filled + tile.stage);
        }
      }
      tile.move(1);
    }
  }

  // Waits until a stage is filled with a tile. Arrivals tell an even round from an odd one and no more, so the tile of the round
  // before must be gone first.
  DEVICE_MEMBER void await_filled(const Tile& tile) const {
    if (tile.rounds > 0) await_arrival(ring->emptied + tile.stage, (tile.rounds - 1) % 2);
    await_arrival(ring->filled + tile.stage, tile.rounds % 2);
  }

  // The other waves' work.
  DEVICE_MEMBER void multiply(const float* x, float* staged) const {
    const int member = wave() % members, run = wave() / members % runs, team = wave() / (members * runs);
    const int lead = lane() / LANES, quarter = lane() % LANES;
    Tile tile(tiles, stages, first);
    int x_row = tile.slot / job.per_x, met = 0;
    const int last_row = (first + count - 1) / tiles / MATRICES / job.per_x;
    for (int i = threadIdx.x; i < Dot::STAGE; i += waves * WAVE) staged[job.groups * Dot::STAGE + i] = 0.0f;
    await_previous();
    take(x, x_row, staged);
    meet(met);
    tile.move(team);
    for (int i = team < teams ? team : count; i < count; i += teams) {
      for (const int wanted = tile.slot / job.per_x; x_row < wanted;) turn(x, ++x_row, staged, met);
      await_filled(tile);
      Dot dot;
#pragma unroll(Dot::AT_ONCE)
      for (int k = 0; k < SHARE; k++) {
        const int group = k * members + member, there = min(group, job.groups - 1);    // past the end x is 0
        typename Weights::Raw raw[Dot::ROWS];
#pragma unroll
        for (int r = 0; r < Dot::ROWS; r++) {
          raw[r] = Weights::read(row(tile.stage, run * ROWS + r * APART + lead) + there * Format::BYTES, quarter);
        }
        dot.add(raw, staged + min(group, job.groups) * Dot::STAGE, nullptr);
      }
      const float total = dot.total();
      float* made = sums(tile.stage, run);
      constexpr int KEEPERS = LANES / Dot::ROWS;    // lanes that have the total of a row
      if (quarter % KEEPERS == 0) made[member * ROWS + quarter / KEEPERS * APART + lead] = total;
      sync_wave();
      int before = 0;
      if (lane() == 0) before = count_up(&ring->done[tile.stage][run]);
      if (__shfl(before, 0) == members - 1) finish(tile, run, made);
      tile.move(teams);
    }
    while (x_row < last_row) turn(x, ++x_row, staged, met);
  }

  // Adds up what the members have made of a run; then nobody needs the stage for it any more.
  DEVICE_MEMBER void finish(const Tile& tile, int run, const float* made) const {
    const int r = tile.number * rows + run * ROWS + lane();
    if (lane() < ROWS && r < job.rows) {
      float total = made[lane()];
      for (int m = 1; m < members; m++) total += made[m * ROWS + lane()];
      job.row(tile.matrix, tile.slot)[r] = ring->missing[tile.stage] ? not_a_number() : total;
    }
    sync_wave();
    if (lane() == 0) {
      ring->done[tile.stage][run] = 0;
      arrive(ring->emptied + tile.stage);
    }
  }

  // Waits for all waves that multiply.
  DEVICE_MEMBER void meet(int& met) const {
    sync_wave();
    if (lane() == 0) arrive(&ring->met);
    await_arrival(&ring->met, met);
    met ^= 1;
  }

  // Puts a row of x into LDS, a group to a wave.
  DEVICE_MEMBER void take(const float* x, int x_row, float* staged) const {
    for (int group = wave(); group < job.groups; group += waves) {
      float v[PER_LANE];
      Dot::load_x(x + ((int64_t)x_row * job.groups + group) * GROUP, lane(), v);
      Dot::stage(staged + group * Dot::STAGE, v);
    }
  }

  // The same for another row: no wave reads the old one any more, and every wave finds the new one.
  DEVICE_MEMBER void turn(const float* x, int x_row, float* staged, int& met) const {
    meet(met);
    take(x, x_row, staged);
    meet(met);
  }
};
#endif
