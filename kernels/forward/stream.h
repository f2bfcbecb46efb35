// Experts' rows through LDS, for GPUs whose header defines MQ_COPY. What a launch multiplies is one list of tiles: for each slot
// the rows of its expert's matrices, some at a time. The blocks, one for each multiprocessor, take equal shares of the list.
// The last wave of a block copies: tiles go to the stages of a ring, one after the other, as far ahead as the ring is long.
// The other waves form teams that take tiles in turns. A wave of a team multiplies at most SHARE groups of a run of ROWS rows;
// the one that is the last to have done so adds up what all have made of the run, in the order of the waves. x lies in LDS for
// as long as it stays the same. The copies begin before the kernel before this one has ended. What a multiprocessor asks for
// comes in turns, x behind the rows that were asked for before it: so no more of them are under way than memory needs.
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

  // A stage of the ring, and how often the ring was gone round before.
  struct Place {
    int stages, stage = 0, rounds = 0;
    DEVICE_MEMBER explicit Place(int stages) : stages(stages) {}
    DEVICE_MEMBER void move(int by) {
      for (stage += by; stage >= stages; stage -= stages) rounds++;
    }
  };

  // Where a tile of the list lies.
  struct Tile {
    int tiles, number, matrix, slot;
    DEVICE_MEMBER Tile(int tiles, int at) : tiles(tiles) {
      const int before = at / tiles;    // matrices
      number = at - before * tiles;
      matrix = before % MATRICES;
      slot = before / MATRICES;
    }
    DEVICE_MEMBER void move(int by) {
      for (number += by; number >= tiles; number -= tiles) {
        slot += matrix == MATRICES - 1;
        matrix = matrix == MATRICES - 1 ? 0 : matrix + 1;
      }
    }
  };

  const Job<MATRICES>& job;
  Ring* ring;
  uint8_t* lds;
  int stages, waves;                  // waves that multiply
  int rows, runs, members;            // of a tile, runs of ROWS rows of it, waves that share a run
  int line, shift;                    // bytes of a row
  int count;                          // the block's share of the list
  Tile first;
  const uint8_t* matrix = nullptr;    // of the first tile

  // `share`: the tiles of a block, but for the rest of the list, of which the first blocks have a tile more each.
  DEVICE_MEMBER Stream(const Job<MATRICES>& job, Ring* ring, uint8_t* lds, int stages, int rows, int tiles, int share)
      : job(job), ring(ring), lds(lds), stages(stages), waves((int)blockDim.x / WAVE - 1), rows(rows), runs(rows / ROWS),
        members((job.groups + SHARE - 1) / SHARE), line(job.groups * Format::BYTES),
        shift(Dot::SHIFTS && line % CONFLICT == 0 ? SHIFT : 0),
        first(tiles, (int)blockIdx.x * share + min((int)blockIdx.x, rest_of(job, tiles, share))) {
    count = share + ((int)blockIdx.x < rest_of(job, tiles, share));
    if (wave() == waves) matrix = job.matrix(first.matrix, first.slot);
    if ((int)threadIdx.x < stages) {
      prepare(ring->filled + threadIdx.x, 1);
      prepare(ring->emptied + threadIdx.x, runs);
      for (int i = 0; i < runs; i++) ring->done[threadIdx.x][i] = 0;
    }
    if (threadIdx.x == 0) prepare(&ring->met, waves);
    __syncthreads();
  }

  static DEVICE_MEMBER int rest_of(const Job<MATRICES>& job, int tiles, int share) {
    return job.slots * MATRICES * tiles - share * (int)gridDim.x;
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
    Tile tile = first;
    Place place(stages), before(stages);    // of the tile, of the one that has to be there first
    const int all = rows * line, piece = shift ? SHIFTED * line : all;
    for (int i = 0; i < count; i++) {
      if (i > 0 && tile.number == 0) matrix = job.matrix(tile.matrix, tile.slot);
      if (i >= min(Dot::UNDER_WAY, stages)) {
        await_arrival(ring->filled + before.stage, before.rounds % 2);
        before.move(1);
      }
      if (place.rounds > 0) await_arrival(ring->emptied + place.stage, (place.rounds - 1) % 2);
      if (lane() == 0) {
        const int left = job.rows - tile.number * rows, bytes = !matrix ? 0 : left < rows ? left * line : all;
        const uint8_t* from = matrix + (int64_t)tile.number * all;
        uint8_t* to = row(place.stage, 0);
        ring->missing[place.stage] = !matrix;
        expect(ring->filled + place.stage, bytes);
        for (int at = 0; at < bytes; at += piece, to += piece + shift) {
          copy_run(to, from + at, min(piece, bytes - at), ring->filled + place.stage);
        }
      }
      tile.move(1);
      place.move(1);
    }
  }

  // Waits until a stage is filled with a tile. Arrivals tell an even round from an odd one and no more, so the tile of the round
  // before must be gone first.
  DEVICE_MEMBER void await_filled(const Place& place) const {
    if (place.rounds > 0) await_arrival(ring->emptied + place.stage, (place.rounds - 1) % 2);
    await_arrival(ring->filled + place.stage, place.rounds % 2);
  }

  // The other waves' work.
  DEVICE_MEMBER void multiply(const float* x, float* staged) const {
    const int member = wave() % members, run = wave() / members % runs, team = wave() / (members * runs);
    const int teams = min(waves / (members * runs), stages);
    const int lead = lane() / LANES, quarter = lane() % LANES;
    Tile tile = first, last = first;
    Place place(stages);
    last.move(count - 1);
    int x_row = tile.slot / job.per_x, met = 0;
    await_previous();
    take(x, x_row, staged);
    meet(met);
    tile.move(team);
    place.move(team);
    for (int i = team < teams ? team : count; i < count; i += teams) {
      while (tile.slot >= (x_row + 1) * job.per_x) turn(x, ++x_row, staged, met);
      await_filled(place);
      Dot dot;
      const uint8_t* at[Dot::ROWS];
#pragma unroll
      for (int r = 0; r < Dot::ROWS; r++) at[r] = row(place.stage, run * ROWS + r * APART + lead);
#pragma unroll(Dot::AT_ONCE)
      for (int group = member; group < job.groups; group += members) {
        typename Weights::Raw raw[Dot::ROWS];
#pragma unroll
        for (int r = 0; r < Dot::ROWS; r++) raw[r] = Weights::read(at[r] + group * Format::BYTES, quarter);
        dot.add(raw, staged + group * Dot::STAGE, nullptr);
      }
      const float total = dot.total();
      float* made = sums(place.stage, run);
      constexpr int KEEPERS = LANES / Dot::ROWS;    // lanes that have the total of a row
      if (quarter % KEEPERS == 0) made[member * ROWS + quarter / KEEPERS * APART + lead] = total;
      sync_wave();
      int before = members - 1;
      if (members > 1) {
        if (lane() == 0) before = count_up(&ring->done[place.stage][run]);
        before = __shfl(before, 0);
      }
      if (before == members - 1) finish(tile, place.stage, run, made);
      tile.move(teams);
      place.move(teams);
    }
    while (last.slot >= (x_row + 1) * job.per_x) turn(x, ++x_row, staged, met);
  }

  // Adds up what the members have made of a run; then nobody needs the stage for it any more.
  DEVICE_MEMBER void finish(const Tile& tile, int stage, int run, const float* made) const {
    const int r = tile.number * rows + run * ROWS + lane();
    if (lane() < ROWS && r < job.rows) {
      float total = made[lane()];
#pragma unroll 1
      for (int m = 1; m < members; m++) total += made[m * ROWS + lane()];
      job.row(tile.matrix, tile.slot)[r] = ring->missing[stage] ? not_a_number() : total;
    }
    sync_wave();
    if (lane() == 0) {
      ring->done[stage][run] = 0;
      arrive(ring->emptied + stage);
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
