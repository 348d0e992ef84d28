#include "launch.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstring>

namespace torch_fused {
namespace {

const Source* sources = nullptr;

}  // namespace

Source::Source(const char* name, const char* metal, const char* cuda)
    : name(name), metal(metal), cuda(cuda), next(sources) {
  sources = this;
}

const Source* first_source() {
  return sources;
}

const Source& find_source(const std::string& name) {
  for (const Source* source = sources; source; source = source->next) {
    if (name == source->name) return *source;
  }
  TORCH_CHECK(false, "torch_fused: no Metal source named '", name, "' is built in");
}

void launch(const Launch& launch) {
  if (launch.threadgroups == 0) return;
  TORCH_INTERNAL_ASSERT(!launch.tensors.empty() && launch.tensors.size() < kMaxBuffers);
  TORCH_CHECK(launch.threadgroups > 0 && launch.threadgroups <= INT32_MAX, "torch_fused::", launch.source.name,
              ": a GPU takes at most 2^31 - 1 threadgroups at once, and these tensors need ", launch.threadgroups);
  TORCH_INTERNAL_ASSERT(launch.threads_per_threadgroup > 0 && launch.threads_per_threadgroup <= kMaxThreads);
  const c10::Device device = launch.tensors[0].device();
  for (const at::Tensor& tensor : launch.tensors) {
    TORCH_CHECK(tensor.device() == device, "torch_fused::", launch.source.name,
                ": all tensors must be on one device, got ", device, " and ", tensor.device());
  }
  if (device.is_cuda()) return launch_cuda(launch);
  if (device.is_cpu()) return launch_emulated(launch);
#ifdef __APPLE__
  if (device.is_mps()) return launch_metal(launch);
#endif
  TORCH_CHECK(false, "torch_fused::", launch.source.name, ": no GPU runtime for device ", device);
}

}  // namespace torch_fused

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  // (name, Metal text) of every op, for the emulator and the checks, which compile them with the host's compiler.
  m.def("_metal_sources() -> (str[], str[])", []() {
    std::vector<std::string> names, texts;
    for (const auto* source = torch_fused::first_source(); source; source = source->next) {
      names.emplace_back(source->name);
      texts.emplace_back(source->metal);
    }
    return std::make_tuple(names, texts);
  });
}
