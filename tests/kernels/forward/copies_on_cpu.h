// Copies into LDS on the CPU: they are made when they are awaited, no sooner, and what they will overwrite is spoilt when they
// are asked for.
#include <map>
#include <vector>
#define MQ_COPY
struct Copy {
  uint8_t* to;
  const uint8_t* from;
  size_t bytes;
};

struct Arrival {
  int count, missing, bytes, times;
};
static thread_local std::map<void*, std::vector<Copy>> runs;    // by arrival
DEVICE void prepare(Arrival* arrival, int count) {
  *arrival = {count, count, 0, 0};
  runs[arrival].clear();
}
DEVICE void arrive(Arrival* arrival) {
  if (arrival->missing == 0) __builtin_trap();    // one too many
  arrival->missing--;
}
DEVICE void expect(Arrival* arrival, int bytes) {
  arrival->bytes += bytes;
  arrive(arrival);
}
DEVICE void copy_run(uint8_t* to, const uint8_t* from, int bytes, Arrival* arrival) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || reinterpret_cast<uintptr_t>(to) % 16 || bytes % 16) __builtin_trap();
  std::memset(to, 0xff, bytes);
  runs[arrival].push_back({to, from, static_cast<size_t>(bytes)});
  arrival->bytes -= bytes;
}
DEVICE void show_prepared() {}
DEVICE void sync_block() { __syncthreads(); }
DEVICE void pass_block() { __syncthreads(); }
// Whether the arrival was there more often than `parity` says, after making it so if it can be.
DEVICE bool is_there(Arrival* arrival, int parity) {
  if (arrival->times % 2 == parity && arrival->missing == 0 && arrival->bytes == 0) {
    for (const Copy& copy : runs[arrival]) std::memcpy(copy.to, copy.from, copy.bytes);
    runs[arrival].clear();
    arrival->missing = arrival->count;
    arrival->times++;
  }
  return arrival->times % 2 != parity;
}
DEVICE void await_arrival(Arrival* arrival, int parity) {
  for (int tried = 0; !__shfl(static_cast<int>(is_there(arrival, parity)), 0); tried++) {
    if (tried == 1000000) __builtin_trap();    // on a GPU it would never come
  }
}
