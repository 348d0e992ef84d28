// The launch interface: the one call an op makes to run GPU kernels. It is independent of Metal and CUDA; the tensors'
// device selects the runtime: metal.mm (mps), cuda.cpp (cuda) or emulator.cpp (cpu, in torch_fused.metal.emulate()).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "source.h"

namespace torch_fused {

constexpr size_t kMaxBuffers = 31;       // Metal's limit for one kernel, the parameters included
constexpr size_t kMaxParamBytes = 4096;  // Metal's limit for setBytes
constexpr int64_t kMaxThreads = 1024;    // threads in one threadgroup
constexpr size_t kMaxDevices = 64;

// A kernel of a source by its name. Each is created once and lives as long as the process, with the runtimes' data
// for it.
struct Kernel {
  Kernel(const Source& source, std::string name) : source(source), name(std::move(name)) {}
  const Source& source;
  const std::string name;
  mutable std::array<std::atomic<void*>, kMaxDevices> functions{};  // on each device; null until it is first launched
};
const Kernel& find_kernel(const std::string& source, const std::string& name);

// The kernels of one name for each dtype and variant, so that a launch does not build names: "rms_norm_f32_4".
class KernelSet {
 public:
  KernelSet(const char* source, const char* prefix) : source_(source), prefix_(prefix) {}
  const Kernel& operator()(at::ScalarType dtype, int64_t variant = kNoVariant);
  const Kernel& operator()(const at::Tensor& of, int64_t variant = kNoVariant) {
    return (*this)(of.scalar_type(), variant);
  }

 private:
  static constexpr int64_t kNoVariant = 15, kVariants = 16, kDtypes = 3;
  const char *source_, *prefix_;
  std::atomic<const Kernel*> found_[kDtypes][kVariants] = {};
};

// One kernel launch as a runtime sees it: tensors are buffers 0 .. n-1, the parameters are buffer n.
struct Launch {
  const Kernel& kernel;
  int64_t threadgroups;             // along x
  int64_t threads_per_threadgroup;  // along x
  at::TensorList tensors;
  const void* params;
  size_t params_size;
  bool early = false;  // it may begin before the launch ahead of it is done: its kernel waits on its own
};

// Thrown by a runtime that cannot build a source on this machine; the op then falls back to torch (registration.h).
struct LibraryUnavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A runtime's data for an owner that repeats the same launches with different arguments.
struct Repeats {
  struct Kept {
    virtual ~Kept() = default;
  };
  std::mutex mutex;
  std::vector<std::unique_ptr<Kept>> kept;
};

// Checks the launches, then passes them, in order and at once, to the runtime of the tensors' device. Asynchronous on a
// GPU. No threadgroups is no launch. An absent tensor is bound to any present one and flagged in the parameters.
void launch(c10::ArrayRef<Launch> launches, Repeats* repeats = nullptr);

template <class Params>
constexpr size_t params_size() {
  static_assert(std::is_trivially_copyable_v<Params> && std::is_standard_layout_v<Params>, "parameters must be a POD");
  static_assert(sizeof(Params) % 8 == 0 && sizeof(Params) <= kMaxParamBytes, "pad parameters to 8 bytes, 4 KB at most");
  return sizeof(Params);
}

template <class Params>
void launch(const Kernel& kernel, int64_t threadgroups, int64_t threads_per_threadgroup, at::TensorList tensors,
            const Params& params) {
  launch(Launch{kernel, threadgroups, threads_per_threadgroup, tensors, &params, params_size<Params>()});
}

// Launches that are collected, then passed to the runtime at once. After the first, each may begin early.
class LaunchList {
 public:
  using Operands = c10::ArrayRef<std::reference_wrapper<const at::Tensor>>;

  void reserve(size_t launches) {
    entries_.reserve(launches);
    tensors_.reserve(launches * kUsualOperands);
    params_.reserve(launches * kUsualParams);
  }

  template <class Params>
  void add(const Kernel& kernel, int64_t threadgroups, int64_t threads_per_threadgroup, Operands tensors,
           const Params& params) {
    entries_.push_back({kernel, threadgroups, threads_per_threadgroup, tensors_.size(), tensors.size(), params_.size(),
                        params_size<Params>()});
    tensors_.insert(tensors_.end(), tensors.begin(), tensors.end());
    params_.resize(params_.size() + sizeof(Params) / sizeof(uint64_t));
    std::memcpy(&params_[entries_.back().first_param], &params, sizeof(Params));
  }
  void run(Repeats& repeats) const;

 private:
  struct Entry {
    const Kernel& kernel;
    int64_t threadgroups, threads_per_threadgroup;
    size_t first_tensor, tensors, first_param, params_size;
  };
  static constexpr size_t kUsualOperands = 16, kUsualParams = 32;  // of a launch; parameters in units of 8 bytes
  std::vector<Entry> entries_;
  std::vector<at::Tensor> tensors_;
  std::vector<uint64_t> params_;
};

// The runtimes. Each throws c10::Error for a failed launch and LibraryUnavailable when a source cannot be built; then
// none of the launches has been made.
void launch_cuda(c10::ArrayRef<Launch> launches, Repeats* repeats);
void launch_emulated(c10::ArrayRef<Launch> launches);
#ifdef __APPLE__
void launch_metal(c10::ArrayRef<Launch> launches);
#endif

// True while CPU tensors run the Metal kernels (torch_fused.metal.emulate()), on every thread.
bool emulating();

}  // namespace torch_fused
