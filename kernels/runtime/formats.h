// The block formats as lanes read them: a group of 256 is cut into slices of SLICE elements, one a lane, and a lane works
// on ROWS rows at a time. One struct per format, named as in mq_quant.formats.blocks with '-' written '_'. BYTES counts a
// group of 256 (eight blocks for Q8F16), VALUE the bytes of a value in formats of single values.
//   load     the raw bytes that a lane needs for slice s of a group; it computes nothing, so that many loads can be under way
//   weights  the decoded elements, with the bits of blocks.py
//   dot      their product with x, added to `sum`; affine formats take scale and zero out of it (x_sum is the sum of x)
//   Counted  the struct for units that count bits (bits.h), where the format has one
//   Bytes    the struct for units that multiply tiles of bytes (bytes.h), where it has one
// Alignment: 8 bytes for the MQ formats, 2 for Q8F16, else that of the value.
#pragma once
#include "device.h"

template <class Format>
DEVICE float dot_weights(const typename Format::Raw& raw, const float (&x)[Format::SLICE], float sum) {
  float w[Format::SLICE];
  Format::weights(raw, w);
#pragma unroll
  for (int j = 0; j < Format::SLICE; j++) sum = fmaf(w[j], x[j], sum);
  return sum;
}

// 2^BITS + q as a float, for the code q that begins at bit `shift`: q is put into the mantissa of 2^BITS, which is exact and
// needs no conversion.
template <int BITS>
DEVICE float lifted(uint32_t codes, int shift) {
  const int up = 23 - BITS - shift;
  const uint32_t placed = up >= 0 ? codes << (up & 31) : codes >> (-up & 31);
  return __int_as_float(and_or(placed, ((1u << BITS) - 1) << (23 - BITS), (127u + BITS) << 23));
}

// Bits 24k .. 24k+23 of a little-endian stream of words, in the lowest 24 bits; the bits above them are undefined.
DEVICE uint32_t bits24(const uint32_t* words, int k) {
  const int word = 24 * k / 32, shift = 24 * k % 32;
  return shift <= 8 ? words[word] >> shift : words[word] >> shift | words[word + 1] << (32 - shift);
}

struct F32 : blocks::F32 {
  struct Raw {
    float w[SLICE];
  };
  DEVICE float value(const uint8_t* payload, int64_t i) { return load_f32(payload + VALUE * i); }
  DEVICE Raw load(const uint8_t* group, int s) {
    Raw raw;
#pragma unroll
    for (int j = 0; j < SLICE; j++) raw.w[j] = load_f32(group + VALUE * (SLICE * s + j));
    return raw;
  }
  DEVICE void weights(const Raw& raw, float (&w)[SLICE]) {
#pragma unroll
    for (int j = 0; j < SLICE; j++) w[j] = raw.w[j];
  }
  DEVICE float dot(const Raw& raw, const float (&x)[SLICE], float, float sum) { return dot_weights<F32>(raw, x, sum); }
};

struct F16 : blocks::F16 {
  struct Raw {
    uint16_t bits[SLICE];
  };
  DEVICE float value(const uint8_t* payload, int64_t i) { return load_f16(payload + VALUE * i); }
  DEVICE Raw load(const uint8_t* group, int s) {
    Raw raw;
#pragma unroll
    for (int j = 0; j < SLICE; j++) raw.bits[j] = fetch_u16(group + VALUE * (SLICE * s + j));
    return raw;
  }
  DEVICE void weights(const Raw& raw, float (&w)[SLICE]) {
#pragma unroll
    for (int j = 0; j < SLICE; j++) w[j] = half_to_float(raw.bits[j]);
  }
  DEVICE float dot(const Raw& raw, const float (&x)[SLICE], float, float sum) { return dot_weights<F16>(raw, x, sum); }
};

// Blocks of an f16 scale and signed bytes, a few lanes to a block.
struct Q8_Bytes;
struct Q8F16 : blocks::Q8F16 {
  using Bytes = Q8_Bytes;
  static constexpr int LANES = BLOCK_WEIGHTS / SLICE;
  struct Raw {
    uint16_t scale, pairs[SLICE / 2];
  };
  DEVICE Raw load(const uint8_t* group, int s) {
    const uint8_t* block = group + BLOCK * (s / LANES);
    Raw raw;
    raw.scale = fetch_u16(block);
#pragma unroll
    for (int j = 0; j < SLICE / 2; j++) raw.pairs[j] = fetch_u16(block + HEAD + SLICE * (s % LANES) + 2 * j);
    return raw;
  }
  DEVICE void weights(const Raw& raw, float (&w)[SLICE]) {
    const float scale = half_to_float(raw.scale);
#pragma unroll
    for (int j = 0; j < SLICE; j++) w[j] = scale * (float)(int8_t)(raw.pairs[j / 2] >> (8 * (j % 2)) & 0xff);
  }
  DEVICE float dot(const Raw& raw, const float (&x)[SLICE], float x_sum, float sum) {
    constexpr int LIFTED = LEVELS + LEVELS / 2;    // 2^BITS of lifted codes, and half of it, which makes them unsigned
    float part = -(float)LIFTED * x_sum;
#pragma unroll
    for (int j = 0; j < SLICE; j++) {
      part = fmaf(lifted<BITS>(raw.pairs[j / 2] ^ 0x8080u, 8 * (j % 2)), x[j], part);
    }
    return fmaf(half_to_float(raw.scale), part, sum);
  }
};

