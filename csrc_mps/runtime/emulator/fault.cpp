#include "fault.h"

#include <signal.h>
#include <sys/ucontext.h>

#include <memory>
#include <mutex>

namespace torch_fused::emulator {
namespace {

constexpr int kSignals[] = {SIGFPE, SIGSEGV, SIGBUS, SIGILL};
constexpr size_t kSignalStackBytes = 64 << 10;

FaultHandler* (*handler_of_thread)();
void (*abandon)();
struct sigaction previous[sizeof(kSignals) / sizeof(*kSignals)];

// The program counter at the fault, and where the thread goes on instead.
#if defined(__APPLE__) && defined(__aarch64__)
uintptr_t pc_of(ucontext_t* context) {
  return __darwin_arm_thread_state64_get_pc(context->uc_mcontext->__ss);
}
void resume_at(ucontext_t* context, void (*function)(), char* stack) {
  __darwin_arm_thread_state64_set_pc_fptr(context->uc_mcontext->__ss, function);
  __darwin_arm_thread_state64_set_sp(context->uc_mcontext->__ss, stack);
}
#elif defined(__APPLE__)
uintptr_t pc_of(ucontext_t* context) {
  return context->uc_mcontext->__ss.__rip;
}
void resume_at(ucontext_t* context, void (*function)(), char* stack) {
  context->uc_mcontext->__ss.__rip = reinterpret_cast<uintptr_t>(function);
  context->uc_mcontext->__ss.__rsp = reinterpret_cast<uintptr_t>(stack) - 8;  // as after a call
}
#elif defined(__aarch64__)
uintptr_t pc_of(ucontext_t* context) {
  return context->uc_mcontext.pc;
}
void resume_at(ucontext_t* context, void (*function)(), char* stack) {
  context->uc_mcontext.pc = reinterpret_cast<uintptr_t>(function);
  context->uc_mcontext.sp = reinterpret_cast<uintptr_t>(stack);
}
#else
uintptr_t pc_of(ucontext_t* context) {
  return context->uc_mcontext.gregs[REG_RIP];
}
void resume_at(ucontext_t* context, void (*function)(), char* stack) {
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(function);
  context->uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(stack) - 8;  // as after a call
}
#endif

void on_signal(int signal, siginfo_t* info, void* context) {
  auto* machine = static_cast<ucontext_t*>(context);
  FaultHandler* handler = handler_of_thread();
  char* stack;
  if (handler && handler->take_fault(signal, reinterpret_cast<uintptr_t>(info->si_addr), pc_of(machine), &stack)) {
    return resume_at(machine, abandon, stack);
  }
  for (size_t i = 0; i < sizeof(kSignals) / sizeof(*kSignals); ++i) {
    if (kSignals[i] == signal) sigaction(signal, &previous[i], nullptr);  // the fault comes again, and goes there
  }
}

}  // namespace

void catch_faults(FaultHandler* (*handler)(), void (*function)()) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  handler_of_thread = handler;
  abandon = function;
  for (size_t i = 0; i < sizeof(kSignals) / sizeof(*kSignals); ++i) {
    struct sigaction installed;
    if (sigaction(kSignals[i], nullptr, &installed) == 0 && installed.sa_sigaction == on_signal) continue;
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(kSignals[i], &action, &previous[i]);
  }
}

void use_signal_stack() {
  stack_t current;
  if (sigaltstack(nullptr, &current) == 0 && !(current.ss_flags & SS_DISABLE)) return;
  static thread_local std::unique_ptr<char[]> memory(new char[kSignalStackBytes]);
  stack_t stack = {};
  stack.ss_sp = memory.get();
  stack.ss_size = kSignalStackBytes;
  sigaltstack(&stack, nullptr);
}

}  // namespace torch_fused::emulator
