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
#include <vector>

namespace torch_fused {
namespace {

using Shaders = at::native::mps::DynamicMetalShaderLibrary;  // compiles its text when constructed

// One source as compiled on this machine, or the reason why it cannot be.
struct Library {
  Shaders* shaders = nullptr;
  std::string error;
};

// The kernel's pipeline, owned by its library. After a first failure the source is not compiled again.
id<MTLComputePipelineState> find_pipeline(const Kernel& kernel) {
  std::atomic<void*>& known = kernel.functions[0];
  if (void* pipeline = known.load(std::memory_order_acquire)) {
    return __builtin_bit_cast(id<MTLComputePipelineState>, pipeline);
  }
  // Never destroyed: when a process exits, Metal is gone before static objects are.
  static auto& libraries = *new std::unordered_map<const Source*, Library>;
  static auto& mutex = *new std::mutex;  // torch's library is not thread-safe
  const std::lock_guard<std::mutex> guard(mutex);
  Library& library = libraries[&kernel.source];
  if (library.error.empty()) {
    try {
      if (!library.shaders) library.shaders = new Shaders(kernel.source.metal);
      const id<MTLComputePipelineState> pipeline = library.shaders->getPipelineStateForFunc(kernel.name);
      known.store(__builtin_bit_cast(void*, pipeline), std::memory_order_release);
      return pipeline;
    } catch (const c10::Error& error) {
      library.error = c10::str("torch_fused::", kernel.source.name, ": kernel ", kernel.name,
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

// Everything that the dispatch block needs for a launch: it contains only encoder calls.
struct Encoding {
  id<MTLComputePipelineState> pipeline;
  std::array<Binding, kMaxBuffers> buffers;
  size_t count;
  MTLSize grid, group;
  const void* params;
  size_t params_size;
  NSString* name;  // nil outside a capture
};

Encoding prepare(const Launch& launch) {
  RECORD_FUNCTION(launch.kernel.name, c10::ArrayRef<const c10::IValue>{});
  Encoding encoding;
  encoding.pipeline = find_pipeline(launch.kernel);
  const auto threads = static_cast<NSUInteger>(launch.threads_per_threadgroup);
  const NSUInteger max_threads = encoding.pipeline.maxTotalThreadsPerThreadgroup;
  TORCH_CHECK(threads <= max_threads, "torch_fused::", launch.kernel.source.name, ": kernel ", launch.kernel.name,
              " was launched with ", threads, " threads per threadgroup, this Apple GPU runs at most ", max_threads,
              " of them");
  // Metal allows neither a null buffer nor an offset at a buffer's end, so an empty tensor, which no kernel reads, is
  // bound to a tensor that has elements.
  const auto has_elements = [](const at::Tensor& tensor) { return tensor.numel() > 0; };
  const auto present = std::find_if(launch.tensors.begin(), launch.tensors.end(), has_elements);
  TORCH_INTERNAL_ASSERT(present != launch.tensors.end(), launch.kernel.name, " was launched with empty tensors only");
  encoding.count = launch.tensors.size();
  for (size_t i = 0; i < encoding.count; ++i) {
    encoding.buffers[i] = bind(has_elements(launch.tensors[i]) ? launch.tensors[i] : *present);
  }
  encoding.grid = MTLSizeMake(static_cast<NSUInteger>(launch.threadgroups), 1, 1);
  encoding.group = MTLSizeMake(threads, 1, 1);
  encoding.params = launch.params;
  encoding.params_size = launch.params_size;
  encoding.name = use_debug_groups() ? [NSString stringWithUTF8String:launch.kernel.name.c_str()] : nil;
  return encoding;
}

void encode(id<MTLComputeCommandEncoder> encoder, const Encoding& e) {
  if (e.name) [encoder pushDebugGroup:e.name];
  [encoder setComputePipelineState:e.pipeline];
  for (size_t i = 0; i < e.count; ++i) [encoder setBuffer:e.buffers[i].buffer offset:e.buffers[i].offset atIndex:i];
  [encoder setBytes:e.params length:e.params_size atIndex:e.count];
  [encoder dispatchThreadgroups:e.grid threadsPerThreadgroup:e.group];
  if (e.name) [encoder popDebugGroup];
}

}  // namespace

void launch_metal(c10::ArrayRef<Launch> launches) {
  std::vector<Encoding> encodings;
  encodings.reserve(launches.size());
  for (const Launch& launch : launches) {
    if (launch.threadgroups > 0) encodings.push_back(prepare(launch));
  }
  const std::vector<Encoding>* all = &encodings;  // a block copies what it captures
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  @autoreleasepool {
    at::mps::dispatch_sync_with_rethrow(stream->queue(), ^{
      const id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();
      for (const Encoding& encoding : *all) encode(encoder, encoding);
    });
  }
}

}  // namespace torch_fused
