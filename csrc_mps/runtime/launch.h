// The launch seam: the one call an op makes to run a GPU kernel. It knows nothing of Metal or CUDA; the tensors' device
// picks the runtime: metal.mm (mps), cuda.cpp (cuda) or emulator.cpp (cpu, inside torch_fused.metal.emulate()).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace torch_fused {

constexpr size_t kMaxBuffers = 31;       // Metal's limit for one kernel, the parameters included
constexpr size_t kMaxParamBytes = 4096;  // Metal's limit for setBytes
constexpr int64_t kMaxThreads = 1024;    // threads in one threadgroup

// One op's kernels: the flattened Metal text and its CUDA translation, embedded at build time by setup.py. A Source is
// a static object that registers itself; they form a list, for `find_source` and for the emulator.
struct Source {
  Source(const char* name, const char* metal, const char* cuda);
  const char* name;
  const char* metal;
  const char* cuda;
  const Source* next;
};
const Source* first_source();
const Source& find_source(const std::string& name);

// One kernel launch as a runtime sees it: tensors are buffers 0 .. n-1, the parameters are buffer n.
struct Launch {
  const Source& source;
  const std::string& kernel;
  int64_t threadgroups;             // along x
  int64_t threads_per_threadgroup;  // along x
  at::TensorList tensors;
  const void* params;
  size_t params_size;
};

// Thrown by a runtime that cannot build a source on this machine; the op then falls back to torch (registration.h).
struct LibraryUnavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Checks the launch, then hands it to the runtime of the tensors' device. Asynchronous on a GPU. No threadgroups is no
// launch. An absent tensor is bound to any present one and flagged in the parameters.
void launch(const Launch& launch);

template <class Params>
void launch(const std::string& source, const std::string& kernel, int64_t threadgroups, int64_t threads_per_threadgroup,
            at::TensorList tensors, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && std::is_standard_layout_v<Params>, "parameters must be a POD");
  static_assert(sizeof(Params) % 8 == 0 && sizeof(Params) <= kMaxParamBytes, "pad parameters to 8 bytes, 4 KB at most");
  launch(Launch{find_source(source), kernel, threadgroups, threads_per_threadgroup, tensors, &params, sizeof(Params)});
}

// The runtimes. Each throws c10::Error for a failed launch and LibraryUnavailable when the source cannot be built.
void launch_cuda(const Launch& launch);
void launch_emulated(const Launch& launch);
#ifdef __APPLE__
void launch_metal(const Launch& launch);
#endif

// True while CPU tensors run the Metal kernels (torch_fused.metal.emulate()), on every thread.
bool emulating();

}  // namespace torch_fused
