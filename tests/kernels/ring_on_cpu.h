// Copies in the background, on the CPU: a lane's copies are made when it awaits their batch, no sooner, and what they will
// overwrite is spoilt when they are asked for.
#include <map>
#include <vector>
#define MQ_RING
typedef uint8_t* LdsAddress;
struct Copies {
  struct Copy {
    uint8_t* to;
    const uint8_t* from;
  };
  std::vector<std::vector<Copy>> batches{1};
};
static thread_local std::map<void*, Copies> copies;    // by lane
DEVICE Copies& mine() { return copies[mq::self->fiber]; }
DEVICE LdsAddress lds_address(const uint8_t* p) { return const_cast<uint8_t*>(p); }
DEVICE void copy_quad(LdsAddress to, const uint8_t* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) __builtin_trap();
  std::memset(to, 0xff, 16);
  mine().batches.back().push_back({to, from});
}
DEVICE void close_batch() { mine().batches.emplace_back(); }
template <int LATER>
DEVICE void await_batches() {
  auto& batches = mine().batches;
  while (batches.size() > LATER + 1) {
    for (const auto& copy : batches.front()) std::memcpy(copy.to, copy.from, 16);
    batches.erase(batches.begin());
  }
}
