#include "shadow.h"

namespace torch_fused::emulator {
namespace {

// An access in a word: [threadgroup + 1: 22 bits][thread: 10][epoch: 15][simdgroup epoch: 13][marks: 4]
constexpr uint64_t kAtomic = 1, kSeveralThreads = 2, kSeveralSimdgroups = 4, kSeveralThreadgroups = 8;  // marks

uint64_t pack(const Accessor& a, bool atomic) {
  return (uint64_t{a.threadgroup + 1} << 42) | (uint64_t{a.thread & 1023} << 32) | (uint64_t{a.epoch & 0x7fff} << 17) |
         (uint64_t{a.simdgroup_epoch & 0x1fff} << 4) | (atomic ? kAtomic : 0);
}
uint32_t threadgroup_of(uint64_t access) {
  return static_cast<uint32_t>(access >> 42);
}
uint32_t thread_of(uint64_t access) {
  return (access >> 32) & 1023;
}
uint32_t simdgroup_of(uint64_t access) {
  return thread_of(access) / 32;
}
uint32_t epoch_of(uint64_t access) {
  return (access >> 17) & 0x7fff;
}
uint32_t simdgroup_epoch_of(uint64_t access) {
  return (access >> 4) & 0x1fff;
}

bool in_one_simdgroup(uint64_t recorded, uint64_t now) {
  return !(recorded & kSeveralSimdgroups) && simdgroup_of(recorded) == simdgroup_of(now);
}

// Whether a recorded access is by another thread with no barrier between it and this one.
bool unordered(uint64_t recorded, uint64_t now) {
  if (!recorded) return false;
  // Nothing orders threadgroups within a launch.
  if ((recorded & kSeveralThreadgroups) || threadgroup_of(recorded) != threadgroup_of(now)) return true;
  if (!(recorded & kSeveralThreads) && thread_of(recorded) == thread_of(now)) return false;
  if (epoch_of(recorded) != epoch_of(now)) return false;
  return !in_one_simdgroup(recorded, now) || simdgroup_epoch_of(recorded) == simdgroup_epoch_of(now);
}

// Reads are kept as one: the newest, with marks for what it stands for besides itself.
uint64_t merge_reads(uint64_t recorded, uint64_t now) {
  if (!recorded) return now;
  if ((recorded & kSeveralThreadgroups) || threadgroup_of(recorded) != threadgroup_of(now)) {
    return (now & (recorded | ~kAtomic)) | kSeveralThreads | kSeveralSimdgroups | kSeveralThreadgroups;
  }
  if (epoch_of(recorded) != epoch_of(now)) return now;
  if (in_one_simdgroup(recorded, now) && simdgroup_epoch_of(recorded) != simdgroup_epoch_of(now)) return now;
  if (!(recorded & kAtomic)) now &= ~kAtomic;
  if (thread_of(recorded) != thread_of(now)) now |= kSeveralThreads;
  if (simdgroup_of(recorded) != simdgroup_of(now)) now |= kSeveralSimdgroups;
  return now | (recorded & (kSeveralThreads | kSeveralSimdgroups));
}

std::string describe(const char* hazard, uint64_t other) {
  return std::string(hazard) + ", against " + thread_name(thread_of(other), threadgroup_of(other) - 1);
}

}  // namespace

std::string find_race(Cell& cell, const Accessor& accessor, msl_access access) {
  const uint64_t now = pack(accessor, is_atomic(access));
  const auto conflicts = [now](uint64_t recorded) { return unordered(recorded, now) && !(recorded & now & kAtomic); };
  if (conflicts(cell.write)) return describe(reads(access) ? "read-after-write" : "write-after-write", cell.write);
  if (writes(access) && conflicts(cell.read)) return describe("write-after-read", cell.read);
  if (reads(access)) cell.read = merge_reads(cell.read, now);
  if (writes(access)) cell.write = now;
  return {};
}

std::string thread_name(uint32_t thread, uint32_t threadgroup) {
  return "thread " + std::to_string(thread) + " of threadgroup " + std::to_string(threadgroup);
}

}  // namespace torch_fused::emulator
