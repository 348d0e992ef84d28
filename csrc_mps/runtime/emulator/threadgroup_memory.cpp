#include "threadgroup_memory.h"

#include <algorithm>
#include <cstring>

namespace torch_fused::emulator {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kGap = 16;  // between arrays, so that running past one is seen

}  // namespace

ThreadgroupMemory::ThreadgroupMemory() : storage_(new char[kSpace + kAlignment]), cells_(kSpace) {
  const auto address = reinterpret_cast<uintptr_t>(storage_.get());
  bytes_ = storage_.get() + (kAlignment - address % kAlignment);
  next_ = kSpace;
  reset();
}

void ThreadgroupMemory::reset() {
  std::memset(bytes_, 0xff, next_);  // NaN
  std::fill(cells_.begin(), cells_.begin() + next_, Cell{});
  arrays_.clear();
  used_ = next_ = 0;
}

void* ThreadgroupMemory::array(int id, size_t size, size_t align) {
  const auto found = std::find_if(arrays_.begin(), arrays_.end(), [&](const Array& array) { return array.id == id; });
  if (found != arrays_.end()) return bytes_ + found->offset;
  used_ = (used_ + align - 1) / align * align + size;
  if (used_ > kThreadgroupBytes) return nullptr;
  const size_t offset = (next_ + align - 1) / align * align;
  arrays_.push_back({id, offset, size});
  next_ = offset + size + kGap;
  return bytes_ + offset;
}

std::string ThreadgroupMemory::access(uintptr_t address, size_t size, msl_access access, const Accessor& accessor) {
  const size_t offset = address - reinterpret_cast<uintptr_t>(bytes_);
  const bool inside = std::any_of(arrays_.begin(), arrays_.end(), [&](const Array& array) {
    return offset >= array.offset && offset + size <= array.offset + array.size;
  });
  if (!inside) {
    return std::string("out-of-bounds threadgroup ") + verb(access) + " of " + std::to_string(size) + " bytes";
  }
  if (offset % std::min<size_t>(size & -size, 16) != 0) {
    return std::string("misaligned ") + verb(access) + " of " + std::to_string(size) + " bytes of threadgroup memory";
  }
  for (size_t i = offset; i < offset + size; ++i) {
    if (reads(access) && !cells_[i].write) return "read of uninitialised threadgroup memory";
    const std::string race = find_race(cells_[i], accessor, access);
    if (!race.empty()) return "data race on threadgroup memory (" + race + ")";
  }
  return {};
}

}  // namespace torch_fused::emulator
