// The buffers bound to one dispatch: their bounds, the races on them and the traffic to them. The kernel gets copies
// with large gaps between them: next to another buffer, an access past a buffer's end would not be noticed.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "shadow.h"

namespace torch_fused::emulator {

struct Buffer {
  int index;
  uintptr_t begin, end;   // what the kernel may touch
  uint32_t element_size;  // of the tensor
  bool read_only = false;
  // Bytes: every access counted, and each byte counted once.
  int64_t read = 0, written = 0, distinct_read = 0, distinct_written = 0;
};

class DeviceMemory {
 public:
  // Moves `buffers` to copies and counts their traffic. Buffers that overlap stay so and share their cells; traffic to
  // them counts for the first.
  explicit DeviceMemory(std::vector<Buffer>& buffers);

  // Copies what the kernel may have written to where it belongs.
  void write_back() const;

  // Checks and records an access. Returns what is wrong with it, or "".
  std::string access(uintptr_t address, size_t size, msl_access access, const Accessor& accessor);

  // Whether an address is in a buffer, if only just.
  bool holds(uintptr_t address) const;
  // For an access outside all buffers: " (4 bytes past the end of buffer 0)" if it is near one.
  std::string nearest(uintptr_t address) const;

 private:
  struct Region {  // of buffers that overlap
    uintptr_t begin, end;
    uintptr_t origin;  // what it is a copy of
    uint32_t bytes_per_cell;
    std::unique_ptr<Cell, void (*)(void*)> cells{nullptr, nullptr};
  };
  // The buffer that holds the bytes, one that may be written if there is a choice, or null.
  Buffer* find(uintptr_t address, size_t size, msl_access access);
  const Region& region_of(const Buffer& buffer) const;
  void move_apart();

  std::vector<Buffer>& buffers_;
  std::vector<Region> regions_;
  std::shared_ptr<char> copies_;
};

}  // namespace torch_fused::emulator
