// Tiles of halves on the CPU, by shuffles, as the header of a GPU that multiplies them has them: lane 4g + c holds row g and
// row g + 8 of the left factor, column g of the right one, and of the product columns 2c and 2c + 1 of both rows.
#define MQ_TILE
struct Tile {
  float v[4];
};
struct Words {
  uint32_t v[4];
};
DEVICE Words load_words(const float* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}
DEVICE uint32_t half_of(float v) { return mq::bits_as<uint16_t>(static_cast<_Float16>(v)); }
DEVICE uint32_t pair_of_halves(float low, float high) { return half_of(low) | half_of(high) << 16; }
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
DEVICE void pick_pairs(const Book& book, uint32_t codes, uint32_t& a, uint32_t& b) {
  float w[4];
  pick4(book, codes, w);
  a = pair_of_halves(w[0], w[1]);
  b = pair_of_halves(w[2], w[3]);
}
DEVICE float dot_pair(uint32_t a, uint32_t b) {
  float a0, a1, b0, b1;
  halves(a, a0, a1);
  halves(b, b0, b1);
  return a0 * b0 + a1 * b1;
}
DEVICE void multiply_tile(Tile& sum, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const int row = lane() / 4 * 4, columns = lane() % 4 * 8;
  for (int c = 0; c < 4; c++) {
    const uint32_t upper[2] = {__shfl(a0, row + c), __shfl(a2, row + c)};
    const uint32_t lower[2] = {__shfl(a1, row + c), __shfl(a3, row + c)};
    for (int n = 0; n < 2; n++) {
      const uint32_t x[2] = {__shfl(b0, columns + 4 * n + c), __shfl(b1, columns + 4 * n + c)};
      for (int half = 0; half < 2; half++) {
        sum.v[n] += dot_pair(upper[half], x[half]);
        sum.v[2 + n] += dot_pair(lower[half], x[half]);
      }
    }
  }
}
