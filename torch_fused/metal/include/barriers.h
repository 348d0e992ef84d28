// Barriers and threadgroup memory, which go through the emulator: it knows the threads.
#pragma once

// The line and file a function is called from, for the emulator's reports
#define MSL_HERE int line_ = __builtin_LINE(), const char *file_ = __builtin_FILE()

#define MSL_TG_VAR(ID, LINE, NAME, TYPE, ...) \
  TYPE(&NAME)                                 \
  __VA_ARGS__ =                               \
      *reinterpret_cast<TYPE(*) __VA_ARGS__>(msl_rt.threadgroup(ID, sizeof(TYPE __VA_ARGS__), alignof(TYPE)))

namespace metal {

MSL_FN void threadgroup_barrier(mem_flags flags, MSL_HERE) {
  msl_rt.barrier(0, int(flags), line_, file_);
}
MSL_FN void simdgroup_barrier(mem_flags flags, MSL_HERE) {
  msl_rt.barrier(1, int(flags), line_, file_);
}

}  // namespace metal
