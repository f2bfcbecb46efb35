// Products of a team's rows with x on units that count the bits which two tiles have in common, for GPUs whose header defines
// MQ_BITS. Each set f of a code's bits has a share d[f], and a level is w = Σ d[f] over the sets whose bits are all 1. So a
// row's product needs, for each set, the sum of x over the columns in which all bits of the set are 1. x becomes whole
// numbers in two's complement, in a unit that follows the group's largest element. A tile's column holds one bit of each of
// these numbers, and the unit counts exactly how many bits rows and columns share, straight from the packed codes. Four lanes
// share a row, and eight such teams a tile of 16 rows; lane s has the 32 columns of words s and s + 4. Sums over columns are
// whole numbers, sums over groups f32.
#pragma once
#include "forward_constants.h"    // made by geometry.py
#include "units.h"

#ifdef MQ_BITS
// Formats for BitDot. `bits` gives, for word i of the lane, the columns in which all bits of a set are 1, in the order in which
// `load_x` takes columns; `shares` gives the d of each set, and returns that of the empty set. LDS holds all rows of products
// of at most WHOLE matrices, and then a turn of the loop takes UNROLLED groups.
template <class Block>
struct CountedGroup {
  static constexpr int BYTES = Block::BYTES, HEAD = Block::HEAD, WORDS = Block::BITS, SETS = Block::LEVELS - 1;
  static constexpr int SLICE = Block::COUNTED_SLICE, ROWS = Block::COUNTED_ROWS;
  struct Raw {
    uint32_t head[HEAD / 4], codes[2][WORDS];
  };
  DEVICE Raw load(const uint8_t* group, int s) {
    Raw raw;
    fetch_words(group, raw.head);
    fetch_words(group + HEAD + 4 * WORDS * s, raw.codes[0]);
    fetch_words(group + HEAD + 4 * WORDS * (4 + s), raw.codes[1]);
    return raw;
  }
  DEVICE Raw read(const uint8_t* group, int s) {    // from LDS
    Raw raw;
    read_words(group, raw.head);
    read_words(group + HEAD + 4 * WORDS * s, raw.codes[0]);
    read_words(group + HEAD + 4 * WORDS * (4 + s), raw.codes[1]);
    return raw;
  }
};

struct MQ2_Bits : CountedGroup<blocks::MQ2_Lloyd> {
  static constexpr int WHOLE = WHOLE_MQ2_Lloyd, UNROLLED = 1;
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
    const uint32_t a = raw.codes[i][0], b = raw.codes[i][1];
    set[0] = choose(0x55555555, a, b << 1);
    set[1] = choose(0x55555555, a >> 1, b);
    set[2] = set[0] & set[1];
  }
  DEVICE float shares(const Raw& raw, float (&d)[SETS]) {
    float l[4];
    halves(raw.head[0], l[0], l[1]);
    halves(raw.head[1], l[2], l[3]);
    d[0] = l[1] - l[0];
    d[1] = l[2] - l[0];
    d[2] = (l[3] - l[2]) - d[0];
    return l[0];
  }
};

struct MQ3_Bits : CountedGroup<blocks::MQ3_Lloyd> {
  static constexpr int WHOLE = WHOLE_MQ3_Lloyd, UNROLLED = 3;
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
  DEVICE uint32_t third(const uint32_t (&w)[3], int k) {
    constexpr uint32_t MASK[3] = {0x49249249, 0x92492492, 0x24924924};
    const uint32_t v = choose(MASK[(k + 2) % 3], w[2], choose(MASK[k], w[0], w[1]));
    return k ? v >> k | v << (32 - k) : v;
  }
  DEVICE void bits(const Raw& raw, int i, uint32_t (&set)[SETS]) {
    set[0] = third(raw.codes[i], 0);
    set[1] = third(raw.codes[i], 1);
    set[3] = third(raw.codes[i], 2);
    set[2] = set[0] & set[1];
    set[4] = set[0] & set[3];
    set[5] = set[1] & set[3];
    set[6] = set[2] & set[3];
  }
  DEVICE float shares(const Raw& raw, float (&d)[SETS]) {
    float l[8];
#pragma unroll
    for (int i = 0; i < 4; i++) halves(raw.head[i], l[2 * i], l[2 * i + 1]);
#pragma unroll
    for (int bit = 1; bit < 8; bit *= 2) {
#pragma unroll
      for (int i = 0; i < 8; i++) l[i] -= i & bit ? l[i ^ bit] : 0.0f;
    }
#pragma unroll
    for (int f = 0; f < SETS; f++) d[f] = l[f + 1];
    return l[0];
  }
};

