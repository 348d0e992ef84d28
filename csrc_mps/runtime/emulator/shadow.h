// Shadow memory: a cell for every few bytes says who read and who wrote them last, which is enough to find races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../../../torch_fused/metal/include/runtime.h"

namespace torch_fused::emulator {

inline bool reads(msl_access access) {
  return access != MSL_WRITE && access != MSL_ATOMIC_WRITE;
}
inline bool writes(msl_access access) {
  return access != MSL_READ && access != MSL_ATOMIC_READ;
}
inline const char* verb(msl_access access) {
  return writes(access) ? "write" : "read";
}
inline bool is_atomic(msl_access access) {
  return access >= MSL_ATOMIC_READ;
}

// Who accesses memory, and when: epochs count the barriers that order the kind of memory accessed.
struct Accessor {
  uint32_t threadgroup;
  uint32_t thread;
  uint32_t epoch;            // threadgroup barriers passed
  uint32_t simdgroup_epoch;  // simdgroup barriers passed
};
constexpr uint64_t kMaxThreadgroups = (uint64_t{1} << 22) - 1;  // those a cell can tell apart

// The last write and the last reads, each packed into a word; 0 is never.
struct Cell {
  uint64_t write = 0;
  uint64_t read = 0;
};

// Records an access to a cell. Returns "" or the race it makes with an earlier one: "read-after-write, against ...".
std::string find_race(Cell& cell, const Accessor& accessor, msl_access access);

std::string thread_name(uint32_t thread, uint32_t threadgroup);

}  // namespace torch_fused::emulator
