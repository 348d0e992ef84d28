// A kernel's machine faults (division overflow, a wild pointer, a stack that is used up) end its run, not the process.
#pragma once

#include <cstdint>

namespace torch_fused::emulator {

// What may take a fault of the calling thread.
class FaultHandler {
 public:
  // Whether the fault is the handler's; if so the thread goes on in `abandon`, on the stack whose end is `*stack`.
  virtual bool take_fault(int signal, uintptr_t address, uintptr_t pc, char** stack) = 0;

 protected:
  ~FaultHandler() = default;
};

// Catches the signals of faults from here on. A fault that `handler_of_thread` does not take goes where it went before.
// `abandon` must not return.
void catch_faults(FaultHandler* (*handler_of_thread)(), void (*abandon)());

// Gives the calling thread a stack for signals, which an exhausted stack cannot serve.
void use_signal_stack();

}  // namespace torch_fused::emulator
