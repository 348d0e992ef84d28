#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace torch_fused::emulator {
namespace {

constexpr uintptr_t kPage = 4096;
constexpr uintptr_t kGap = 1 << 20;  // between two copies; what lies further from a buffer is likely just wrong

}  // namespace

DeviceMemory::DeviceMemory(std::vector<Buffer>& buffers) : buffers_(buffers) {
  std::vector<Buffer> sorted = buffers;
  std::sort(sorted.begin(), sorted.end(), [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; });
  for (const Buffer& buffer : sorted) {
    const uint32_t bytes_per_cell = std::clamp(buffer.element_size, 1u, 4u);
    if (!regions_.empty() && buffer.begin < regions_.back().end) {
      Region& last = regions_.back();
      last.end = std::max(last.end, buffer.end);
      last.bytes_per_cell = std::min(last.bytes_per_cell, bytes_per_cell);
    } else if (buffer.begin < buffer.end) {
      regions_.push_back({buffer.begin, buffer.end, buffer.begin, bytes_per_cell});
    }
  }
  for (Region& region : regions_) {
    // calloc's large blocks cost nothing until they are touched.
    const size_t count = (region.end - region.begin) / region.bytes_per_cell + 1;
    region.cells = {static_cast<Cell*>(std::calloc(count, sizeof(Cell))), std::free};
    if (!region.cells) throw std::bad_alloc();
  }
  move_apart();
}

void DeviceMemory::move_apart() {
  uintptr_t size = kGap;
  for (const Region& region : regions_) size += region.end - region.begin + kPage + kGap;
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  copies_ = {static_cast<char*>(memory), [size](char* copies) { munmap(copies, size); }};
  uintptr_t next = reinterpret_cast<uintptr_t>(memory) + kGap;
  std::vector<uintptr_t> distances(buffers_.size());
  for (Region& region : regions_) {
    const uintptr_t begin = next + (region.origin - next) % kPage;  // aligned as it was
    std::memcpy(reinterpret_cast<void*>(begin), reinterpret_cast<void*>(region.origin), region.end - region.begin);
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (buffers_[i].begin >= region.begin && buffers_[i].end <= region.end) distances[i] = begin - region.origin;
    }
    region.end += begin - region.begin;
    region.begin = begin;
    next = region.end + kGap;
  }
  for (size_t i = 0; i < buffers_.size(); ++i) {
    buffers_[i].begin += distances[i];
    buffers_[i].end += distances[i];
  }
}

void DeviceMemory::write_back() const {
  for (const Buffer& buffer : buffers_) {
    if (buffer.read_only || buffer.begin == buffer.end) continue;
    const Region& region = region_of(buffer);
    std::memcpy(reinterpret_cast<void*>(region.origin + (buffer.begin - region.begin)),
                reinterpret_cast<void*>(buffer.begin), buffer.end - buffer.begin);
  }
}

std::string DeviceMemory::access(uintptr_t address, size_t size, msl_access access, const Accessor& accessor) {
  Buffer* found = find(address, size, access);
  if (!found) {
    return std::string("out-of-bounds device ") + verb(access) + " of " + std::to_string(size) + " bytes" +
           nearest(address);
  }
  Buffer& buffer = *found;
  // A type's size is a multiple of its alignment: 40 bytes are a struct of words of 8.
  if (address % std::min<size_t>(size & -size, 16) != 0) {
    return std::string("misaligned ") + verb(access) + " of " + std::to_string(size) + " bytes at byte " +
           std::to_string(address - buffer.begin) + " of buffer " + std::to_string(buffer.index);
  }
  if (buffer.read_only && writes(access)) return "write to read-only buffer " + std::to_string(buffer.index);
  if (reads(access)) buffer.read += size;
  if (writes(access)) buffer.written += size;
  const Region& region = region_of(buffer);
  const size_t first = (address - region.begin) / region.bytes_per_cell;
  const size_t last = (address + size - 1 - region.begin) / region.bytes_per_cell;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = region.cells.get()[i];
    if (reads(access) && !cell.read) buffer.distinct_read += region.bytes_per_cell;
    if (writes(access) && !cell.write) buffer.distinct_written += region.bytes_per_cell;
    const std::string race = find_race(cell, accessor, access);
    if (!race.empty()) return "data race on buffer " + std::to_string(buffer.index) + " (" + race + ")";
  }
  return {};
}

Buffer* DeviceMemory::find(uintptr_t address, size_t size, msl_access access) {
  Buffer* found = nullptr;
  for (Buffer& buffer : buffers_) {
    if (address < buffer.begin || address + size > buffer.end) continue;
    if (!writes(access) || !buffer.read_only) return &buffer;
    found = &buffer;
  }
  return found;
}

const DeviceMemory::Region& DeviceMemory::region_of(const Buffer& buffer) const {
  return *std::find_if(regions_.begin(), regions_.end(),
                       [&](const Region& region) { return buffer.begin >= region.begin && buffer.end <= region.end; });
}

bool DeviceMemory::holds(uintptr_t address) const {
  return std::any_of(regions_.begin(), regions_.end(),
                     [&](const Region& region) { return address >= region.begin && address < region.end; });
}

std::string DeviceMemory::nearest(uintptr_t address) const {
  uintptr_t best = kGap;
  std::string text;
  const auto consider = [&](uintptr_t distance, const char* where, const Buffer& buffer) {
    if (distance >= best) return;
    best = distance;
    text = " (" + std::to_string(distance) + where + std::to_string(buffer.index) + ")";
  };
  for (const Buffer& buffer : buffers_) {
    if (address >= buffer.end) {
      consider(address - buffer.end, " bytes past the end of buffer ", buffer);
    } else if (address < buffer.begin) {
      consider(buffer.begin - address, " bytes before buffer ", buffer);
    } else {
      return " (across the end of buffer " + std::to_string(buffer.index) + ")";
    }
  }
  return text;
}

}  // namespace torch_fused::emulator
