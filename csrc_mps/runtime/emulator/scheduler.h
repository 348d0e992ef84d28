// Runs the threadgroups of one dispatch: a fiber a thread, barriers and simdgroup operations at which fibers wait, and
// the checks that go with every memory access.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "memory.h"

struct msl_args;
struct msl_runtime;

namespace torch_fused::emulator {

enum class Schedule { kSequential, kReversed, kRandom, kPreemptive };

// One dispatch, as Metal's dispatchThreads: `grid` threads in all, in threadgroups of `group`.
struct Dispatch {
  void (*kernel)(const msl_args*);
  uint32_t grid[3];
  uint32_t group[3];
  std::vector<Buffer> buffers;
  uintptr_t image_begin, image_end;  // the kernel library in memory: its constants may be read
  bool checked;
  Schedule schedule;
  uint64_t seed;
};

// What is wrong, and the program counter it happened at (0 if a line is in the text already).
struct Failure {
  std::string message;
  uintptr_t pc = 0;
};

// The table handed to every kernel library.
const msl_runtime& runtime_table();

// Runs a dispatch on the calling thread. Returns an empty message if nothing went wrong; `buffers` gets the traffic.
struct Traffic {
  int buffer;
  uint64_t read, written, distinct_read, distinct_written;
};
Failure run(const Dispatch& dispatch, std::vector<Traffic>* traffic);

}  // namespace torch_fused::emulator
