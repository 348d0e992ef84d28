// One Metal source's kernels, compiled for the host by torch_fused/metal/host.py and loaded into this process.
#pragma once

#include <cstdint>
#include <string>

struct msl_args;

namespace torch_fused::emulator {

class KernelLibrary {
 public:
  // Loads a shared object, once; it stays loaded. Throws c10::Error.
  static const KernelLibrary& open(const std::string& path);

  // Throws c10::Error if there is no such kernel.
  void (*find(const std::string& kernel) const)(const msl_args*);
  const void* image() const { return image_; }
  // " [rms_norm.metal:42]", the line of Metal source that a program counter is in, or "" if that cannot be told.
  std::string place(uintptr_t pc) const;

 private:
  explicit KernelLibrary(const std::string& path);

  std::string path_;
  void* handle_;
  const void* image_;  // where it is loaded
};

}  // namespace torch_fused::emulator
