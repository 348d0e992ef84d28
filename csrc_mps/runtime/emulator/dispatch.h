// One dispatch of a kernel on the emulator.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "device_memory.h"
#include "order.h"

namespace torch_fused::emulator {

constexpr size_t kMaxBuffers = 31;

struct Settings {
  bool checked;  // the kernel is compiled with hooks at its memory accesses
  Schedule schedule;
  uint64_t seed;
};

// As Metal's dispatchThreads: threads in all, in threadgroups that are smaller at the edge of the grid.
struct Dispatch {
  void (*kernel)(const msl_args*);
  const void* image;  // of the library the kernel is in, whose constants it may read
  uint64_t grid[3];
  uint32_t group[3];
  std::vector<Buffer> buffers;  // gets the traffic
  Settings settings;
  std::vector<size_t> threadgroup_bytes;  // of the threadgroup memory that each argument points to
};

// What went wrong, "" if nothing, and the program counter if the text does not end with a place in the source.
struct Failure {
  std::string message;
  uintptr_t pc = 0;
};

// Runs a dispatch on the calling thread.
Failure run(Dispatch& dispatch);

// What every kernel library is given.
const msl_runtime& runtime_table();

}  // namespace torch_fused::emulator