template <class Format>
struct BitDot {
  static constexpr int PLANES = 24, TILES = PLANES / 8, WORDS = 8;    // bits of x, tiles of 8 of them, words of a plane
  static constexpr int UNIT = PLANES * WORDS, STAGE = UNIT + 4;       // words of LDS that a group of x takes
  static constexpr int ROWS = Format::ROWS, TEAM = GROUP / Format::SLICE, SETS = Format::SETS;
  static constexpr int AT_ONCE = 1;    // groups that are multiplied at once
  static constexpr int TOP = 21;    // the largest element's power of two, in units
  static constexpr float HIGH = 12582912.0f;    // 1.5 · 2^23: f32 from 2^23 to 2^24 are whole numbers
  float sum[ROWS] = {};

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

  // The column, counted through all tiles, of bit 2 · pair. Six bits that follow one another come to the same lanes.
  static DEVICE_MEMBER constexpr int place(int pair) { return pair % 3 * 8 + pair / 3 * 2; }

  // A lane's eight elements of a group into LDS.
  static DEVICE_MEMBER void stage(float* staged, const float (&x)[PER_LANE]) {
    const Units units = units_of<TOP>(x);
    uint32_t u[PER_LANE], total = 0;    // two's complement
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      u[j] = __float_as_uint(fmaf(x[j] * units.lift, units.inverse, HIGH)) - 0x4b400000;
      total += u[j];
    }
    const int odd = lane() % 2, upper = lane() / 2 % 2;
    uint32_t* words = reinterpret_cast<uint32_t*>(staged) + lane() / 4 % 4 * 2 + lane() / 16 + odd * WORDS;
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
        const int pair = 4 * tile + 2 * half, step = pair % 3 < 2 ? 8 : 2 - 16;    // to the next pair's place
        words[(place(pair) + step * upper) * WORDS] = four;
      }
    }
    total = wave_total(total);
    if (lane() == 0) {
      staged[UNIT] = units.unit * units.lower;
      staged[UNIT + 1] = (float)(int)total;
    }
  }

  DEVICE_MEMBER void add(const typename Format::Raw (&raw)[ROWS], const float* staged, const float*) {
    const int column = lane() / 4, part = lane() % 4;
    uint32_t a[2][SETS], b[2][SETS];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Format::bits(raw[0], i, a[i]);
      Format::bits(raw[1], i, b[i]);
    }
    // Of rows `column` and column + 8, and bits 6 · part to 6 · part + 5 of x, the highest of which counts down.
    int of[SETS][2] = {};
    const int highest = part == 3 ? -2 : 2;
#pragma unroll
    for (int tile = TILES - 1; tile >= 0; tile--) {
      uint32_t x[2];
      read_words(reinterpret_cast<const uint8_t*>(staged + (8 * tile + column) * WORDS + 2 * part), x);
#pragma unroll
      for (int f = 0; f < SETS; f++) {
        const Counts count = count_common(a[0][f], b[0][f], a[1][f], b[1][f], x[0], x[1]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
          of[f][r] = of[f][r] * 4 + (count.v[2 * r] + (tile == TILES - 1 ? highest : 2) * count.v[2 * r + 1]);
        }
      }
    }
    const float unit = staged[UNIT] * (float)(1 << (6 * part)), total = part == 0 ? staged[UNIT + 1] : 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float d[SETS];
      float product = Format::shares(raw[r], d) * total;
#pragma unroll
      for (int f = 0; f < SETS; f++) product = fmaf(d[f], (float)of[f][r], product);
      sum[r] = fmaf(unit, product, sum[r]);
    }
  }

  DEVICE_MEMBER float total() { return team_total<TEAM>(sum); }
};
#endif