// A group as words: HEAD bytes of scale and zero or of levels, then the codes; a lane takes the head and as many words of codes
// as a code has bits.
template <class Block>
struct Packed : Block {
  static constexpr int HEAD = Block::HEAD, WORDS = Block::BITS;
  static_assert(Block::SLICE == 32, "a lane's codes fill whole words");
  struct Raw {
    uint32_t head[HEAD / 4], codes[WORDS];
  };
  DEVICE Raw load(const uint8_t* group, int s) {
    Raw raw;
    fetch_words(group, raw.head);
    fetch_words(group + HEAD + 4 * WORDS * s, raw.codes);
    return raw;
  }
};

// Groups of f32 scale, f32 zero and codes: w = zero + scale · q, the product rounded before the sum.
template <class Format, class Block>
struct Affine : Packed<Block> {
  using typename Packed<Block>::Raw;
  static constexpr int SLICE = Block::SLICE, BITS = Block::BITS;
  DEVICE void weights(const Raw& raw, float (&w)[SLICE]) {
    const float scale = __int_as_float(raw.head[0]), zero = __int_as_float(raw.head[1]);
#pragma unroll
    for (int j = 0; j < SLICE; j++) {
      w[j] = zero + scale * (float)(int)(Format::codes(raw, j) >> Format::shift(j) & ((1u << BITS) - 1));
    }
  }
  DEVICE float dot(const Raw& raw, const float (&x)[SLICE], float x_sum, float sum) {
    const float scale = __int_as_float(raw.head[0]), zero = __int_as_float(raw.head[1]);
    float part = -(float)Block::LEVELS * x_sum;
#pragma unroll
    for (int j = 0; j < SLICE; j++) {
      part = fmaf(lifted<BITS>(Format::codes(raw, j), Format::shift(j)), x[j], part);
    }
    return fmaf(scale, part, fmaf(zero, x_sum, sum));
  }
};

struct MQ4_Bytes;
struct MQ6_Bytes;
struct MQ4 : Affine<MQ4, blocks::MQ4> {
  using Bytes = MQ4_Bytes;
  DEVICE uint32_t codes(const Raw& raw, int j) { return raw.codes[j / 8]; }
  DEVICE int shift(int j) { return BITS * (j % 8); }
};

struct MQ6 : Affine<MQ6, blocks::MQ6> {
  using Bytes = MQ6_Bytes;
  DEVICE uint32_t codes(const Raw& raw, int j) { return bits24(raw.codes, j / 4); }
  DEVICE int shift(int j) { return BITS * (j % 4); }
};

// Groups of an ascending f16 codebook and codes: w = codebook[code].
struct MQ2_Bits;
struct MQ3_Bits;
struct MQ2_Lloyd : Packed<blocks::MQ2_Lloyd> {
  using Counted = MQ2_Bits;
  DEVICE void weights(const Raw& raw, float (&w)[SLICE]) {
    const Book book = make_book(raw.head[0], raw.head[1], 0, 0);
#pragma unroll
    for (int i = 0; i < SLICE / 8; i++) {
      const uint32_t even = raw.codes[i / 2] & 0x33333333, odd = raw.codes[i / 2] >> 2 & 0x33333333;
      float at_even[4], at_odd[4];
      pick4(book, even >> (16 * (i % 2)), at_even);
      pick4(book, odd >> (16 * (i % 2)), at_odd);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        w[8 * i + 2 * j] = at_even[j];
        w[8 * i + 2 * j + 1] = at_odd[j];
      }
    }
  }
  DEVICE float dot(const Raw& raw, const float (&x)[SLICE], float, float sum) {
    return dot_weights<MQ2_Lloyd>(raw, x, sum);
  }
};

struct MQ3_Lloyd : Packed<blocks::MQ3_Lloyd> {
  using Counted = MQ3_Bits;
  // Eight codes of three bits, each moved into a nibble: first the upper four codes move up, then two of each four, then one
  // of each two.
  DEVICE uint32_t nibbles(uint32_t codes) {
    codes = (codes & 0xfff) + 16 * (codes & 0xfff000);
    codes += 3 * (codes & 0x0fc00fc0);
    return codes + (codes & 0x38383838);
  }
  DEVICE void weights(const Raw& raw, float (&w)[SLICE]) {
    const Book book = make_book(raw.head[0], raw.head[1], raw.head[2], raw.head[3]);
#pragma unroll
    for (int i = 0; i < SLICE / 8; i++) {
      const uint32_t eight = nibbles(bits24(raw.codes, i));
      pick4(book, eight, reinterpret_cast<float(&)[4]>(w[8 * i]));
      pick4(book, eight >> 16, reinterpret_cast<float(&)[4]>(w[8 * i + 4]));
    }
  }
  DEVICE float dot(const Raw& raw, const float (&x)[SLICE], float, float sum) {
    return dot_weights<MQ3_Lloyd>(raw, x, sum);
  }
};

struct MQ4_Lloyd : Packed<blocks::MQ4_Lloyd> {
  DEVICE void weights(const Raw& raw, float (&w)[SLICE]) {
    const Book lower = make_book(raw.head[0], raw.head[1], raw.head[2], raw.head[3]);
    const Book upper = make_book(raw.head[4], raw.head[5], raw.head[6], raw.head[7]);
#pragma unroll
    for (int i = 0; i < SLICE / 4; i++) {
      const uint32_t four = raw.codes[i / 2] >> (16 * (i % 2));
      float low[4], high[4];
      pick4(lower, four & 0x7777, low);
      pick4(upper, four & 0x7777, high);
#pragma unroll
      for (int j = 0; j < 4; j++) w[4 * i + j] = four >> (4 * j + 3) & 1 ? high[j] : low[j];
    }
  }
  DEVICE float dot(const Raw& raw, const float (&x)[SLICE], float, float sum) {
    return dot_weights<MQ4_Lloyd>(raw, x, sum);
  }
};
