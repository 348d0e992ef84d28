#include "cuda_driver.h"

#include <c10/util/Exception.h>

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
    bind(library, d.device_get, "cuDeviceGet");
    bind(library, d.device_attribute, "cuDeviceGetAttribute");
    bind(library, d.primary_context, "cuDevicePrimaryCtxRetain");
    bind(library, d.current_context, "cuCtxGetCurrent");
    bind(library, d.set_current_context, "cuCtxSetCurrent");
    bind(library, d.exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
    bind(library, d.load_module, "cuModuleLoadData");
    bind(library, d.get_function, "cuModuleGetFunction");
    bind(library, d.launch, "cuLaunchKernelEx");
    bind(library, d.error_name, "cuGetErrorName");
    try {
      bind(library, d.graph.is_capturing, "cuStreamIsCapturing");
      bind(library, d.graph.create, "cuGraphCreate");
      bind(library, d.graph.add_kernel, "cuGraphAddKernelNode_v2");
      bind(library, d.graph.add_edges, "cuGraphAddDependencies_v2");
      bind(library, d.graph.instantiate, "cuGraphInstantiateWithFlags");
      bind(library, d.graph.set_kernel, "cuGraphExecKernelNodeSetParams_v2");
      bind(library, d.graph.launch, "cuGraphLaunch");
      bind(library, d.graph.destroy, "cuGraphDestroy");
      bind(library, d.graph.destroy_executable, "cuGraphExecDestroy");
      d.graph.present = true;
    } catch (const LibraryUnavailable&) {
      d.graph.present = false;
    }
    return d;
  }();
  return api;
}

}  // namespace torch_fused
