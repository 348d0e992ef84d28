// The memory that the threads of one threadgroup share.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "shadow.h"

namespace torch_fused::emulator {

constexpr size_t kThreadgroupBytes = 32768;  // Metal's limit

class ThreadgroupMemory {
 public:
  ThreadgroupMemory();

  // For the next threadgroup: no arrays, every byte uninitialised.
  void reset();

  // The array of declaration `id`, made when the first thread reaches it; null if it does not fit.
  void* array(int id, size_t size, size_t align);

  bool holds(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(bytes_) < kSpace; }
  // Checks and records an access. Returns what is wrong with it, or "".
  std::string access(uintptr_t address, size_t size, msl_access access, const Accessor& accessor);

  size_t used() const { return used_; }

 private:
  struct Array {
    int id;
    size_t offset, size;
  };
  static constexpr size_t kSpace = 2 * kThreadgroupBytes;  // with room to run past an array's end

  std::unique_ptr<char[]> storage_;
  char* bytes_;  // storage_, aligned
  std::vector<Cell> cells_;
  std::vector<Array> arrays_;
  size_t used_ = 0;  // bytes that are arrays
  size_t next_ = 0;  // where the next array may start
};

}  // namespace torch_fused::emulator
