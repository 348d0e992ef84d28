// Cooperative threads: one fiber stands for one GPU thread.
#pragma once

#include <cstddef>

namespace torch_fused::emulator {

constexpr size_t kStackBytes = 256 << 10;

// Saves the running context in *from and continues at `to`, until another fiber switches back.
void switch_context(void** from, void* to);

// The end of the stack that starts at `stack`, where a first frame may begin.
char* stack_end(char* stack);

// A context that will call `entry`, which must never return, on the stack of kStackBytes that starts at `stack`.
void* new_context(char* stack, void (*entry)());

}  // namespace torch_fused::emulator
