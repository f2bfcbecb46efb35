// Products of a team's rows with x in f32, lane by lane. Long slices of x are read from LDS, where they lie so that no two
// lanes meet in a bank; short slices lie in memory in the order of the lanes. Sums run over a lane's elements in order, then
// over lanes: the same order on every back end.
#pragma once
#include "formats.h"

DEVICE float sum_of(const float (&x)[PER_LANE]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Sums each row's value over a team of TEAM lanes; lane s of the team receives the sum of row s / (TEAM / ROWS). At each step
// one half of the team keeps one half of the rows and gives the other rows away, so that a shuffle serves two rows.
template <int TEAM, int ROWS>
DEVICE float team_total(float (&sum)[ROWS]) {
  const int slice = lane() % TEAM;
  int mask = TEAM / 2;
#pragma unroll
  for (int rows = ROWS; rows > 1; rows /= 2, mask /= 2) {
    const bool upper = slice & mask;
#pragma unroll
    for (int r = 0; r < rows / 2; r++) {
      const float kept = upper ? sum[r + rows / 2] : sum[r], given = upper ? sum[r] : sum[r + rows / 2];
      sum[r] = kept + __shfl_xor(given, mask);
    }
  }
#pragma unroll
  for (; mask > 0; mask /= 2) sum[0] += __shfl_xor(sum[0], mask);
  return sum[0];
}

template <class Format>
struct LaneDot {
  static constexpr int SLICE = Format::SLICE, ROWS = Format::ROWS, TEAM = GROUP / SLICE;
  static constexpr bool STAGED = SLICE > PER_LANE;
  static constexpr int RUN = 36;    // floats that 32 elements of x take, with the four sums of eight, which also shift the banks
  static constexpr int STAGE = STAGED ? GROUP / 32 * RUN : 0;    // floats of LDS that a group of x takes
  float sum[ROWS] = {};

  static DEVICE_MEMBER void load_x(const float* x, int i, float (&v)[PER_LANE]) { load_eight(x, i, v); }

  // A lane's eight elements of a group into LDS, and their sum.
  static DEVICE_MEMBER void stage(float* staged, const float (&x)[PER_LANE]) {
    float* run = staged + lane() / 4 * RUN;
    Quad* to = reinterpret_cast<Quad*>(run) + 2 * (lane() % 4);
    to[0] = {{x[0], x[1], x[2], x[3]}};
    to[1] = {{x[4], x[5], x[6], x[7]}};
    run[32 + lane() % 4] = sum_of(x);
  }

  // This lane's slice of a group of x; returns its sum.
  static DEVICE_MEMBER float read(const float* staged, const float* group, float (&x)[SLICE]) {
    const int slice = lane() % TEAM;
    if constexpr (STAGED) {
      const Quad* quads = reinterpret_cast<const Quad*>(staged + slice * RUN);
#pragma unroll
      for (int q = 0; q < SLICE / 4; q++) {
        const Quad four = quads[q];
#pragma unroll
        for (int j = 0; j < 4; j++) x[4 * q + j] = four.v[j];
      }
      const Quad sums = quads[SLICE / 4];
      return (sums.v[0] + sums.v[1]) + (sums.v[2] + sums.v[3]);
    } else {
      load_eight(group, slice, x);
      return sum_of(x);
    }
  }

  DEVICE_MEMBER void add(const typename Format::Raw (&raw)[ROWS], const float* staged, const float* group) {
    float x[SLICE];
    const float x_sum = read(staged, group, x);
#pragma unroll
    for (int r = 0; r < ROWS; r++) sum[r] = Format::dot(raw[r], x, x_sum, sum[r]);
  }

  DEVICE_MEMBER float total() { return team_total<TEAM>(sum); }
};
