// Products of a team's rows with x on units that count the bits which two tiles have in common, for GPUs whose header defines
// MQ_BITS. Each set f of a code's bits has the sum S[f] of x over the columns in which all bits of the set are 1, and the sum of
// x over the columns of a code is a sum of S[f] and -S[f]. So a row's product needs S[f] for each set. x becomes whole numbers,
// in a unit that follows the group's largest element: a signed byte, and 16 bits in two's complement above it. A tile's column
// holds one bit of each of these numbers, and the unit counts exactly how many bits rows and columns share, straight from the
// packed codes. Two counts are a word for the unit that multiplies f16, where the bits of a small whole number n are those of
// n · 2^-24: that unit gives each count its power of two and its sign in the sum of each code, still in whole numbers. Four lanes
// share a row, and eight such teams a tile of 16 rows; lane s has the 64 columns of words 2s and 2s + 1, and the sums of codes 2s
// and 2s + 1. Sums over columns are whole numbers, sums over codes and groups f32.
#pragma once
#include "forward_constants.h"    // made by geometry.py
#include "units.h"

#ifdef MQ_BITS
// Formats for BitDot. `bits` gives, for word i of the lane, the columns in which all bits of a set are 1, set f being that of the
// bits of f + 1, in the order in which `load_x` takes columns.
template <class Block>
struct CountedGroup {
  static constexpr int BYTES = Block::BYTES, HEAD = Block::HEAD, WORDS = Block::BITS, LEVELS = Block::LEVELS, SETS = LEVELS - 1;
  static constexpr int SLICE = Block::COUNTED_SLICE, ROWS = Block::COUNTED_ROWS;
  struct Raw {
    uint32_t levels, codes[2 * WORDS];    // the levels of two codes
  };
  DEVICE Raw load(const uint8_t* group, int s) {
    Raw raw;
    raw.levels = fetch_u32(group + 4 * (s % (LEVELS / 2)));
    fetch_words(group + HEAD + 8 * WORDS * s, raw.codes);
    return raw;
  }
  DEVICE Raw read(const uint8_t* group, int s) {    // from LDS
    Raw raw;
    raw.levels = load_u32(group + 4 * (s % (LEVELS / 2)));
    read_words(group + HEAD + 8 * WORDS * s, raw.codes);
    return raw;
  }
};

struct MQ2_Bits : CountedGroup<blocks::MQ2_Lloyd> {
  // Even bits come from the first word of a pair, odd bits from the second.
  DEVICE void load_x(const float* x, int i, float (&v)[PER_LANE]) {
    const Quad* quads = reinterpret_cast<const Quad*>(x + i / 4 * 32) + i % 4;
    const Quad first = quads[0], second = quads[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[2 * j] = first.v[j];
      v[2 * j + 1] = second.v[j];
    }
  }
  DEVICE void bits(const Raw& raw, int i, uint32_t (&set)[SETS]) {
    const uint32_t a = raw.codes[2 * i], b = raw.codes[2 * i + 1];
    set[0] = choose(0x55555555, a, b << 1);
    set[1] = choose(0x55555555, a >> 1, b);
    set[2] = set[0] & set[1];
  }
};

struct MQ3_Bits : CountedGroup<blocks::MQ3_Lloyd> {
  // The lowest bit of code i is bit 3i of the three words together, and so bit 3i % 32 of one of them: each place of a word
  // belongs to one code.
  DEVICE void load_x(const float* x, int i, float (&v)[PER_LANE]) {
    const float* eight[4];    // column 11 · (8q + j) % 32 lies in eight 11 · j / 8 - q
#pragma unroll
    for (int e = 0; e < 4; e++) eight[e] = x + i / 4 * 32 + 8 * ((e - i) & 3);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) v[j] = eight[11 * j / 8 % 4][11 * j % 8];
  }
  // Bit k of all codes: for code i, bit (3i + k) % 32 of that one of the three words which has it.
  DEVICE uint32_t third(const uint32_t* w, int k) {
    constexpr uint32_t MASK[3] = {0x49249249, 0x92492492, 0x24924924};
    const uint32_t v = choose(MASK[(k + 2) % 3], w[2], choose(MASK[k], w[0], w[1]));
    return k ? v >> k | v << (32 - k) : v;
  }
  DEVICE void bits(const Raw& raw, int i, uint32_t (&set)[SETS]) {
    set[0] = third(raw.codes + 3 * i, 0);
    set[1] = third(raw.codes + 3 * i, 1);
    set[3] = third(raw.codes + 3 * i, 2);
    set[2] = set[0] & set[1];
    set[4] = set[0] & set[3];
    set[5] = set[1] & set[3];
    set[6] = set[2] & set[3];
  }
};

