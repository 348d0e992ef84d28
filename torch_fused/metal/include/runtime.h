// What a compiled kernel library and the emulator (csrc_mps/runtime/emulator) know of each other. Plain C: the library
// is compiled apart and depends on nothing else; the emulator hands it this table after loading it.
#pragma once

struct msl_args {
  void* const* buffers;
  const unsigned long* sizes;  // bytes from the buffer's start to the end of what it may touch
  const unsigned* builtins;    // three values for each of Metal's thread attributes
};

enum msl_access { MSL_READ, MSL_WRITE, MSL_ATOMIC_READ, MSL_ATOMIC_WRITE };

struct msl_runtime {
  void (*access)(const volatile void* address, unsigned long size, int kind, const void* pc);
  void* (*threadgroup)(int id, unsigned long size, unsigned long align);
  void (*barrier)(int simdgroup, int flags, int line, const char* file);
  // Offers `value` to the other lanes; returns their slots of 16 bytes once all active lanes (`mask`) have arrived.
  const void* (*exchange)(const void* value, int size, int operation, unsigned* mask, unsigned* lane, int line,
                          const char* file);
  void (*fail)(const char* what, int line, const char* file);
};
