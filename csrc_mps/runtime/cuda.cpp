// NVIDIA runtime: the driver API through dlopen, so that one build serves torch with and without CUDA.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <array>
#include <map>
#include <mutex>
#include <vector>

#include "cubin.h"
#include "launch.h"

namespace torch_fused {
namespace {

constexpr int kRelaxedCapture = 2;                                         // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // CUdevice_attribute

// The few driver functions used, with their documented signatures; handles are opaque pointers.
struct Driver {
  int (*device_get)(int*, int);
  int (*device_attribute)(int*, int, int);
  int (*primary_context)(void**, int);
  int (*current_context)(void**);
  int (*set_current_context)(void*);
  int (*exchange_capture_mode)(int*);
  int (*load_module)(void**, const void*);
  int (*get_function)(void**, void*, const char*);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*error_name)(int, const char**);

  void check(int status, const Launch& launch, const char* step) const {
    if (status == 0) return;
    const char* name = nullptr;
    error_name(status, &name);
    TORCH_CHECK(false, "torch_fused: CUDA kernel ", launch.kernel, ": ", step,
                " failed: ", name ? name : "unknown error");
  }
};

const Driver& driver() {
  static const Driver api = [] {
    void* library = open_library({"libcuda.so.1"});
    Driver d;
    const auto bind = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol(library, name));
    };
    bind(d.device_get, "cuDeviceGet");
    bind(d.device_attribute, "cuDeviceGetAttribute");
    bind(d.primary_context, "cuDevicePrimaryCtxRetain");
    bind(d.current_context, "cuCtxGetCurrent");
    bind(d.set_current_context, "cuCtxSetCurrent");
    bind(d.exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
    bind(d.load_module, "cuModuleLoadData");
    bind(d.get_function, "cuModuleGetFunction");
    bind(d.launch, "cuLaunchKernel");
    bind(d.error_name, "cuGetErrorName");
    return d;
  }();
  return api;
}

// A thread that has not called the CUDA runtime yet has no context, which the driver API needs.
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
  std::string unavailable;  // why it could not be built, so that it is tried once
  std::map<std::string, void*> functions;
};

Module load(const Launch& launch, int device) {
  const Driver& api = driver();
  Module module;
  int handle = 0, major = 0, minor = 0;
  api.check(api.device_get(&handle, device), launch, "cuDeviceGet");
  api.check(api.device_attribute(&major, kComputeCapabilityMajor, handle), launch, "cuDeviceGetAttribute");
  api.check(api.device_attribute(&minor, kComputeCapabilityMinor, handle), launch, "cuDeviceGetAttribute");
  try {
    const std::string code = cubin(launch.source, major, minor);
    // The first launch may come during a graph capture, which forbids loading unless this thread relaxes it.
    int mode = kRelaxedCapture;
    api.exchange_capture_mode(&mode);
    const int status = api.load_module(&module.handle, code.data());
    api.exchange_capture_mode(&mode);
    api.check(status, launch, "cuModuleLoadData");
  } catch (const LibraryUnavailable& error) {
    module.unavailable = error.what();
  }
  return module;
}

void* find_function(const Launch& launch, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const Source*, int>, Module> modules;
  std::lock_guard<std::mutex> lock(mutex);
  auto [module, is_new] = modules.try_emplace({&launch.source, device});
  if (is_new) module->second = load(launch, device);
  if (!module->second.handle) throw LibraryUnavailable(module->second.unavailable);
  void*& function = module->second.functions[launch.kernel];
  if (!function) {
    driver().check(driver().get_function(&function, module->second.handle, launch.kernel.c_str()), launch,
                   "cuModuleGetFunction");
  }
  return function;
}

}  // namespace

void launch_cuda(const Launch& launch) {
  TORCH_INTERNAL_ASSERT(launch.threads_per_threadgroup % 32 == 0, "cuda.h counts on whole warps, got ",
                        launch.threads_per_threadgroup, " threads");
  const c10::Device device = launch.tensors[0].device();
  const c10::DeviceGuard guard(device);
  ensure_context(launch, device.index());
  void* function = find_function(launch, device.index());
  const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
  void* stream = cuda.getStreamNativeHandle(cuda.getStream(device));

  std::array<void*, kMaxBuffers> pointers;
  std::array<void*, kMaxBuffers> arguments;
  const size_t count = launch.tensors.size();
  for (size_t i = 0; i < count; ++i) {
    pointers[i] = launch.tensors[i].data_ptr();
    arguments[i] = &pointers[i];
  }
  arguments[count] = const_cast<void*>(launch.params);
  driver().check(driver().launch(function, static_cast<unsigned>(launch.threadgroups), 1, 1,
                                 static_cast<unsigned>(launch.threads_per_threadgroup), 1, 1, 0, stream,
                                 arguments.data(), nullptr),
                 launch, "cuLaunchKernel");
}

}  // namespace torch_fused