template <class Format>
struct BitDot {
  static constexpr int PLANES = 24, TILES = PLANES / 8, WORDS = 8;    // bits of x, tiles of 8 of them, words of a plane
  static constexpr int UNIT = PLANES * WORDS, STAGE = UNIT + 8;       // words of LDS that a group of x takes
  static constexpr int ROWS = Format::ROWS, TEAM = GROUP / Format::SLICE, SETS = Format::SETS;
  // Found best on an H200: groups that are multiplied at once; stages of the ring that are being filled at a time, and those that
  // are asked for before x has come, or -1 where that does not matter; groups of x in LDS, more where stages leave room.
  static constexpr int AT_ONCE = SETS > 3 ? 1 : 3, UNDER_WAY = 2, AT_FIRST = SETS > 3 ? 2 : -1, AT_FIRST_ACTIVATED = 2;
  static constexpr int X_GROUPS = SETS > 3 ? CHUNK : 2 * CHUNK;
  static constexpr bool SHIFTS = false;    // whether rows that meet in a bank are put apart
  static constexpr int TOP = 21;    // the largest element's power of two, in units
  static constexpr float HIGH = 12582912.0f;    // 1.5 · 2^23: f32 from 2^23 to 2^24 are whole numbers
  static constexpr float LIFT = 16777216.0f;    // 2^24
  static constexpr uint32_t NEGATIVE = 0x8000;
  float sum[ROWS] = {};
  uint32_t weight[TILES][SETS];    // of counts of set f in the sum of the lane's code

  DEVICE_MEMBER BitDot() {
    const int code = lane() / TEAM, part = lane() % TEAM;
    const uint32_t powers = (15 + 2 * part) << 10 | (16 + 2 * part) << 26;    // of two, f16: of bits 2 · part and 2 · part + 1
    const uint32_t top = part == 3 ? NEGATIVE << 16 : 0;                      // the sign of a signed byte's highest bit
#pragma unroll
    for (int f = 0; f < SETS; f++) {
      const int set = f + 1, more = set & ~code;    // code's columns: those of its bits, less those that have more bits
      const bool has = code < Format::LEVELS && (set & code) == code;
      const uint32_t sign = (more ^ more >> 1 ^ more >> 2) & 1 ? NEGATIVE | NEGATIVE << 16 : 0;
      weight[0][f] = has ? powers ^ sign ^ top : 0;
      weight[1][f] = has ? powers ^ sign : 0;
      weight[2][f] = has ? (powers + (8 << 10 | 8 << 26)) ^ sign ^ top : 0;
    }
  }

  // Where a lane reads of a group of x in LDS.
  struct Staged {
    const uint8_t* planes;
    const float* unit;
    explicit DEVICE_MEMBER Staged(const float* group)
        : planes(reinterpret_cast<const uint8_t*>(group + lane() / TEAM * WORDS + 2 * (lane() % TEAM))),
          unit(group + UNIT + 2 * (lane() % TEAM)) {}
    DEVICE_MEMBER void move(int groups) {
      planes += groups * STAGE * sizeof(float);
      unit += groups * STAGE;
    }
  };

  static DEVICE_MEMBER void load_x(const float* x, int i, float (&v)[PER_LANE]) { Format::load_x(x, i, v); }

