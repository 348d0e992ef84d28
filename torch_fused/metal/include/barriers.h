// Barriers and threadgroup memory, which go through the emulator: it knows the threads.
#pragma once

// The line and file a function is called from, for the emulator's reports
#define MSL_HERE int line_ = __builtin_LINE(), const char *file_ = __builtin_FILE()

#define MSL_TG_VAR(ID, LINE, NAME, TYPE, ...) \
  TYPE(&NAME)                                 \
  __VA_ARGS__ = *reinterpret_cast<TYPE(*) __VA_ARGS__>(msl_rt.threadgroup(ID, sizeof(TYPE __VA_ARGS__), alignof(TYPE)))

namespace metal {

MSL_FN void threadgroup_barrier(mem_flags flags, MSL_HERE) {
  msl_rt.barrier(0, int(flags), line_, file_);
}
MSL_FN void simdgroup_barrier(mem_flags flags, MSL_HERE) {
  msl_rt.barrier(1, int(flags), line_, file_);
}

MSL_FN void assert(bool condition, MSL_HERE) {
  if (!condition) msl_rt.fail("assertion failed", line_, file_);
}

// Every element of an array, which may be one of arrays
template <class T, class U>
MSL_FN void msl_fill(T& element, const U& value) {
  element = T(value);
}
template <class T, size_t N, class U>
MSL_FN void msl_fill(T (&elements)[N], const U& value) {
  for (size_t i = 0; i < N; i++) msl_fill(elements[i], value);
}

}  // namespace metal
