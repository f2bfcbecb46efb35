// Tiles of bits on the CPU, by shuffles, as the header of a GPU that counts them has them: lane 4g + c holds words c and c + 4
// of row g and row g + 8 of the left factor and of column g of the right one, and of the counts columns 2c and 2c + 1.
#define MQ_BITS
DEVICE int wave_most(int v) {
  for (int mask = WAVE / 2; mask > 0; mask /= 2) {
    const int other = __shfl_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}
DEVICE uint32_t wave_total(uint32_t v) {
  for (int mask = WAVE / 2; mask > 0; mask /= 2) v += __shfl_xor(v, mask);
  return v;
}
DEVICE void halves(uint32_t pair, float& a, float& b) {
  a = half_to_float(pair & 0xffff);
  b = half_to_float(pair >> 16);
}
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t nibbles) {
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t byte = nibbles >> (4 * i) & 7;
    out |= ((byte < 4 ? a : b) >> (8 * (byte % 4)) & 0xff) << (8 * i);
  }
  return out;
}
DEVICE uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }
struct Counts {
  int v[4] = {};
};
DEVICE Counts count_common(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Counts count;
  const int row = lane() / 4 * 4, columns = lane() % 4 * 8;
  for (int c = 0; c < 4; c++) {
    const uint32_t upper[2] = {__shfl(a0, row + c), __shfl(a2, row + c)};
    const uint32_t lower[2] = {__shfl(a1, row + c), __shfl(a3, row + c)};
    for (int n = 0; n < 2; n++) {
      const uint32_t x[2] = {__shfl(b0, columns + 4 * n + c), __shfl(b1, columns + 4 * n + c)};
      for (int half = 0; half < 2; half++) {
        count.v[n] += __builtin_popcount(upper[half] & x[half]);
        count.v[2 + n] += __builtin_popcount(lower[half] & x[half]);
      }
    }
  }
  return count;
}
// Adds products of the parts, of so many bits, of words of two factors; `value` is what a part stands for.
template <int BITS, class Total, class Value>
DEVICE void multiply_parts(Total& sum, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, Value value) {
  const int row = lane() / 4 * 4, columns = lane() % 4 * 8;
  for (int c = 0; c < 4; c++) {
    const uint32_t upper[2] = {__shfl(a0, row + c), __shfl(a2, row + c)};
    const uint32_t lower[2] = {__shfl(a1, row + c), __shfl(a3, row + c)};
    for (int n = 0; n < 2; n++) {
      const uint32_t x[2] = {__shfl(b0, columns + 4 * n + c), __shfl(b1, columns + 4 * n + c)};
      for (int word = 0; word < 2; word++) {
        for (int at = 0; at < 32; at += BITS) {
          const auto factor = value(x[word] >> at);
          sum.v[n] += value(upper[word] >> at) * factor;
          sum.v[2 + n] += value(lower[word] >> at) * factor;
        }
      }
    }
  }
}
DEVICE void multiply_bytes(Counts& sum, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply_parts<8>(sum, a0, a1, a2, a3, b0, b1, [](uint32_t part) { return (int)static_cast<int8_t>(part); });
}
DEVICE uint32_t pair_of(int a, int b) { return (uint32_t)b << 16 | (uint32_t)a; }
struct Sums {
  float v[4] = {};
};
DEVICE void multiply_halves(Sums& sum, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply_parts<16>(sum, a0, a1, a2, a3, b0, b1, [](uint32_t part) { return half_to_float((uint16_t)part); });
}
DEVICE void multiply_halves(Sums& sum, uint32_t a0, uint32_t a1, uint32_t b0) {
  multiply_halves(sum, a0, a1, 0, 0, b0, 0);
}
