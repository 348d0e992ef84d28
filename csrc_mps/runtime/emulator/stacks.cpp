#include "stacks.h"

#include <sys/mman.h>

#include <new>

#include "fiber.h"

namespace torch_fused::emulator {

const size_t Stacks::kStride = kGuardBytes + kStackBytes;
const size_t Stacks::kAllBytes = kMaxFibers * kStride;

Stacks::Stacks() {
  void* memory = mmap(nullptr, kAllBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
}

Stacks::~Stacks() {
  munmap(memory_, kAllBytes);
}

void Stacks::guard(size_t count) {
  for (; guarded_ < count; ++guarded_) {
    if (mprotect(stack(guarded_) - kGuardBytes, kGuardBytes, PROT_NONE)) throw std::bad_alloc();
  }
}

bool Stacks::is_guard(uintptr_t address) const {
  return holds(address) && (address - reinterpret_cast<uintptr_t>(memory_)) % kStride < kGuardBytes;
}

}  // namespace torch_fused::emulator
