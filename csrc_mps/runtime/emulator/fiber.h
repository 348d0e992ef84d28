// Cooperative threads: one fiber stands for one GPU thread.
#pragma once

#include <cstddef>

namespace torch_fused::emulator {

constexpr size_t kStackBytes = 64 << 10;

// Saves the running context in *from and continues at `to`, until someone switches back.
void switch_context(void** from, void* to);

// A context that will call `entry`, which must never return, on the stack of kStackBytes that starts at `stack`.
void* new_context(char* stack, void (*entry)());

}  // namespace torch_fused::emulator
