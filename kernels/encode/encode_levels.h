// A group's levels in the format that a module is built for. `params` is what is fitted: all levels, ascending, or the zero
// and scale of evenly spaced ones, whose level k is zero + scale · k, both rounded.
#pragma once
#include "encode_tile.h"

using Block = blocks::FORMAT;
constexpr int BITS = Block::BITS;
constexpr bool GRID = Block::GRID;
constexpr int LEVELS = Block::LEVELS;
constexpr int PARAMS = GRID ? 2 : LEVELS;

// The level of one code.
DEVICE float level_of(const float* params, int code) {
  return GRID ? params[0] + params[1] * (float)code : params[code];
}

// The levels of one row, ready for many calls of `assign`, which gives the level nearest to a target: the level behind the last
// midpoint that lies below the target, so that of two which are as near the lower one is taken.
template <bool Grid>
struct Levels;

template <>
struct Levels<false> {
  float level[LEVELS], mid[LEVELS - 1];
};

DEVICE void load_levels(Levels<false>& l, const float* params) {
#pragma unroll
  for (int k = 0; k < LEVELS; k++) l.level[k] = params[k];
#pragma unroll
  for (int k = 0; k < LEVELS - 1; k++) l.mid[k] = 0.5f * (l.level[k] + l.level[k + 1]);
}

DEVICE float assign(const Levels<false>& l, float target, int& code) {
  float value = l.level[0];
  code = 0;
#pragma unroll
  for (int k = 0; k < LEVELS - 1; k++) {
    const bool beyond = target > l.mid[k];
    value = beyond ? l.level[k + 1] : value;
    code = beyond ? k + 1 : code;
  }
  return value;
}

template <>
struct Levels<true> {
  float zero, scale, inverse;
};

DEVICE void load_levels(Levels<true>& l, const float* params) {
  l.zero = params[0];
  l.scale = params[1];
  l.inverse = 1.0f / l.scale;
}

DEVICE float level(const Levels<true>& l, int k) { return l.zero + l.scale * (float)k; }

DEVICE bool beyond(const Levels<true>& l, float target, int k) {
  return target > 0.5f * (level(l, k) + level(l, k + 1));
}

// A division gives a guess, from which steps along the midpoints lead to the code. Most often no step is needed.
DEVICE float assign(const Levels<true>& l, float target, int& code) {
  const float q = (target - l.zero) * l.inverse;
  int k = q > 0.0f ? (q < (float)(LEVELS - 1) ? (int)(q + 0.5f) : LEVELS - 1) : 0;
  while (k < LEVELS - 1 && beyond(l, target, k)) k++;
  while (k > 0 && !beyond(l, target, k - 1)) k--;
  code = k;
  return level(l, k);
}