  // Eight bytes, four in `low` and four in `high`, are transposed as 8 × 8 bits: bit p of all of them becomes byte p.
  static DEVICE_MEMBER void transpose(uint32_t& low, uint32_t& high) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t& v = half ? high : low;
      const uint32_t one = (v ^ v >> 7) & 0x00aa00aa;
      v ^= one ^ one << 7;
      const uint32_t two = (v ^ v >> 14) & 0x0000cccc;
      v ^= two ^ two << 14;
    }
    const uint32_t upper = choose(0xf0f0f0f0, high, low >> 4);
    low = choose(0x0f0f0f0f, low, high << 4);
    high = upper;
  }

  // A lane's eight elements of a group into LDS.
  static DEVICE_MEMBER void stage(float* staged, const float (&x)[PER_LANE]) {
    const Units units = units_of<TOP>(x);
    uint32_t u[PER_LANE], total = 0;    // two's complement
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      u[j] = __float_as_uint(fmaf(x[j] * units.lift, units.inverse, HIGH)) - 0x4b400000;
      total += u[j];
      u[j] = (u[j] + 0x80) ^ 0x80;    // a signed byte, and two more bytes
    }
    const int odd = lane() % 2, upper = lane() / 2 % 2;
    uint32_t* words = reinterpret_cast<uint32_t*>(staged) + lane() / 4 + odd * WORDS;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const uint32_t pick = 0x40 + 0x11 * tile;
      uint32_t eight[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t* v = u + 4 * half;
        eight[half] = permute(permute(v[0], v[1], pick), permute(v[2], v[3], pick), 0x5410);
      }
      transpose(eight[0], eight[1]);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // Four lanes have a byte each of four planes; each of them gets one plane.
        const uint32_t two = permute(eight[half], __shfl_xor(eight[half], 1), odd ? 0x3715 : 0x6240);
        const uint32_t four = permute(two, __shfl_xor(two, 2), upper ? 0x3276 : 0x5410);
        words[(8 * tile + 4 * half + 2 * upper) * WORDS] = four;
      }
    }
    total = wave_total(total);
    if (lane() < TEAM) {    // code 0 has the columns of none of the sets
      staged[UNIT + 2 * lane()] = units.unit * units.lower;
      staged[UNIT + 2 * lane() + 1] = lane() == 0 ? (float)(int)total / LIFT : 0.0f;
    }
  }

  DEVICE_MEMBER void add(const typename Format::Raw (&raw)[ROWS], const float* staged, const float*) { add(raw, Staged(staged)); }

  DEVICE_MEMBER void add(const typename Format::Raw (&raw)[ROWS], const Staged& staged) {
    uint32_t a[2][SETS], b[2][SETS];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Format::bits(raw[0], i, a[i]);
      Format::bits(raw[1], i, b[i]);
    }
    uint32_t x[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) read_words(staged.planes + tile * 8 * WORDS * sizeof(float), x[tile]);
    // Of rows `code` and code + 8, codes 2 · part and 2 · part + 1: of the lowest byte of x, and of the others. Both are exact: no
    // product or sum of whole numbers reaches 2^24, since 256 elements have at most 2^TOP · 2 units each.
    Sums low = {}, high = {};
    uint32_t upper[TILES], lower[TILES], before[2];    // pairs of counts; of the set before
#pragma unroll
    for (int f = 0; f < SETS; f++) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {    // the unit is quickest where its left factor stays
        const Counts count = count_common(a[0][f], b[0][f], a[1][f], b[1][f], x[tile][0], x[tile][1]);
        upper[tile] = pair_of(count.v[0], count.v[1]);
        lower[tile] = pair_of(count.v[2], count.v[3]);
      }
      multiply_halves(high, upper[1], lower[1], upper[2], lower[2], weight[1][f], weight[2][f]);
      if (f % 2) {
        multiply_halves(low, before[0], before[1], upper[0], lower[0], weight[0][f - 1], weight[0][f]);
      } else if (f == SETS - 1) {
        multiply_halves(low, upper[0], lower[0], weight[0][f]);
      }
      before[0] = upper[0];
      before[1] = lower[0];
    }
    const float unit = staged.unit[0], none = staged.unit[1];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float level[2], product = 0.0f;
      halves(raw[r].levels, level[0], level[1]);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float whole = fmaf(high.v[2 * r + i], (float)(1 << 8), low.v[2 * r + i]);
        product = fmaf(level[i], i == 0 ? whole + none : whole, product);
      }
      sum[r] = fmaf(unit, product * LIFT, sum[r]);
    }
  }

  DEVICE_MEMBER float total() { return team_total<TEAM>(sum); }
};
#endif
