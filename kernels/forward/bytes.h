// Products of rows with x on units that multiply tiles of signed bytes, for formats whose codes are whole numbers. x becomes
// whole numbers of four digits from -128 to 127, in a unit that follows the group's largest element. Eight teams of four lanes
// have a row each. A tile of 16 rows has a row twice: the first half of its group, and in row + 8 the other half; columns 0 to
// 3 are the digits of x for the first half, columns 4 to 7 those for the other, and products of one half with the other are
// left out. So lane s of a team gets two digits, s % 2, of half s / 2. It reads 16 words of four bytes, eight of each half.
// Sums over elements are whole numbers, sums over halves and digits f32.
#pragma once
#include "forward_constants.h"    // made by geometry.py
#include "units.h"

#ifdef MQ_BITS
// Formats for ByteDot. Eight neighbouring elements, the i-th of a group, become a pair of words: `place` says whose, the
// `pair`-th of lane `part`, `load_x` in which order, and `bytes` gives the words of a pair. RUN pairs that follow one another
// share a scale. `zero` is what each element has beside its scaled code.
struct Place {
  int part, pair;
};

struct MQ4_Bytes : blocks::MQ4 {
  static constexpr int RUN = 4;
  struct Raw {
    uint32_t head[2], codes[4][2];
  };
  DEVICE Raw read(const uint8_t* group, int part) {
    Raw raw;
    read_words(group, raw.head);
#pragma unroll
    for (int i = 0; i < 4; i++) read_words(group + HEAD + 32 * i + 8 * part, raw.codes[i]);
    return raw;
  }
  DEVICE Place place(int i) { return {i / 2 % 4, i / 8 * 2 + i % 2}; }
  // The lower four bits of a word's bytes are its even codes.
  DEVICE void load_x(const float* x, int i, float (&v)[PER_LANE]) {
    float eight[PER_LANE];
    load_eight(x, i, eight);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) v[j] = eight[j % 4 * 2 + j / 4];
  }
  DEVICE void bytes(const Raw& raw, int pair, uint32_t& a, uint32_t& b) {
    const uint32_t word = raw.codes[pair / 2][pair % 2];
    a = word & 0x0f0f0f0f;
    b = word >> 4 & 0x0f0f0f0f;
  }
  DEVICE float scale(const Raw& raw, int) { return __int_as_float(raw.head[0]); }
  DEVICE float zero(const Raw& raw) { return __int_as_float(raw.head[1]); }
};

struct MQ6_Bytes : blocks::MQ6 {
  static constexpr int RUN = 4;
  struct Raw {
    uint32_t head[2], codes[2][6];
  };
  DEVICE Raw read(const uint8_t* group, int part) {
    Raw raw;
    read_words(group, raw.head);
#pragma unroll
    for (int i = 0; i < 2; i++) read_words(group + HEAD + 96 * i + 24 * part, raw.codes[i]);
    return raw;
  }
  DEVICE Place place(int i) { return {i / 4 % 4, i / 16 * 4 + i % 4}; }
  DEVICE void load_x(const float* x, int i, float (&v)[PER_LANE]) { load_eight(x, i, v); }
  // Four codes of six bits, each moved into a byte: first the upper two move up, then the second of each two.
  DEVICE uint32_t spread(uint32_t codes) {
    codes &= 0xffffff;
    codes += 15 * (codes & 0xfff000);
    return codes + 3 * (codes & 0x0fc00fc0);
  }
  DEVICE void bytes(const Raw& raw, int pair, uint32_t& a, uint32_t& b) {
    a = spread(bits24(raw.codes[pair / 4], pair % 4 * 2));
    b = spread(bits24(raw.codes[pair / 4], pair % 4 * 2 + 1));
  }
  DEVICE float scale(const Raw& raw, int) { return __int_as_float(raw.head[0]); }
  DEVICE float zero(const Raw& raw) { return __int_as_float(raw.head[1]); }
};

struct Q8_Bytes : blocks::Q8F16 {
  static constexpr int RUN = 1;
  struct Raw {
    uint32_t words[8][2];
    uint16_t scales[4];    // of this lane's half
  };
  DEVICE Raw read(const uint8_t* group, int part) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint8_t* codes = group + BLOCK * i + HEAD + 8 * part;
      if (i % 2) {
        raw.words[i][0] = load_u32(codes);
        raw.words[i][1] = load_u32(codes + 4);
      } else {    // between multiples of four bytes
        const uint32_t middle = load_u32(codes + 2);
        raw.words[i][0] = permute(load_u32(codes - 2), middle, 0x5432);
        raw.words[i][1] = permute(middle, load_u32(codes + 6), 0x5432);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) raw.scales[i] = load_u16(group + BLOCK * (i + part / 2 * 4));
    return raw;
  }
  DEVICE Place place(int i) { return {i % 4, i / 4}; }
  DEVICE void load_x(const float* x, int i, float (&v)[PER_LANE]) { load_eight(x, i, v); }
  DEVICE void bytes(const Raw& raw, int pair, uint32_t& a, uint32_t& b) {
    a = raw.words[pair][0];
    b = raw.words[pair][1];
  }
  DEVICE float scale(const Raw& raw, int pair) { return half_to_float(raw.scales[pair]); }
  DEVICE float zero(const Raw&) { return 0.0f; }
};

