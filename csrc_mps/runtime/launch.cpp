#include "launch.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "../common/dtype.h"

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

const Kernel& find_kernel(const std::string& source, const std::string& name) {
  static std::mutex mutex;
  static auto& kernels = *new std::map<std::pair<std::string, std::string>, Kernel>;  // never destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(source, name);
  const auto found = kernels.find(key);
  if (found != kernels.end()) return found->second;
  return kernels
      .emplace(std::piecewise_construct, std::forward_as_tuple(key), std::forward_as_tuple(find_source(source), name))
      .first->second;
}

const Kernel& KernelSet::operator()(at::ScalarType dtype, int64_t variant) {
  const int64_t row = dtype == at::kFloat ? 0 : dtype == at::kHalf ? 1 : 2;
  TORCH_INTERNAL_ASSERT(row < 2 || dtype == at::kBFloat16, "no kernel takes ", dtype);
  TORCH_INTERNAL_ASSERT(variant >= 0 && variant < kVariants);
  std::atomic<const Kernel*>& found = found_[row][variant];
  const Kernel* kernel = found.load(std::memory_order_acquire);
  if (!kernel) {
    const std::string name = std::string(prefix_) + "_" + dtype_name(dtype);
    kernel = &find_kernel(source_, variant == kNoVariant ? name : name + "_" + std::to_string(variant));
    found.store(kernel, std::memory_order_release);
  }
  return *kernel;
}

void launch(c10::ArrayRef<Launch> launches, Repeats* repeats) {
  if (launches.empty()) return;
  TORCH_INTERNAL_ASSERT(!launches[0].tensors.empty());
  const c10::Device device = launches[0].tensors[0].device();
  for (const Launch& launch : launches) {
    if (launch.threadgroups == 0) continue;
    TORCH_INTERNAL_ASSERT(!launch.tensors.empty() && launch.tensors.size() < kMaxBuffers);
    TORCH_CHECK(launch.threadgroups > 0 && launch.threadgroups <= INT32_MAX, "torch_fused::", launch.kernel.source.name,
                ": a GPU takes at most 2^31 - 1 threadgroups at once, and these tensors need ", launch.threadgroups);
    TORCH_INTERNAL_ASSERT(launch.threads_per_threadgroup > 0 && launch.threads_per_threadgroup <= kMaxThreads);
    for (const at::Tensor& tensor : launch.tensors) {
      TORCH_CHECK(tensor.device() == device, "torch_fused::", launch.kernel.source.name,
                  ": all tensors must be on one device, got ", device, " and ", tensor.device());
    }
  }
  if (device.is_cuda()) return launch_cuda(launches, repeats);
  if (device.is_cpu()) return launch_emulated(launches);
#ifdef __APPLE__
  if (device.is_mps()) return launch_metal(launches);
#endif
  TORCH_CHECK(false, "torch_fused::", launches[0].kernel.source.name, ": no GPU runtime for device ", device);
}

void LaunchList::run(Repeats& repeats) const {
  std::vector<Launch> launches;
  launches.reserve(entries_.size());
  for (const Entry& e : entries_) {
    launches.push_back({e.kernel, e.threadgroups, e.threads_per_threadgroup,
                        at::TensorList(tensors_.data() + e.first_tensor, e.tensors), &params_[e.first_param],
                        e.params_size, /*early=*/!launches.empty()});
  }
  launch(launches, &repeats);
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
