// How the weights of a matrix-vector product come to its lanes. A team of lanes multiplies ROWS rows of one or two matrices;
// its row r belongs to matrix r / PER. The teams of a wave take rows in turns, so that at one time they read neighbouring rows,
// which meet less often in a bank of LDS than every other row. Loads may begin before the kernel awaits the one before it.
#pragma once
#include "formats.h"

template <class Format, int MATRICES>
struct Rows {
  static constexpr int ROWS = Format::ROWS, TEAM = GROUP / Format::SLICE;
  static constexpr int PER = ROWS / MATRICES;    // rows of each matrix that a team makes
  static constexpr int APART = WAVE / TEAM;      // from one of them to the next
  static constexpr int TILE = APART * PER;       // rows of each matrix that a wave makes
  const uint8_t* matrix[MATRICES];
  int rows, groups;
  int first;    // the team's first row

  DEVICE_MEMBER int line() const { return groups * Format::BYTES; }

  // The number of the team's row r in its matrix.
  DEVICE_MEMBER int number(int r) const { return first + r % PER * APART; }

  // Where it lies, or the last one where it lies past the end, never to be stored.
  DEVICE_MEMBER const uint8_t* row(int r) const {
    return matrix[r / PER] + (int64_t)min(number(r), rows - 1) * line();
  }
};

// Through registers: while the weights of one step are multiplied, those of the next are under way.
template <class Format, int MATRICES>
struct Direct {
  using Raw = typename Format::Raw;
  static constexpr int ROWS = Format::ROWS, TEAM = GROUP / Format::SLICE;
  const uint8_t* row[ROWS];
  Raw raw[ROWS], ahead[ROWS];
  int group = 0, groups;

  DEVICE_MEMBER explicit Direct(const Rows<Format, MATRICES>& share) : groups(share.groups) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      row[r] = share.row(r);
      ahead[r] = Format::load(row[r], lane() % TEAM);
    }
  }

  DEVICE_MEMBER void next() {
    group = min(group + 1, groups - 1);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      raw[r] = ahead[r];
      ahead[r] = Format::load(row[r] + group * Format::BYTES, lane() % TEAM);
    }
  }
};
