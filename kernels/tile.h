// Products of a team's rows with x on units that multiply tiles of halves, for vendors whose header has one (MQ_TILE). The
// tile's rows are the rows of a wave's teams, twice: once for either half of a team's lanes, which so keep the slices that
// they have elsewhere. Its columns are x: for either half of the lanes, the high and the low part of every element. Every
// weight is exact in a half and an element of x in two of them, to 22 bits; sums are f32.
#pragma once
#include "formats.h"

#ifdef MQ_TILE
template <bool First, class A, class B>
struct Either {
  using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using Type = B;
};

template <class Format>
struct TileDot {
  static constexpr int RUN = 20;                // words from one run of 16 pairs to the next, in other banks
  static constexpr int UNIT = 16 * RUN;         // where a group's unit lies, behind high and low runs of eight slices
  static constexpr int STAGE = UNIT + 4;        // words of LDS that a group of x takes
  static constexpr int ROWS = Format::ROWS;
  Tile sum[ROWS / 2] = {};

  // A lane's eight elements of a group into LDS, in a unit that brings the group's largest to 2^14 and a little more.
  static DEVICE_MEMBER void stage(float* staged, const float (&x)[PER_LANE]) {
    float most = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) most = fmaxf(most, fabsf(x[j]));
    const int bits = (int)(__float_as_uint(wave_max(most)) >> 23), exponent = bits > 15 ? bits : 15;
    const float inverse = __int_as_float((268 - exponent) << 23);
    uint32_t* high = reinterpret_cast<uint32_t*>(staged) + lane() / 4 * (2 * RUN) + 4 * (lane() % 4);
#pragma unroll
    for (int p = 0; p < PER_LANE / 2; p++) {
      const float a = x[Format::element(2 * p)] * inverse, b = x[Format::element(2 * p + 1)] * inverse;
      float high_a, high_b;
      const uint32_t pair = pair_of_halves(a, b);
      halves(pair, high_a, high_b);
      high[p] = pair;
      high[RUN + p] = pair_of_halves(a - high_a, b - high_b);
    }
    if (lane() == 0) staged[UNIT] = __int_as_float((exponent - 14) << 23);
  }

  DEVICE_MEMBER void add(const typename Format::Raw (&raw)[ROWS], const float* staged, const float*) {
    const int column = lane() / 4, slice = 4 * (column / 2 % 2) + lane() % 4;
    const float* run = staged + slice * (2 * RUN) + column % 2 * RUN;
    Words x[Format::SLICE / 8];
#pragma unroll
    for (int i = 0; i < Format::SLICE / 8; i++) x[i] = load_words(run + 4 * i);
    const float unit = staged[UNIT];
#pragma unroll
    for (int t = 0; t < ROWS / 2; t++) {
      uint32_t first[Format::SLICE / 2], second[Format::SLICE / 2];
      Format::pairs(raw[2 * t], first);
      Format::pairs(raw[2 * t + 1], second);
      Tile part = {};
#pragma unroll
      for (int p = 0; p < Format::SLICE / 2; p += 2) {
        multiply_tile(part, first[p], second[p], first[p + 1], second[p + 1], x[p / 4].v[p % 4], x[p / 4].v[p % 4 + 1]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) sum[t].v[i] = fmaf(unit, part.v[i], sum[t].v[i]);
    }
  }

  // Row s / (8 / ROWS) for lane s of a team. Lane 0 of a team has the columns of its first half, lane 5 those of its second.
  DEVICE_MEMBER float total() {
    const int here = lane() / 8 * 8;
    float mine = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float part = sum[r / 2].v[r % 2 * 2] + sum[r / 2].v[r % 2 * 2 + 1];
      const float whole = __shfl(part, here) + __shfl(part, here + 5);
      mine = lane() % 8 / (8 / ROWS) == r ? whole : mine;
    }
    return mine;
  }
};
#endif
