// Shadow memory: for every element that a launch can reach, who touched it last, to find races and count traffic.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace torch_fused::emulator {

// Who accesses memory, and when: epochs count the barriers passed that order this kind of memory.
struct Accessor {
  uint32_t threadgroup;
  uint32_t thread;
  uint32_t epoch;            // threadgroup barriers
  uint32_t simdgroup_epoch;  // simdgroup barriers
};

// The last write and the reads since of one element, each packed into a word; 0 is never.
struct Cell {
  uint64_t write = 0;
  uint64_t read = 0;
};

// Records one access of a cell. Returns what it conflicts with, or null: "read-after-write" and so on; `other` is then
// the access on the other side.
const char* touch(Cell& cell, const Accessor& accessor, bool write, bool atomic, Accessor* other);

// One bound buffer and its traffic.
struct Buffer {
  int index;
  uintptr_t begin, end;  // what the kernel may touch
  uint32_t element_size;
  bool read_only;
  uint64_t read = 0, written = 0;  // bytes, every access counted
};

// The device memory of one launch. Buffers that overlap share their cells.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::vector<Buffer> buffers);

  // The buffer that holds all of [address, address + size), or null.
  Buffer* find(uintptr_t address, size_t size);
  // Cells of [address, address + size) inside `buffer`.
  std::pair<Cell*, size_t> cells(const Buffer& buffer, uintptr_t address, size_t size);
  // Bytes of `buffer` that were read, and written, at least once.
  std::pair<uint64_t, uint64_t> distinct(const Buffer& buffer);
  // For an address in no buffer: " (4 bytes past the end of buffer 0)" if it is near one.
  std::string nearest(uintptr_t address) const;

  const std::vector<Buffer>& buffers() const { return buffers_; }

 private:
  struct Region {
    uintptr_t begin, end;
    uint32_t granularity;  // bytes a cell
    std::vector<Cell> cells;
  };
  Region& region(const Buffer& buffer);

  std::vector<Buffer> buffers_;
  std::vector<Region> regions_;
};

}  // namespace torch_fused::emulator
