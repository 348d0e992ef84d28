// NVIDIA runtime: builds a source for a device, and launches its kernels.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <array>
#include <map>
#include <mutex>
#include <vector>

#include "cubin.h"
#include "cuda_driver.h"
#include "cuda_graph.h"
#include "launch.h"

namespace torch_fused {
namespace {

constexpr int kFirstWithEarlyLaunches = 9;  // compute capability

// A thread that has not called the CUDA runtime yet has no context for the driver API.
void ensure_context(const Launch& launch, int device) {
  const Driver& api = driver();
  void* context = nullptr;
  api.check(api.current_context(&context), launch, "cuCtxGetCurrent");
  if (context) return;
  api.check(api.primary_context(&context, device), launch, "cuDevicePrimaryCtxRetain");
  api.check(api.set_current_context(context), launch, "cuCtxSetCurrent");
}

// One op's kernels on one device, kept for the life of the process.
struct Module {
  void* handle = nullptr;
  std::string unavailable;  // why it could not be built; it is tried only once
  std::map<std::string, void*> functions;
};

// The first launch of a kernel may come during a graph capture, in which a thread may load only what it relaxes.
struct RelaxedCapture {
  RelaxedCapture() { driver().exchange_capture_mode(&mode); }
  ~RelaxedCapture() { driver().exchange_capture_mode(&mode); }
  int mode = kRelaxedCaptureMode;
};

std::pair<int, int> compute_capability(const Launch& launch, int device) {
  static std::array<std::atomic<int>, kMaxDevices> known{};  // 10 * major + minor
  int found = known.at(device);
  if (!found) {
    const Driver& api = driver();
    int handle = 0, major = 0, minor = 0;
    api.check(api.device_get(&handle, device), launch, "cuDeviceGet");
    api.check(api.device_attribute(&major, kComputeCapabilityMajor, handle), launch, "cuDeviceGetAttribute");
    api.check(api.device_attribute(&minor, kComputeCapabilityMinor, handle), launch, "cuDeviceGetAttribute");
    known.at(device) = found = 10 * major + minor;
  }
  return {found / 10, found % 10};
}

Module load(const Launch& launch, int device) {
  const Driver& api = driver();
  Module module;
  const auto [major, minor] = compute_capability(launch, device);
  try {
    const std::string code = cubin(launch.kernel.source, major, minor);
    const RelaxedCapture relaxed;
    api.check(api.load_module(&module.handle, code.data()), launch, "cuModuleLoadData");
  } catch (const LibraryUnavailable& error) {
    module.unavailable = error.what();
  }
  return module;
}

struct Modules {
  std::mutex mutex;
  std::map<std::pair<const Source*, int>, Module> of;  // a source on a device
};

Modules& modules() {
  static Modules all;
  return all;
}

void* find_function(const Launch& launch, int device) {
  std::atomic<void*>& known = launch.kernel.functions.at(device);
  if (void* function = known.load(std::memory_order_acquire)) return function;
  const std::lock_guard<std::mutex> lock(modules().mutex);
  const std::pair<const Source*, int> key{&launch.kernel.source, device};
  auto found = modules().of.find(key);
  if (found == modules().of.end()) found = modules().of.emplace(key, load(launch, device)).first;
  Module& module = found->second;
  if (!module.handle) throw LibraryUnavailable(module.unavailable);
  void*& function = module.functions[launch.kernel.name];
  if (!function) {
    const RelaxedCapture relaxed;  // the driver may load each function when it is first asked for
    driver().check(driver().get_function(&function, module.handle, launch.kernel.name.c_str()), launch,
                   "cuModuleGetFunction");
  }
  known.store(function, std::memory_order_release);
  return function;
}

}  // namespace

void launch_cuda(c10::ArrayRef<Launch> launches, Repeats* repeats) {
  const c10::Device device = launches[0].tensors[0].device();
  const c10::DeviceGuard guard(device);
  ensure_context(launches[0], device.index());
  std::vector<void*> functions;
  functions.reserve(launches.size());
  for (const Launch& launch : launches) {
    TORCH_INTERNAL_ASSERT(launch.threads_per_threadgroup % 32 == 0, "cuda.h counts on whole warps, got ",
                          launch.threads_per_threadgroup, " threads");
    functions.push_back(launch.threadgroups ? find_function(launch, device.index()) : nullptr);
  }
  const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
  void* stream = cuda.getStreamNativeHandle(cuda.getStream(device));

  const bool early_launches = compute_capability(launches[0], device.index()).first >= kFirstWithEarlyLaunches;
  if (repeats && launch_graph(*repeats, launches, functions, device.index(), stream, early_launches)) return;
  LaunchAttribute early{kProgrammaticStreamSerialization, 0, {1}};
  std::array<void*, kMaxBuffers> pointers;
  std::array<void*, kMaxBuffers> arguments;
  for (size_t i = 0; i < launches.size(); ++i) {
    const Launch& launch = launches[i];
    if (!functions[i]) continue;
    const size_t count = launch.tensors.size();
    for (size_t j = 0; j < count; ++j) {
      pointers[j] = launch.tensors[j].data_ptr();
      arguments[j] = &pointers[j];
    }
    arguments[count] = const_cast<void*>(launch.params);
    const LaunchConfig config{{static_cast<unsigned>(launch.threadgroups), 1, 1},
                              {static_cast<unsigned>(launch.threads_per_threadgroup), 1, 1},
                              0,
                              stream,
                              &early,
                              launch.early && early_launches ? 1u : 0u};
    driver().check(driver().launch(&config, functions[i], arguments.data(), nullptr), launch, "cuLaunchKernelEx");
  }
}

}  // namespace torch_fused

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  // Every kernel that has been launched on an NVIDIA GPU in this process.
  m.def("_cuda_kernels() -> str[]", []() {
    const std::lock_guard<std::mutex> lock(torch_fused::modules().mutex);
    std::vector<std::string> names;
    for (const auto& [key, module] : torch_fused::modules().of) {
      for (const auto& [name, function] : module.functions) names.push_back(name);
    }
    return names;
  });
}
