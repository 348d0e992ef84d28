// The stacks of the fibers of one launching thread. Below each is a guard page: a kernel that
// needs more memory than its stack has faults there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_fused::emulator {

class Stacks {
 public:
  Stacks();
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // Guards the first `count` stacks; throws std::bad_alloc.
  void guard(size_t count);
  char* stack(size_t thread) const { return memory_ + thread * kStride + kGuardBytes; }
  bool holds(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(memory_) < kAllBytes; }
  bool is_guard(uintptr_t address) const;

 private:
  static constexpr size_t kGuardBytes = 16 << 10;  // a page, on every machine
  static constexpr size_t kMaxFibers = 1024;
  static const size_t kStride, kAllBytes;

  char* memory_;
  size_t guarded_ = 0;
};

}  // namespace torch_fused::emulator
