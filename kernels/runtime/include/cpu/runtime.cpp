// Runs a kernel's grid on the CPU: blocks are dealt to OS threads, the threads of a block are fibers switched at barriers
// and shuffles. Fibers are resumed in ascending or descending order, so that a result that depends on the order betrays a
// missing barrier. It refuses what a GPU would hang on or corrupt silently: a barrier or shuffle that some thread never
// reaches, LDS overruns, stack overruns.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#include "fiber.h"
#include "block_table.h"    // made by block_table.py

extern "C" void mq_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl mq_switch
.hidden mq_switch
.type mq_switch,@function
mq_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mq_switch,.-mq_switch
)");
constexpr int RETURN = 6;    // which saved word is the address that the first switch returns to
constexpr int FRAME = 8;     // words, the return address and a pad that aligns the entry included
#elif defined(__aarch64__)
asm(R"(
.text
.globl mq_switch
.hidden mq_switch
.type mq_switch,%function
mq_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size mq_switch,.-mq_switch
)");
constexpr int RETURN = 11;    // x30
constexpr int FRAME = 20;
#else
#error "the CPU back end switches fibers on x86-64 and aarch64 only"
#endif

namespace mq {
namespace {

// Stacks are no power of two apart, or the tops of all of them would compete for one set of the cache.
constexpr size_t STACK = (64 << 10) + 192, LDS_BYTES = MAX_LDS, GUARD = 16;
constexpr unsigned MOST_THREADS = MAX_THREADS, WARP = WAVE;
constexpr uint64_t CANARY = 0x6d712d7175616e74;
// What LDS holds before a block begins: NaN as float and half, and in descending order another value, so that a read of
// what was never written shows as a difference between the orders even where both results are NaN.
constexpr unsigned char POISON[2] = {0xff, 0x7e};

struct Warp {
  uint32_t exchange[2][WARP];
  unsigned arrived, generation;
};

// One OS thread's workplace. `shared` must stay first: modules see it as their Block.
struct Worker {
  Block shared{};
  Fiber fibers[MOST_THREADS]{};
  Warp warps[MOST_THREADS / WARP]{};
  unsigned threads = 0, alive = 0, arrived = 0, generation = 0;
  bool descending = false;
  void* main_stack_pointer = nullptr;
  Entry entry = nullptr;
  void** arguments = nullptr;
  const char* problem = nullptr;
  size_t lds_high = LDS_BYTES, dynamic_bytes = 0;
  std::vector<size_t> guards;
  unsigned char* stacks = static_cast<unsigned char*>(std::aligned_alloc(4096, STACK * MOST_THREADS));
  unsigned char* lds = static_cast<unsigned char*>(std::aligned_alloc(4096, LDS_BYTES + GUARD));
  Worker() {
    if (!stacks || !lds) throw std::bad_alloc();
    for (unsigned i = 0; i < MOST_THREADS; i++) std::memcpy(stacks + STACK * i, &CANARY, sizeof CANARY);
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() {
    std::free(stacks);
    std::free(lds);
  }
};

thread_local Worker* here = nullptr;

Worker& worker_of(Block* block) { return *reinterpret_cast<Worker*>(block); }

bool can_run(const Fiber& f) { return !f.done && (!f.gate || *f.gate != f.passed); }

// Gives the thread to the next fiber that can run, or back to run_block where none can.
void leave(Worker& w) {
  Fiber* me = w.shared.fiber;
  unsigned i = me->number;
  for (unsigned tried = 0; tried < w.threads; tried++) {
    i = w.descending ? (i == 0 ? w.threads - 1 : i - 1) : (i + 1 == w.threads ? 0 : i + 1);
    Fiber& next = w.fibers[i];
    if (!w.problem && can_run(next)) {
      if (&next == me) return;
      w.shared.fiber = &next;
      mq_switch(&me->stack_pointer, next.stack_pointer);
      return;
    }
  }
  void** save = &me->stack_pointer;
  mq_switch(save, w.main_stack_pointer);
}

void wait(Worker& w, const unsigned* gate) {
  Fiber& f = *w.shared.fiber;
  f.gate = gate;
  f.passed = *gate;
  leave(w);
  f.gate = nullptr;
}

void barrier(Block* block) {
  Worker& w = worker_of(block);
  if (++w.arrived == w.threads) {
    w.arrived = 0;
    w.generation++;
  } else {
    wait(w, &w.generation);
  }
}

const uint32_t* exchange(Block* block, uint32_t bits) {
  Worker& w = worker_of(block);
  Fiber& f = *block->fiber;
  Warp& warp = w.warps[f.number / WARP];
  uint32_t* slot = warp.exchange[f.parity];    // two slots: a lane may reach the next shuffle before another reads this one
  f.parity ^= 1;
  slot[f.number % WARP] = bits;
  if (++warp.arrived == WARP) {
    warp.arrived = 0;
    warp.generation++;
  } else {
    wait(w, &warp.generation);
  }
  return slot;
}

[[noreturn]] void fail(Worker& w, const char* problem) {
  w.problem = problem;
  mq_switch(&w.shared.fiber->stack_pointer, w.main_stack_pointer);
  std::abort();
}

// Every fiber makes the same calls in the same order, and so finds the same arrays.
void* lds(Block* block, size_t bytes) {
  Worker& w = worker_of(block);
  Fiber& f = *block->fiber;
  const size_t start = f.lds_used, end = (start + bytes + 15) / 16 * 16 + GUARD;
  if (end > LDS_BYTES) fail(w, "the kernel needs more than 64 KiB of LDS");
  if (f.number == 0) w.guards.push_back(start + bytes);
  f.lds_used = end;
  return w.lds + start;
}

void fiber_main() {
  Worker& w = *here;
  w.entry(&w.shared, w.arguments);
  w.shared.fiber->done = true;
  w.alive--;
  leave(w);
  std::abort();
}

void prepare(Worker& w, Fiber& f, unsigned number, Index dim) {
  f.number = number;
  f.thread = {number % dim.x, number / dim.x % dim.y, number / (dim.x * dim.y)};
  f.stack = w.stacks + STACK * number;
  void** frame = reinterpret_cast<void**>(f.stack + STACK) - FRAME;
  std::memset(frame, 0, FRAME * sizeof(void*));
  frame[RETURN] = reinterpret_cast<void*>(&fiber_main);
  f.stack_pointer = frame;
  f.gate = nullptr;
  f.parity = 0;
  f.lds_used = w.dynamic_bytes;
  f.done = false;
}

bool untouched(const unsigned char* p, size_t n, unsigned char poison) {
  for (size_t i = 0; i < n; i++) {
    if (p[i] != poison) return false;
  }
  return true;
}

bool stacks_whole(const Worker& w) {
  for (unsigned i = 0; i < w.threads; i++) {
    if (std::memcmp(w.stacks + STACK * i, &CANARY, sizeof CANARY)) return false;
  }
  return true;
}

const char* run_block(Worker& w) {
  const unsigned char poison = POISON[w.descending];
  std::memset(w.lds, poison, w.lds_high);
  w.guards.clear();
  if (w.dynamic_bytes) w.guards.push_back(w.dynamic_bytes - GUARD);
  std::memset(w.warps, 0, sizeof(Warp) * (w.threads / WARP));
  w.alive = w.threads;
  w.arrived = 0;
  for (unsigned i = 0; i < w.threads; i++) prepare(w, w.fibers[i], i, w.shared.block_dim);
  w.shared.fiber = &w.fibers[w.descending ? w.threads - 1 : 0];
  mq_switch(&w.main_stack_pointer, w.shared.fiber->stack_pointer);
  if (!w.problem && w.alive) w.problem = "a barrier or shuffle was not reached by every thread";
  for (unsigned i = 0; !w.problem && i < w.threads; i++) {
    if (w.fibers[i].lds_used != w.fibers[0].lds_used) w.problem = "threads of a block took different LDS arrays";
  }
  for (size_t guard : w.guards) {
    if (!w.problem && !untouched(w.lds + guard, GUARD, poison)) w.problem = "a kernel wrote past the end of an LDS array";
  }
  w.lds_high = w.fibers[0].lds_used;
  return w.problem;
}

// Workplaces are kept between launches, because their stacks are worth keeping.
std::mutex idle_lock;
std::vector<std::unique_ptr<Worker>> idle;

std::unique_ptr<Worker> take() {
  {
    std::lock_guard<std::mutex> hold(idle_lock);
    if (!idle.empty()) {
      auto w = std::move(idle.back());
      idle.pop_back();
      return w;
    }
  }
  return std::make_unique<Worker>();
}

void give_back(std::unique_ptr<Worker> w) {
  std::lock_guard<std::mutex> hold(idle_lock);
  idle.push_back(std::move(w));
}

}  // namespace
}  // namespace mq

// Runs `entry` on grid × block threads; returns 0, or 1 with `message` set. `dynamic_lds` bytes are HIP_DYNAMIC_SHARED's.
extern "C" __attribute__((visibility("default"))) int mq_run(mq::Entry entry, void** arguments, const unsigned* grid,
                                                             const unsigned* block, size_t dynamic_lds, unsigned threads,
                                                             int descending, char* message, size_t message_size) {
  using namespace mq;
  const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
  std::atomic<uint64_t> next{0};
  std::atomic<const char*> problem{nullptr};
  auto work = [&]() noexcept {
    try {
      auto owned = take();
      Worker& w = *owned;
      w.shared.block_dim = {block[0], block[1], block[2]};
      w.shared.grid_dim = {grid[0], grid[1], grid[2]};
      w.shared.barrier = barrier;
      w.shared.exchange = exchange;
      w.shared.lds = lds;
      w.shared.dynamic_lds = w.lds;
      w.threads = block[0] * block[1] * block[2];
      w.descending = descending != 0;
      w.entry = entry;
      w.arguments = arguments;
      w.problem = nullptr;
      w.lds_high = LDS_BYTES;
      w.dynamic_bytes = dynamic_lds ? (dynamic_lds + 15) / 16 * 16 + GUARD : 0;
      here = &w;
      for (uint64_t i = next++; i < blocks && !problem.load(); i = next++) {
        const uint64_t b = descending ? blocks - 1 - i : i;
        w.shared.block = {unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / grid[0] / grid[1])};
        if (const char* said = run_block(w)) problem.store(said);
      }
      if (!problem.load() && !stacks_whole(w)) problem.store("a kernel's stack overran");
      here = nullptr;
      give_back(std::move(owned));
    } catch (const std::bad_alloc&) {
      problem.store("out of memory");
    }
  };
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < threads && i < blocks; i++) {
    try {
      helpers.emplace_back(work);
    } catch (...) {
      break;    // fewer helpers, the same result
    }
  }
  work();
  for (std::thread& t : helpers) t.join();
  if (const char* said = problem.load()) {
    std::snprintf(message, message_size, "%s", said);
    return 1;
  }
  return 0;
}
