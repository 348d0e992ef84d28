// What a compiled kernel library and the emulator (csrc_mps/runtime/emulator) know of each other. Plain C: the library
// is compiled apart and depends on nothing else; the emulator hands it this table after loading it.
#pragma once

struct msl_args {
  void* const* buffers;
  const unsigned* builtins;  // three values for each of Metal's thread attributes; null: only declare the buffers
};

enum msl_access { MSL_READ, MSL_WRITE, MSL_ATOMIC_READ, MSL_ATOMIC_WRITE, MSL_ATOMIC_UPDATE };

// What the lanes of a simdgroup offered one another.
struct msl_lanes {
  unsigned mask;  // the active lanes
  unsigned lane;  // the asking lane
  char slots[32][16];
};

struct msl_runtime {
  // A kernel takes `buffer`, with at least `size` bytes, or does without it.
  void (*declare)(int buffer, int read_only, unsigned long size, int present);
  // The kernel accesses memory, at program counter `pc`.
  void (*access)(const volatile void* address, unsigned long size, enum msl_access access, const void* pc);
  // The threadgroup's array that is declaration `id` of the source.
  void* (*threadgroup)(int id, unsigned long size, unsigned long align);
  // The threadgroup's memory number `index` among those the launch gives it, of at least `size` bytes.
  void* (*threadgroup_argument)(int index, unsigned long size);
  // Waits for the other threads of the threadgroup or of the simdgroup; `flags` are Metal's mem_flags.
  void (*barrier)(int simdgroup, int flags, int line, const char* file);
  // Offers `value`, of up to 16 bytes, to the other lanes; returns once all active lanes have offered theirs.
  void (*exchange)(const void* value, int size, int operation, struct msl_lanes* all, int line, const char* file);
  // The kernel does something that Metal leaves undefined, at a line or at a program counter.
  void (*fail)(const char* what, int line, const char* file);
  void (*fault)(const char* what, const void* pc);
};
