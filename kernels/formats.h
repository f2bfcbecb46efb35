// The block formats as a wave reads them: lane t holds elements 8t .. 8t+7 of a run of 256. One struct per format, named as
// in mq_quant.formats.blocks with '-' written '_'. BYTES counts a run of 256 (eight blocks for Q8F16); LEVELS is the size of
// the codebook that lies in LDS at books[at], 0 where there is none; VALUE the bytes of a value in formats of single values.
//   load     what a lane needs of a run, and nothing computed, so that many loads can be under way
//   weights  the decoded elements, with the bits of blocks.py
//   dot      their product with x, added to `sum`; affine formats take scale and zero out of it (x_sum is the sum of x)
// Alignment: 8 bytes for MQ4 and MQ6, 4 for MQ4_Lloyd, 2 for Q8F16, MQ2_Lloyd and MQ3_Lloyd, else that of the value.
#pragma once
#include "device.h"

template <class Format>
DEVICE float dot_weights(const typename Format::Raw& raw, const float* books, int at, const float (&x)[PER_LANE], float sum) {
  float w[PER_LANE];
  Format::weights(raw, books, at, w);
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) sum = fmaf(w[j], x[j], sum);
  return sum;
}

// 2^BITS + q for the code that begins at bit `shift`: its bits in the mantissa of 2^BITS, exact, with no conversion.
template <int BITS>
DEVICE float lifted(uint32_t codes, int shift) {
  const int up = 23 - BITS - shift;
  const uint32_t placed = up >= 0 ? codes << (up & 31) : codes >> (-up & 31);
  return __int_as_float(and_or(placed, ((1u << BITS) - 1) << (23 - BITS), (127u + BITS) << 23));
}

struct F32 {
  static constexpr int BYTES = 1024, LEVELS = 0, VALUE = 4;
  struct Raw {
    float w[PER_LANE];
  };
  DEVICE float value(const uint8_t* payload, int64_t i) { return load_f32(payload + 4 * i); }
  DEVICE Raw load(const uint8_t* run, int t) {
    Raw raw;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) raw.w[j] = load_f32(run + 4 * (PER_LANE * t + j));
    return raw;
  }
  DEVICE void weights(const Raw& raw, const float*, int, float (&w)[PER_LANE]) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) w[j] = raw.w[j];
  }
  DEVICE float dot(const Raw& raw, const float* books, int at, const float (&x)[PER_LANE], float, float sum) {
    return dot_weights<F32>(raw, books, at, x, sum);
  }
};

struct F16 {
  static constexpr int BYTES = 512, LEVELS = 0, VALUE = 2;
  struct Raw {
    uint16_t bits[PER_LANE];
  };
  DEVICE float value(const uint8_t* payload, int64_t i) { return load_f16(payload + 2 * i); }
  DEVICE Raw load(const uint8_t* run, int t) {
    Raw raw;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) raw.bits[j] = load_u16(run + 2 * (PER_LANE * t + j));
    return raw;
  }
  DEVICE void weights(const Raw& raw, const float*, int, float (&w)[PER_LANE]) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) w[j] = half_to_float(raw.bits[j]);
  }
  DEVICE float dot(const Raw& raw, const float* books, int at, const float (&x)[PER_LANE], float, float sum) {
    return dot_weights<F16>(raw, books, at, x, sum);
  }
};

// Blocks of 34 bytes: f16 scale, 32 signed bytes; four lanes to a block.
struct Q8F16 {
  static constexpr int BYTES = 272, LEVELS = 0, VALUE = 0;
  struct Raw {
    uint16_t scale, pairs[PER_LANE / 2];
  };
  DEVICE Raw load(const uint8_t* run, int t) {
    const uint8_t* block = run + 34 * (t / 4);
    Raw raw;
    raw.scale = load_u16(block);
#pragma unroll
    for (int j = 0; j < PER_LANE / 2; j++) raw.pairs[j] = load_u16(block + 2 + PER_LANE * (t % 4) + 2 * j);
    return raw;
  }
  DEVICE void weights(const Raw& raw, const float*, int, float (&w)[PER_LANE]) {
    const float scale = half_to_float(raw.scale);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) w[j] = scale * (float)(int8_t)(raw.pairs[j / 2] >> (8 * (j % 2)) & 0xff);
  }
  DEVICE float dot(const Raw& raw, const float*, int, const float (&x)[PER_LANE], float x_sum, float sum) {
    float part = -384.0f * x_sum;    // the 256 of lifted codes, and the 128 that makes them unsigned
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      part = fmaf(lifted<8>(raw.pairs[j / 2] ^ 0x8080u, 8 * (j % 2)), x[j], part);
    }
    return fmaf(half_to_float(raw.scale), part, sum);
  }
};

