#include "shadow.h"

namespace torch_fused::emulator {
namespace {

// An access in a word: [threadgroup + 1: 22 bits][thread: 10][epoch: 15][simdgroup epoch: 12][marks: 5]
constexpr uint64_t kAtomic = 1, kAtomicLoad = 2;
constexpr uint64_t kSeveralThreads = 4, kSeveralSimdgroups = 8, kSeveralThreadgroups = 16;

uint64_t pack(const Accessor& a, msl_access access) {
  return (uint64_t{a.threadgroup + 1} << 42) | (uint64_t{a.thread & 1023} << 32) | (uint64_t{a.epoch & 0x7fff} << 17) |
         (uint64_t{a.simdgroup_epoch & 0xfff} << 5) | (is_atomic(access) ? kAtomic : 0) |
         (access == MSL_ATOMIC_READ ? kAtomicLoad : 0);
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
  return (access >> 5) & 0xfff;
}

bool in_one_simdgroup(uint64_t recorded, uint64_t now) {
  return !(recorded & kSeveralSimdgroups) && simdgroup_of(recorded) == simdgroup_of(now);
}

bool in_one_threadgroup(uint64_t recorded, uint64_t now) {
  return !(recorded & kSeveralThreadgroups) && threadgroup_of(recorded) == threadgroup_of(now);
}

// Whether a recorded access is by another thread with no barrier between it and this one.
bool unordered(uint64_t recorded, uint64_t now) {
  if (!recorded) return false;
  if (!in_one_threadgroup(recorded, now)) return true;  // nothing orders threadgroups within a launch
  if (!(recorded & kSeveralThreads) && thread_of(recorded) == thread_of(now)) return false;
  if (epoch_of(recorded) != epoch_of(now)) return false;
  return !in_one_simdgroup(recorded, now) || simdgroup_epoch_of(recorded) == simdgroup_epoch_of(now);
}

// Whether two accesses, one of them a write, may come in either order. Atomic updates may, but a load that sees how far
// the updates of other threadgroups have come would make them wait for one another.
bool conflict(uint64_t recorded, uint64_t now) {
  if (!unordered(recorded, now)) return false;
  if (!(recorded & now & kAtomic)) return true;
  return !in_one_threadgroup(recorded, now) && ((recorded | now) & kAtomicLoad);
}

// Reads are stored as one: the newest, with marks for the others that it represents.
uint64_t merge_reads(uint64_t recorded, uint64_t now) {
  if (!recorded) return now;
  const bool one_threadgroup = in_one_threadgroup(recorded, now);
  if (one_threadgroup && epoch_of(recorded) != epoch_of(now)) return now;
  const bool one_simdgroup = one_threadgroup && in_one_simdgroup(recorded, now);
  if (one_simdgroup && simdgroup_epoch_of(recorded) != simdgroup_epoch_of(now)) return now;
  const bool one_thread = one_simdgroup && thread_of(recorded) == thread_of(now);
  if (!(recorded & kAtomic)) now &= ~kAtomic;
  now |= recorded & (kAtomicLoad | kSeveralThreads | kSeveralSimdgroups | kSeveralThreadgroups);
  return now | (one_thread ? 0 : kSeveralThreads) | (one_simdgroup ? 0 : kSeveralSimdgroups) |
         (one_threadgroup ? 0 : kSeveralThreadgroups);
}

std::string describe(const char* hazard, uint64_t other) {
  return std::string(hazard) + ", against " + thread_name(thread_of(other), threadgroup_of(other) - 1);
}

}  // namespace

std::string find_race(Cell& cell, const Accessor& accessor, msl_access access) {
  const uint64_t now = pack(accessor, access);
  if (conflict(cell.write, now)) return describe(reads(access) ? "read-after-write" : "write-after-write", cell.write);
  if (writes(access) && conflict(cell.read, now)) return describe("write-after-read", cell.read);
  if (reads(access)) cell.read = merge_reads(cell.read, now);
  if (writes(access)) cell.write = now;
  return {};
}

std::string thread_name(uint32_t thread, uint32_t threadgroup) {
  return "thread " + std::to_string(thread) + " of threadgroup " + std::to_string(threadgroup);
}

}  // namespace torch_fused::emulator
