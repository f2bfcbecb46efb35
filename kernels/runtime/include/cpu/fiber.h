// What a kernel module built for the CPU and the runtime (runtime.cpp) agree on. A block of threads runs on one OS thread;
// each of its threads is a fiber, and barriers and shuffles switch fibers. Modules reach the runtime through `Block` only.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mq {

struct Index {
  unsigned x, y, z;
};

struct Fiber {
  void* stack_pointer;
  unsigned char* stack;
  Index thread;
  unsigned number;              // within the block; number % 32 is the lane
  const unsigned* gate;         // the counter this fiber waits on, null while it can run
  unsigned passed;              // the counter's value that it waits to change
  unsigned parity;              // which of the warp's two exchange slots its next shuffle uses
  size_t lds_used;
  bool done;
};

struct Block {
  Fiber* fiber;                 // the one that runs
  Index block, block_dim, grid_dim;
  unsigned char* dynamic_lds;
  void (*barrier)(Block*);
  const uint32_t* (*exchange)(Block*, uint32_t bits);    // of every lane of the wave, until its next exchange but one
  void* (*lds)(Block*, size_t bytes);
};

using Entry = void (*)(Block*, void** arguments);

}  // namespace mq
