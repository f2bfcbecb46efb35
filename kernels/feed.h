// How the weights of a matrix-vector product come to its lanes. A team makes ROWS rows of one or two matrices at a turn, and
// walks along them in steps of STEP groups; its row r belongs to matrix r / PER. A feed begins to load as it is made, and may
// be made before the kernel awaits the one before it.
#pragma once
#include "formats.h"

template <class Format, int MATRICES>
struct Rows {
  static constexpr int ROWS = Format::ROWS;
  static constexpr int PER = ROWS / MATRICES;    // rows of each matrix that a team makes at a turn
  const uint8_t* matrix[MATRICES];
  int rows, groups;
  int first, stride;    // the team's first row, and how far on its next ones lie

  // The team's row r, or the last one where it lies past the end, never to be stored.
  DEVICE_MEMBER const uint8_t* row(int r) const {
    return matrix[r / PER] + (int64_t)min(first + r % PER, rows - 1) * groups * Format::BYTES;
  }
};

// Through registers: the weights of the next step are under way while one is multiplied.
template <class Format, int MATRICES>
struct Direct {
  using Raw = typename Format::Raw;
  static constexpr int STEP = 1, ROWS = Format::ROWS, TEAM = GROUP / Format::SLICE;
  Rows<Format, MATRICES> rows;
  const uint8_t* row[ROWS];
  Raw raw[ROWS], ahead[ROWS];
  int group;

  DEVICE_MEMBER explicit Direct(const Rows<Format, MATRICES>& share) : rows(share) { turn(); }

  DEVICE_MEMBER void turn() {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      row[r] = rows.row(r);
      ahead[r] = Format::load(row[r], lane() % TEAM);
    }
    group = 0;
  }

  DEVICE_MEMBER void next_turn() {
    rows.first += rows.stride;
    turn();
  }

  DEVICE_MEMBER void next() {
    group = min(group + 1, rows.groups - 1);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      raw[r] = ahead[r];
      ahead[r] = Format::load(row[r] + group * Format::BYTES, lane() % TEAM);
    }
  }

  DEVICE_MEMBER void read(int, Raw (&now)[ROWS]) const {
#pragma unroll
    for (int r = 0; r < ROWS; r++) now[r] = raw[r];
  }
};

#ifdef MQ_RING
// Through a ring of stages in LDS, one ring a wave, which copies of 16 bytes a lane fill in the background, across turns. A
// stage is STEP groups of each of the wave's rows; teams copy their own. Lines lie so that two neighbouring teams read from
// different banks. For rows that begin at multiples of 16 bytes and are whole stages.
template <class Format, int MATRICES>
struct Ring {
  using Raw = typename Format::Raw;
  static constexpr int ROWS = Format::ROWS, TEAM = GROUP / Format::SLICE, COPY = 16 * TEAM, STEP = Format::STAGE;
  static constexpr int PIECE = STEP * Format::BYTES, LINE = (PIECE + 64 / ROWS - 1) / (128 / ROWS) * (128 / ROWS) + 64 / ROWS;
  static constexpr int STAGE = WAVE / TEAM * ROWS * LINE, DEPTH = 3, LDS_BYTES = DEPTH * STAGE;
  Rows<Format, MATRICES> rows;
  const uint8_t* row[ROWS];
  const uint8_t* ring;    // the team's first line
  LdsAddress target;
  int left, turns, put = 0, got = -STAGE;

  static DEVICE_MEMBER bool fits(const Rows<Format, MATRICES>& share) {
    uint64_t bits = share.groups * Format::BYTES;
#pragma unroll
    for (int m = 0; m < MATRICES; m++) bits |= reinterpret_cast<uint64_t>(share.matrix[m]);
    return share.groups % STEP == 0 && bits % 16 == 0;
  }

  DEVICE_MEMBER Ring(const Rows<Format, MATRICES>& share, uint8_t* rings)
      : rows(share), ring(rings + wave() * LDS_BYTES + lane() / TEAM * ROWS * LINE) {
    target = lds_address(ring) + 16 * (lane() % TEAM);
    turns = (rows.rows + rows.stride - 1) / rows.stride;
    turn();
#pragma unroll 1
    for (int i = 0; i < DEPTH - 1; i++) request();
  }

  DEVICE_MEMBER void turn() {
#pragma unroll
    for (int r = 0; r < ROWS; r++) row[r] = rows.row(r) + 16 * (lane() % TEAM);
    left = rows.groups;
  }

  // Begins to copy the next stage; past the last one an empty batch keeps the count.
  DEVICE_MEMBER void request() {
    if (turns > 0) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int at = 0; at < PIECE; at += COPY) {
          if (at + 16 * (lane() % TEAM) < PIECE) copy_quad(target + put + r * LINE + at, row[r] + at);
        }
        row[r] += PIECE;
      }
      left -= STEP;
      if (left == 0) {
        turns--;
        rows.first += rows.stride;
        turn();
      }
    }
    close_batch();
    put = put + STAGE == LDS_BYTES ? 0 : put + STAGE;
  }

  DEVICE_MEMBER void next_turn() {}

  DEVICE_MEMBER void next() {
    await_batches<DEPTH - 2>();
    sync_wave();    // every lane's copies are there, and nobody reads the stage before any more
    request();
    got = got + STAGE == LDS_BYTES ? 0 : got + STAGE;
  }

  // The i-th group of the stage.
  DEVICE_MEMBER void read(int i, Raw (&now)[ROWS]) const {
#pragma unroll
    for (int r = 0; r < ROWS; r++) now[r] = Format::read(ring + got + r * LINE + i * Format::BYTES, lane() % TEAM);
  }
};
#endif
