// The Apple GPU runtime: encodes a launch on torch's own encoder of the current MPS stream. Torch decides when to end
// the encoding and when to commit. This is the only file that needs a Mac to run, so it does nothing else.
#include "launch.h"

#include <ATen/mps/MPSStream.h>
#include <ATen/native/mps/MetalShaderLibrary.h>
#include <ATen/record_function.h>
#include <Metal/Metal.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

namespace torch_fused {
namespace {

using Shaders = at::native::mps::DynamicMetalShaderLibrary;  // compiles its text when constructed

// One source as compiled on this machine, or the reason why it cannot be.
struct Library {
  Shaders* shaders = nullptr;
  std::string error;
};

// The kernel's pipeline, owned by its library. The first failure condemns the whole source: it is not compiled again.
id<MTLComputePipelineState> find_pipeline(const Source& source, const std::string& kernel) {
  // Never destroyed: when a process exits, Metal is gone before static objects are.
  static auto& libraries = *new std::unordered_map<const Source*, Library>;
  static auto& mutex = *new std::mutex;  // torch's library is not thread-safe
  const std::lock_guard<std::mutex> guard(mutex);
  Library& library = libraries[&source];
  if (library.error.empty()) {
    try {
      if (!library.shaders) library.shaders = new Shaders(source.metal);
      return library.shaders->getPipelineStateForFunc(kernel);
    } catch (const c10::Error& error) {
      library.error = c10::str("torch_fused::", source.name, ": kernel ", kernel,
                               " cannot be built for this Apple GPU: ", error.what_without_backtrace());
    }
  }
  throw LibraryUnavailable(library.error);
}

struct Binding {
  id<MTLBuffer> buffer;
  NSUInteger offset;  // bytes
};

Binding bind(const at::Tensor& tensor) {
  // On MPS a storage's data pointer is the MTLBuffer object, not an address.
  return {__builtin_bit_cast(id<MTLBuffer>, tensor.storage().data()),
          static_cast<NSUInteger>(tensor.storage_offset()) * tensor.itemsize()};
}

// True where a Metal capture can be taken; a debug group then gives each launch its kernel's name.
bool use_debug_groups() {
  static const bool enabled = std::getenv("MTL_CAPTURE_ENABLED") || std::getenv("METAL_CAPTURE_ENABLED");
  return enabled;
}

}  // namespace

void launch_metal(const Launch& launch) {
  RECORD_FUNCTION(launch.kernel, c10::ArrayRef<const c10::IValue>{});
  const id<MTLComputePipelineState> pipeline = find_pipeline(launch.source, launch.kernel);
  const auto threads = static_cast<NSUInteger>(launch.threads_per_threadgroup);
  const NSUInteger max_threads = pipeline.maxTotalThreadsPerThreadgroup;
  TORCH_CHECK(threads <= max_threads, "torch_fused::", launch.source.name, ": kernel ", launch.kernel,
              " was launched with ", threads, " threads per threadgroup, this Apple GPU runs at most ", max_threads,
              " of them");

  // Metal takes neither a null buffer nor an offset at a buffer's end, so an empty tensor, which no kernel reads, is
  // bound to a tensor that has elements.
  const auto has_elements = [](const at::Tensor& tensor) { return tensor.numel() > 0; };
  const auto present = std::find_if(launch.tensors.begin(), launch.tensors.end(), has_elements);
  TORCH_INTERNAL_ASSERT(present != launch.tensors.end(), launch.kernel, " was launched with empty tensors only");
  std::array<Binding, kMaxBuffers> buffers;
  for (size_t i = 0; i < launch.tensors.size(); ++i) {
    buffers[i] = bind(has_elements(launch.tensors[i]) ? launch.tensors[i] : *present);
  }

  const size_t count = launch.tensors.size();
  const MTLSize grid = MTLSizeMake(static_cast<NSUInteger>(launch.threadgroups), 1, 1);
  const MTLSize group = MTLSizeMake(threads, 1, 1);
  const void* params = launch.params;
  const size_t params_size = launch.params_size;
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  @autoreleasepool {
    NSString* name = use_debug_groups() ? [NSString stringWithUTF8String:launch.kernel.c_str()] : nil;
    at::mps::dispatch_sync_with_rethrow(stream->queue(), ^{
      const id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();
      if (name) [encoder pushDebugGroup:name];
      [encoder setComputePipelineState:pipeline];
      for (size_t i = 0; i < count; ++i) [encoder setBuffer:buffers[i].buffer offset:buffers[i].offset atIndex:i];
      [encoder setBytes:params length:params_size atIndex:count];
      [encoder dispatchThreadgroups:grid threadsPerThreadgroup:group];
      if (name) [encoder popDebugGroup];
    });
  }
}

}  // namespace torch_fused