// Groups of f32 scale, f32 zero and codes: w = zero + scale · q, the product rounded before the sum.
template <class Format, class Fields>
struct Affine {
  using Raw = Fields;
  static constexpr int LEVELS = 0, VALUE = 0;
  DEVICE void weights(const Raw& raw, const float*, int, float (&w)[PER_LANE]) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      const uint32_t codes = Format::codes(raw, j), mask = (1u << Format::BITS) - 1;
      w[j] = raw.head.zero + raw.head.scale * (float)(int)(codes >> Format::shift(j) & mask);
    }
  }
  DEVICE float dot(const Raw& raw, const float*, int, const float (&x)[PER_LANE], float x_sum, float sum) {
    float part = -(float)(1 << Format::BITS) * x_sum;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      part = fmaf(lifted<Format::BITS>(Format::codes(raw, j), Format::shift(j)), x[j], part);
    }
    return fmaf(raw.head.scale, part, fmaf(raw.head.zero, x_sum, sum));
  }
};

struct alignas(8) Head {
  float scale, zero;
};

DEVICE Head load_head(const uint8_t* group) { return *reinterpret_cast<const Head*>(group); }

struct MQ4_Fields {
  Head head;
  uint32_t codes;
};
struct MQ4 : Affine<MQ4, MQ4_Fields> {
  static constexpr int BYTES = 136, BITS = 4;
  DEVICE Raw load(const uint8_t* group, int t) { return {load_head(group), load_u32(group + 8 + 4 * t)}; }
  DEVICE uint32_t codes(const Raw& raw, int) { return raw.codes; }
  DEVICE int shift(int j) { return 4 * j; }
};

struct MQ6_Fields {
  Head head;
  uint32_t low, high;
};
struct MQ6 : Affine<MQ6, MQ6_Fields> {
  static constexpr int BYTES = 200, BITS = 6;
  DEVICE Raw load(const uint8_t* group, int t) {
    const uint8_t* p = group + 8 + 6 * t;
    const uint32_t a = load_u16(p), b = load_u16(p + 2), c = load_u16(p + 4);
    return {load_head(group), a | (b & 0xff) << 16, b >> 8 | c << 8};
  }
  DEVICE uint32_t codes(const Raw& raw, int j) { return j < 4 ? raw.low : raw.high; }
  DEVICE int shift(int j) { return 6 * (j % 4); }
};

// Groups of an ascending f16 codebook and codes: w = codebook[code].
template <class Format, int BITS>
struct Lloyd {
  static constexpr int LEVELS = 1 << BITS, VALUE = 0;
  struct Raw {
    uint32_t codes;
  };
  DEVICE void weights(const Raw& raw, const float* books, int at, float (&w)[PER_LANE]) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) w[j] = books[at | (raw.codes >> (BITS * j) & (LEVELS - 1))];
  }
  DEVICE float dot(const Raw& raw, const float* books, int at, const float (&x)[PER_LANE], float, float sum) {
    return dot_weights<Format>(raw, books, at, x, sum);
  }
};

struct MQ2_Lloyd : Lloyd<MQ2_Lloyd, 2> {
  static constexpr int BYTES = 72;
  DEVICE Raw load(const uint8_t* group, int t) { return {load_u16(group + 8 + 2 * t)}; }
};

struct MQ3_Lloyd : Lloyd<MQ3_Lloyd, 3> {
  static constexpr int BYTES = 112;
  DEVICE Raw load(const uint8_t* group, int t) {
    const uint8_t* pair = group + 16 + (3 * t & ~1);    // three bytes within two aligned halfwords
    return {(load_u16(pair) | load_u16(pair + 2) << 16) >> (8 * (t & 1)) & 0xffffff};
  }
};

struct MQ4_Lloyd : Lloyd<MQ4_Lloyd, 4> {
  static constexpr int BYTES = 160;
  DEVICE Raw load(const uint8_t* group, int t) { return {load_u32(group + 32 + 4 * t)}; }
};
