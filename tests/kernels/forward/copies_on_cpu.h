// Copies into LDS on the CPU: they are made when they are awaited, no sooner, and what they will overwrite is spoilt when they
// are asked for.
#include <map>
#include <vector>
#define MQ_COPY
typedef uint8_t* LdsAddress;
struct Copy {
  uint8_t* to;
  const uint8_t* from;
  size_t bytes;
};
DEVICE void ask(std::vector<Copy>& copies, uint8_t* to, const uint8_t* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) __builtin_trap();
  std::memset(to, 0xff, bytes);
  copies.push_back({to, from, bytes});
}
DEVICE void make(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
}

static thread_local std::map<void*, std::vector<std::vector<Copy>>> batches;    // by lane
DEVICE std::vector<std::vector<Copy>>& mine() {
  auto& own = batches[mq::self->fiber];
  if (own.empty()) own.emplace_back();
  return own;
}
DEVICE LdsAddress lds_address(const uint8_t* p) { return const_cast<uint8_t*>(p); }
DEVICE void copy_quad(LdsAddress to, const uint8_t* from) { ask(mine().back(), to, from, 16); }
DEVICE void close_batch() { mine().emplace_back(); }
template <int LATER>
DEVICE void await_batches() {
  auto& own = mine();
  while (own.size() > LATER + 1) {
    make(own.front());
    own.erase(own.begin());
  }
}

struct Arrival {
  int prepared, bytes;
};
static thread_local std::map<void*, std::vector<Copy>> runs;    // by arrival
DEVICE void prepare(Arrival* arrival) {
  if (threadIdx.x > 0) return;
  *arrival = {1, 0};
  runs[arrival].clear();
}
DEVICE void expect(Arrival* arrival, int bytes) { arrival->bytes = bytes; }
DEVICE void copy_run(uint8_t* to, const uint8_t* from, int bytes, Arrival* arrival) {
  ask(runs[arrival], to, from, bytes);
  arrival->bytes -= bytes;
}
DEVICE void await_arrival(Arrival* arrival) {
  if (arrival->prepared != 1 || arrival->bytes != 0) __builtin_trap();    // on a GPU it would never come
  make(runs[arrival]);
}
