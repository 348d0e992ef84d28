// A kernel's machine faults (division overflow, a wild pointer, a stack that is used up) end its run, not the process.
#pragma once

#include <cstdint>

namespace torch_fused::emulator {

// The handler of faults of the calling thread.
class FaultHandler {
 public:
  // Whether the handler takes the fault; if so, the thread continues in `abandon`, on the stack that ends at `*stack`.
  virtual bool take_fault(int signal, uintptr_t address, uintptr_t pc, char** stack) = 0;

 protected:
  ~FaultHandler() = default;
};

// Catches the signals of faults from here on. A fault that `handler_of_thread` does not take has its earlier effect.
// `abandon` must not return.
void catch_faults(FaultHandler* (*handler_of_thread)(), void (*abandon)());

// Gives the calling thread a stack for signals, which an exhausted stack cannot serve.
void use_signal_stack();

}  // namespace torch_fused::emulator
