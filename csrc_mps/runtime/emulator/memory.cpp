#include "memory.h"

#include <algorithm>

namespace torch_fused::emulator {
namespace {

// [threadgroup + 1: 22 bits][thread: 10][epoch: 15][simdgroup epoch: 14][atomic][several threads][several simdgroups]
constexpr uint64_t kSeveralSimdgroups = 1, kSeveralThreads = 2, kAtomic = 4;

uint64_t pack(const Accessor& a, bool atomic) {
  return (uint64_t(a.threadgroup + 1) << 42) | (uint64_t(a.thread & 1023) << 32) | (uint64_t(a.epoch & 0x7fff) << 17) |
         (uint64_t(a.simdgroup_epoch & 0x3fff) << 3) | (atomic ? kAtomic : 0);
}
uint32_t threadgroup_of(uint64_t access) {
  return uint32_t(access >> 42);
}
uint32_t thread_of(uint64_t access) {
  return (access >> 32) & 1023;
}
uint32_t epoch_of(uint64_t access) {
  return (access >> 17) & 0x7fff;
}
uint32_t simdgroup_epoch_of(uint64_t access) {
  return (access >> 3) & 0x3fff;
}

// Whether a recorded access is by another thread with no barrier between it and this one.
bool unordered(uint64_t recorded, uint64_t now) {
  if (!recorded) return false;
  if (threadgroup_of(recorded) != threadgroup_of(now)) return true;  // nothing orders threadgroups within a launch
  if (thread_of(recorded) == thread_of(now) && !(recorded & kSeveralThreads)) return false;
  if (epoch_of(recorded) != epoch_of(now)) return false;
  const bool same_simdgroup = !(recorded & kSeveralSimdgroups) && thread_of(recorded) / 32 == thread_of(now) / 32;
  return !(same_simdgroup && simdgroup_epoch_of(recorded) != simdgroup_epoch_of(now));
}

// The reads of a cell are kept as one: the newest, with a mark if others of its epoch are by other threads.
uint64_t merge_reads(uint64_t recorded, uint64_t now) {
  if (!recorded) return now;
  if (threadgroup_of(recorded) != threadgroup_of(now)) return now | kSeveralThreads | kSeveralSimdgroups;
  if (epoch_of(recorded) != epoch_of(now)) return now;
  if ((recorded & kSeveralThreads) || thread_of(recorded) != thread_of(now)) now |= kSeveralThreads;
  if ((recorded & kSeveralSimdgroups) || thread_of(recorded) / 32 != thread_of(now) / 32) now |= kSeveralSimdgroups;
  return now;
}

}  // namespace

const char* touch(Cell& cell, const Accessor& accessor, bool write, bool atomic, Accessor* other) {
  const uint64_t now = pack(accessor, atomic);
  const auto conflicts = [&](uint64_t recorded) {
    if (!unordered(recorded, now) || (atomic && (recorded & kAtomic))) return false;
    *other = {threadgroup_of(recorded) - 1, thread_of(recorded), 0, 0};
    return true;
  };
  if (conflicts(cell.write)) return write ? "write-after-write" : "read-after-write";
  if (write && conflicts(cell.read)) return "write-after-read";
  if (write) {
    cell.write = now;
  } else {
    cell.read = merge_reads(cell.read, now);
  }
  return nullptr;
}

DeviceMemory::DeviceMemory(std::vector<Buffer> buffers) : buffers_(std::move(buffers)) {
  std::vector<Buffer> sorted;
  for (const Buffer& buffer : buffers_) {
    if (!buffer.read_only) sorted.push_back(buffer);
  }
  std::sort(sorted.begin(), sorted.end(), [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; });
  for (const Buffer& buffer : sorted) {
    const uint32_t granularity = std::clamp(buffer.element_size, 1u, 4u);
    if (!regions_.empty() && buffer.begin < regions_.back().end) {
      regions_.back().end = std::max(regions_.back().end, buffer.end);
      regions_.back().granularity = std::min(regions_.back().granularity, granularity);
    } else {
      regions_.push_back({buffer.begin, buffer.end, granularity, {}});
    }
  }
  for (Region& region : regions_) region.cells.resize((region.end - region.begin) / region.granularity + 1);
}

Buffer* DeviceMemory::find(uintptr_t address, size_t size) {
  for (Buffer& buffer : buffers_) {
    if (address >= buffer.begin && address + size <= buffer.end) return &buffer;
  }
  return nullptr;
}

DeviceMemory::Region& DeviceMemory::region(const Buffer& buffer) {
  return *std::find_if(regions_.begin(), regions_.end(),
                       [&](const Region& r) { return buffer.begin >= r.begin && buffer.end <= r.end; });
}

std::pair<Cell*, size_t> DeviceMemory::cells(const Buffer& buffer, uintptr_t address, size_t size) {
  Region& r = region(buffer);
  const size_t first = (address - r.begin) / r.granularity;
  return {&r.cells[first], (address + size - 1 - r.begin) / r.granularity - first + 1};
}

std::pair<uint64_t, uint64_t> DeviceMemory::distinct(const Buffer& buffer) {
  std::pair<uint64_t, uint64_t> bytes{0, 0};
  if (buffer.read_only || buffer.begin == buffer.end) return bytes;
  const auto [cell, count] = cells(buffer, buffer.begin, buffer.end - buffer.begin);
  const uint32_t granularity = region(buffer).granularity;
  for (size_t i = 0; i < count; ++i) {
    bytes.first += cell[i].read ? granularity : 0;
    bytes.second += cell[i].write ? granularity : 0;
  }
  return bytes;
}

std::string DeviceMemory::nearest(uintptr_t address) const {
  uintptr_t best = 1 << 20;
  std::string text;
  const auto consider = [&](uintptr_t distance, const char* where, const Buffer& buffer) {
    if (distance >= best) return;
    best = distance;
    text = " (" + std::to_string(distance) + where + std::to_string(buffer.index) + ")";
  };
  for (const Buffer& buffer : buffers_) {
    if (address >= buffer.end) consider(address - buffer.end, " bytes past the end of buffer ", buffer);
    if (address < buffer.begin) consider(buffer.begin - address, " bytes before buffer ", buffer);
    if (address >= buffer.begin && address < buffer.end)
      return " (across the end of buffer " + std::to_string(buffer.index) + ")";
  }
  return text;
}

}  // namespace torch_fused::emulator
