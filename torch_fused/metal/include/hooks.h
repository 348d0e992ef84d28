// The functions that -fsanitize=thread has the compiler call at every memory access. Ours report to the emulator; they
// are hidden in the kernel library, which is linked without the sanitizer's own runtime.
#pragma once

#include "runtime.h"

#define MSL_UNCHECKED __attribute__((no_sanitize("thread")))

// Until the emulator has loaded the library, constants with an initialiser that is no constant are made.
static msl_runtime msl_rt = {nullptr, [](const volatile void*, unsigned long, msl_access, const void*) {},
                             nullptr, nullptr,
                             nullptr, nullptr,
                             nullptr, [](const char*, const void*) {}};
extern "C" __attribute__((visibility("default"))) MSL_UNCHECKED void msl_set_runtime(const msl_runtime* runtime) {
  msl_rt = *runtime;
}

#define MSL_HOOK extern "C" __attribute__((visibility("hidden"), used)) MSL_UNCHECKED

// What -fsanitize=integer-divide-by-zero and -fsanitize=bounds have the compiler call
#define MSL_FAULT_HOOK(name, parameters, what)             \
  MSL_HOOK void __ubsan_handle_##name parameters {         \
    msl_rt.fault(what, __builtin_return_address(0));       \
  }                                                        \
  MSL_HOOK void __ubsan_handle_##name##_abort parameters { \
    msl_rt.fault(what, __builtin_return_address(0));       \
  }
MSL_FAULT_HOOK(divrem_overflow, (void*, void*, void*), "integer division by zero")
MSL_FAULT_HOOK(out_of_bounds, (void*, void*), "out-of-bounds index of an array")

#ifdef MSL_CHECKED
#define MSL_REPORT(address, size, kind) msl_rt.access(address, size, kind, __builtin_return_address(0))
#define MSL_ACCESS_HOOKS(size)                                     \
  MSL_HOOK void __tsan_read##size(void* p) {                       \
    MSL_REPORT(p, size, MSL_READ);                                 \
  }                                                                \
  MSL_HOOK void __tsan_write##size(void* p) {                      \
    MSL_REPORT(p, size, MSL_WRITE);                                \
  }                                                                \
  MSL_HOOK void __tsan_unaligned_read##size(void* p) {             \
    MSL_REPORT(p, size, MSL_READ);                                 \
  }                                                                \
  MSL_HOOK void __tsan_unaligned_write##size(void* p) {            \
    MSL_REPORT(p, size, MSL_WRITE);                                \
  }                                                                \
  MSL_HOOK void __tsan_volatile_read##size(void* p) {              \
    MSL_REPORT(p, size, MSL_READ);                                 \
  }                                                                \
  MSL_HOOK void __tsan_volatile_write##size(void* p) {             \
    MSL_REPORT(p, size, MSL_WRITE);                                \
  }                                                                \
  MSL_HOOK void __tsan_unaligned_volatile_read##size(void* p) {    \
    MSL_REPORT(p, size, MSL_READ);                                 \
  }                                                                \
  MSL_HOOK void __tsan_unaligned_volatile_write##size(void* p) {   \
    MSL_REPORT(p, size, MSL_WRITE);                                \
  }                                                                \
  MSL_HOOK void __tsan_read_write##size(void* p) {                 \
    MSL_REPORT(p, size, MSL_READ), MSL_REPORT(p, size, MSL_WRITE); \
  }                                                                \
  MSL_HOOK void __tsan_unaligned_read_write##size(void* p) {       \
    MSL_REPORT(p, size, MSL_READ), MSL_REPORT(p, size, MSL_WRITE); \
  }
MSL_ACCESS_HOOKS(1)
MSL_ACCESS_HOOKS(2)
MSL_ACCESS_HOOKS(4)
MSL_ACCESS_HOOKS(8)
MSL_ACCESS_HOOKS(16)
MSL_HOOK void __tsan_init() {}
MSL_HOOK void __tsan_func_entry(void*) {}
MSL_HOOK void __tsan_func_exit() {}
MSL_HOOK void __tsan_read_range(void* p, unsigned long size) {
  MSL_REPORT(p, size, MSL_READ);
}
MSL_HOOK void __tsan_write_range(void* p, unsigned long size) {
  MSL_REPORT(p, size, MSL_WRITE);
}
MSL_HOOK void* __tsan_memcpy(void* to, const void* from, unsigned long size) {
  MSL_REPORT(from, size, MSL_READ), MSL_REPORT(to, size, MSL_WRITE);
  return __builtin_memmove(to, from, size);
}
MSL_HOOK void* __tsan_memmove(void* to, const void* from, unsigned long size) {
  MSL_REPORT(from, size, MSL_READ), MSL_REPORT(to, size, MSL_WRITE);
  return __builtin_memmove(to, from, size);
}
MSL_HOOK void* __tsan_memset(void* to, int value, unsigned long size) {
  MSL_REPORT(to, size, MSL_WRITE);
  return __builtin_memset(to, value, size);
}
#endif