template <class Format>
struct ByteDot {
  static constexpr int ROWS = 1, TEAM = 4, DIGITS = 4, PAIRS = 4;    // pairs of words of a half
  static constexpr int UNIT = GROUP * DIGITS / 4, STAGE = UNIT + 4;  // words of LDS that a group of x takes
  static constexpr int DIGIT = 1 << 8;    // what the next digit counts
  // As in bits.h; found best on an H200.
  static constexpr int AT_ONCE = 3, UNDER_WAY = 2, AT_FIRST = -1, AT_FIRST_ACTIVATED = -1, X_GROUPS = CHUNK;
  static constexpr bool SHIFTS = true;    // whether rows that meet in a bank are put apart
  static constexpr int TOP = 29;    // the largest element's power of two, in units
  float sum[ROWS] = {};

  static DEVICE_MEMBER void load_x(const float* x, int i, float (&v)[PER_LANE]) { Format::load_x(x, i, v); }

  // A lane's eight elements of a group into LDS, where each lane has 16 bytes for two pairs of its half.
  static DEVICE_MEMBER void stage(float* staged, const float (&x)[PER_LANE]) {
    const Units units = units_of<TOP>(x);
    uint32_t u[PER_LANE];
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      const int whole = (int)(x[j] * units.lift * units.inverse);
      total += (float)whole;
      u[j] = ((uint32_t)whole + 0x808080) ^ 0x808080;    // its digits
    }
    const Place place = Format::place(lane());
    const int half = place.pair / PAIRS, pair = place.pair % PAIRS;
#pragma unroll
    for (int digit = 0; digit < DIGITS; digit++) {
      const uint32_t pick = 0x40 + 0x11 * digit;
      Pair two;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t* v = u + 4 * i;
        two.v[i] = permute(permute(v[0], v[1], pick), permute(v[2], v[3], pick), 0x5410);
      }
      const int reader = (half * DIGITS + digit) * TEAM + place.part;
      reinterpret_cast<Pair*>(staged)[(pair / 2 * WAVE + reader) * 2 + pair % 2] = two;
    }
    total = wave_sum(total);
    if (lane() == 0) {
      staged[UNIT] = units.unit;
      staged[UNIT + 1] = units.lower;
      staged[UNIT + 2] = total;
    }
  }

  // Where a lane reads of a group of x in LDS.
  struct Staged {
    const uint8_t* digits;
    const float* unit;
    explicit DEVICE_MEMBER Staged(const float* group)
        : digits(reinterpret_cast<const uint8_t*>(group + 4 * lane())), unit(group + UNIT) {}
    DEVICE_MEMBER void move(int groups) {
      digits += groups * STAGE * sizeof(float);
      unit += groups * STAGE;
    }
  };

  DEVICE_MEMBER void add(const typename Format::Raw (&raw)[ROWS], const Staged& staged) {
    const int part = lane() % TEAM;
    float product = 0.0f;
    Counts counts;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
      if (pair % Format::RUN == 0) counts = {};
      uint32_t a[4], x[2];
      Format::bytes(raw[0], pair, a[0], a[2]);
      Format::bytes(raw[0], PAIRS + pair, a[1], a[3]);
      read_words(staged.digits + (pair / 2 * WAVE * 4 + pair % 2 * 2) * sizeof(float), x);
      multiply_bytes(counts, a[0], a[1], a[2], a[3], x[0], x[1]);
      if (pair % Format::RUN == Format::RUN - 1) {
        const int whole = part < 2 ? counts.v[0] + DIGIT * counts.v[1] : counts.v[2] + DIGIT * counts.v[3];
        product = fmaf(Format::scale(raw[0], pair), (float)whole, product);
      }
    }
    product *= part % 2 ? (float)(DIGIT * DIGIT) : 1.0f;
    if (part == 0) product = fmaf(Format::zero(raw[0]), staged.unit[2], product);
    sum[0] += product * staged.unit[0] * staged.unit[1];
  }
};
#endif
