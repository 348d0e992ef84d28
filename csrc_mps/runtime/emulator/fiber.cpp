#include "fiber.h"

#include <cstdint>
#include <cstring>

// Only what the calling convention says a callee must keep is saved; the rest is dead across a call.
#ifdef __APPLE__
#define SYMBOL(name) "_" name
#else
#define SYMBOL(name) name
#endif

extern "C" void torch_fused_switch_context(void** from, void* to);

#if defined(__x86_64__)
asm(".text\n"
    ".globl " SYMBOL("torch_fused_switch_context") "\n" SYMBOL("torch_fused_switch_context") ":\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n");
#elif defined(__aarch64__)
asm(".text\n"
    ".globl " SYMBOL("torch_fused_switch_context") "\n" SYMBOL("torch_fused_switch_context") ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#else
#error "The emulator's fibers are written for x86-64 and arm64"
#endif

namespace torch_fused::emulator {

void switch_context(void** from, void* to) {
  torch_fused_switch_context(from, to);
}

char* stack_end(char* stack) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(stack) + kStackBytes - 64) & ~uintptr_t{15});
}

void* new_context(char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(stack_end(stack));
#if defined(__x86_64__)
  *--top = 0;  // where a return address would be: the stack is aligned as after a call
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
#else
  top -= 20;
  std::memset(top, 0, 20 * sizeof(*top));
  top[11] = reinterpret_cast<uintptr_t>(entry);  // x30, the link register
#endif
  return top;
}

}  // namespace torch_fused::emulator
