// The block formats as a wave reads them: lane t decodes elements 8t .. 8t+7 of a run of 256. One struct per format, named
// as in mq_quant.formats.blocks with '-' written '_'. BYTES counts a run of 256 (eight blocks for Q8F16); LEVELS is the size
// of the codebook that `weights` finds in LDS, 0 where it needs none. The decoded bits are those of blocks.py.
// Alignment: 2 bytes for Q8F16, MQ2_Lloyd and MQ3_Lloyd, 4 for the other MQ formats, that of the value for F16 and F32.
#pragma once
#include "device.h"

struct F32 {
  static constexpr int BYTES = 1024, LEVELS = 0, VALUE = 4;
  DEVICE float value(const uint8_t* payload, int64_t i) { return load_f32(payload + 4 * i); }
  DEVICE void weights(const uint8_t* run, const float*, int t, float (&w)[PER_LANE]) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) w[j] = load_f32(run + 4 * (PER_LANE * t + j));
  }
};

struct F16 {
  static constexpr int BYTES = 512, LEVELS = 0, VALUE = 2;
  DEVICE float value(const uint8_t* payload, int64_t i) { return load_f16(payload + 2 * i); }
  DEVICE void weights(const uint8_t* run, const float*, int t, float (&w)[PER_LANE]) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) w[j] = load_f16(run + 2 * (PER_LANE * t + j));
  }
};

// Blocks of 34 bytes: f16 scale, 32 signed bytes; four lanes to a block.
struct Q8F16 {
  static constexpr int BYTES = 272, LEVELS = 0, VALUE = 0;
  DEVICE void weights(const uint8_t* run, const float*, int t, float (&w)[PER_LANE]) {
    const uint8_t* block = run + 34 * (t / 4);
    const float scale = load_f16(block);
#pragma unroll
    for (int j = 0; j < PER_LANE; j += 2) {
      const uint32_t pair = load_u16(block + 2 + PER_LANE * (t % 4) + j);
      w[j] = scale * (float)(int8_t)(pair & 0xff);
      w[j + 1] = scale * (float)(int8_t)(pair >> 8);
    }
  }
};

// w = zero + scale · q, the product rounded before the sum.
DEVICE void affine(const uint8_t* group, uint32_t codes, int bits, int count, float* w) {
  const float scale = load_f32(group), zero = load_f32(group + 4);
  const uint32_t mask = (1u << bits) - 1;
#pragma unroll
  for (int j = 0; j < count; j++) w[j] = zero + scale * (float)(int)(codes >> (bits * j) & mask);
}

struct MQ4 {
  static constexpr int BYTES = 136, LEVELS = 0, VALUE = 0;
  DEVICE void weights(const uint8_t* group, const float*, int t, float (&w)[PER_LANE]) {
    affine(group, load_u32(group + 8 + 4 * t), 4, PER_LANE, w);
  }
};

struct MQ6 {
  static constexpr int BYTES = 200, LEVELS = 0, VALUE = 0;
  DEVICE void weights(const uint8_t* group, const float*, int t, float (&w)[PER_LANE]) {
    const uint8_t* p = group + 8 + 6 * t;
    const uint32_t a = load_u16(p), b = load_u16(p + 2), c = load_u16(p + 4);
    affine(group, a | (b & 0xff) << 16, 6, 4, w);
    affine(group, b >> 8 | c << 8, 6, 4, w + 4);
  }
};

DEVICE void lookup(const float* book, uint32_t codes, int bits, float (&w)[PER_LANE]) {
  const uint32_t mask = (1u << bits) - 1;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) w[j] = book[codes >> (bits * j) & mask];
}

struct MQ2_Lloyd {
  static constexpr int BYTES = 72, LEVELS = 4, VALUE = 0;
  DEVICE void weights(const uint8_t* group, const float* book, int t, float (&w)[PER_LANE]) {
    lookup(book, load_u16(group + 8 + 2 * t), 2, w);
  }
};

struct MQ3_Lloyd {
  static constexpr int BYTES = 112, LEVELS = 8, VALUE = 0;
  DEVICE void weights(const uint8_t* group, const float* book, int t, float (&w)[PER_LANE]) {
    const uint8_t* p = group + 16 + 3 * t;
    lookup(book, p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16, 3, w);
  }
};

struct MQ4_Lloyd {
  static constexpr int BYTES = 160, LEVELS = 16, VALUE = 0;
  DEVICE void weights(const uint8_t* group, const float* book, int t, float (&w)[PER_LANE]) {
    lookup(book, load_u32(group + 32 + 4 * t), 4, w);
  }
};
