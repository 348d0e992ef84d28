#include "cuda_driver.h"

#include <c10/util/Exception.h>

#include <type_traits>

#include "cubin.h"

namespace torch_fused {

void Driver::check(int status, const Launch& launch, const char* step) const {
  if (status == 0) return;
  const char* name = nullptr;
  error_name(status, &name);
  TORCH_CHECK(false, "torch_fused: CUDA kernel ", launch.kernel.name, ": ", step,
              " failed: ", name ? name : "unknown error");
}

const Driver& driver() {
  static const Driver api = [] {
    void* library = open_library({"libcuda.so.1"});
    Driver d{};
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
    bind(d.launch, "cuLaunchKernelEx");
    bind(d.error_name, "cuGetErrorName");
    try {
      bind(d.graph.is_capturing, "cuStreamIsCapturing");
      bind(d.graph.create, "cuGraphCreate");
      bind(d.graph.add_kernel, "cuGraphAddKernelNode_v2");
      bind(d.graph.add_edges, "cuGraphAddDependencies_v2");
      bind(d.graph.instantiate, "cuGraphInstantiateWithFlags");
      bind(d.graph.set_kernel, "cuGraphExecKernelNodeSetParams_v2");
      bind(d.graph.launch, "cuGraphLaunch");
      bind(d.graph.destroy, "cuGraphDestroy");
      bind(d.graph.destroy_executable, "cuGraphExecDestroy");
      d.graph.present = true;
    } catch (const LibraryUnavailable&) {
      d.graph.present = false;
    }
    return d;
  }();
  return api;
}

}  // namespace torch_fused
