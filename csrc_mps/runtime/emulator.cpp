// The launch seam on the CPU: inside torch_fused.metal.emulate(), CPU tensors run the Metal kernels, compiled for the
// host, on fibers that stand for GPU threads.
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "emulator/dispatch.h"
#include "emulator/library.h"
#include "launch.h"

namespace torch_fused {
namespace {

using emulator::Buffer;
using emulator::Dispatch;
using emulator::KernelLibrary;

emulator::Schedule parse_schedule(const std::string& name) {
  if (name == "sequential") return emulator::Schedule::kSequential;
  if (name == "reversed") return emulator::Schedule::kReversed;
  if (name == "random") return emulator::Schedule::kRandom;
  if (name == "preemptive") return emulator::Schedule::kPreemptive;
  TORCH_CHECK(false, "emulate: schedule is 'sequential', 'reversed', 'random' or 'preemptive', got '", name, "'");
}

// The elements that a view reaches, first to last: what lies beyond is not the kernel's, though the storage may go on.
Buffer buffer_of(const at::Tensor& tensor, size_t index) {
  int64_t elements = tensor.numel() > 0 ? 1 : 0;
  for (int64_t i = 0; elements > 0 && i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const auto size = static_cast<uint32_t>(tensor.element_size());
  return {static_cast<int>(index), begin, begin + elements * size, size};
}

std::vector<Buffer> buffers_of(at::TensorList tensors) {
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < tensors.size(); ++i) buffers.push_back(buffer_of(tensors[i], i));
  return buffers;
}

using Strings = std::vector<std::string>;

// One emulate() block: what runs the kernels, how, and what was launched.
class Emulation {
 public:
  Emulation(const Strings& sources, const Strings& libraries, bool checked, const std::string& schedule, int64_t seed)
      : settings_{checked, parse_schedule(schedule), static_cast<uint64_t>(seed)} {
    for (size_t i = 0; i < sources.size(); ++i) libraries_.emplace(sources[i], &KernelLibrary::open(libraries[i]));
  }

  const KernelLibrary& library(const std::string& source) const {
    const auto found = libraries_.find(source);
    if (found == libraries_.end()) throw LibraryUnavailable(source + " is not among the sources being emulated");
    return *found->second;
  }

  void run(const KernelLibrary& library, const std::string& kernel, const uint64_t (&grid)[3],
           const uint32_t (&group)[3], std::vector<Buffer> buffers, std::vector<size_t> threadgroup_bytes = {}) {
    Dispatch dispatch{library.find(kernel),        library.image(), {}, {}, std::move(buffers), settings_,
                      std::move(threadgroup_bytes)};
    std::copy(grid, grid + 3, dispatch.grid);
    std::copy(group, group + 3, dispatch.group);
    int64_t threadgroups = 1;
    for (int i = 0; i < 3; ++i) {
      const uint64_t along = grid[i] / group[i] + (grid[i] % group[i] != 0);
      TORCH_CHECK(along <= emulator::kMaxThreadgroups && threadgroups * along <= emulator::kMaxThreadgroups,
                  "torch_fused emulator: ", kernel, ": the grid has more than ", emulator::kMaxThreadgroups,
                  " threadgroups, which it cannot tell apart");
      threadgroups *= static_cast<int64_t>(along);
    }
    TORCH_CHECK(dispatch.buffers.size() <= emulator::kMaxBuffers, "torch_fused emulator: ", kernel, ": ",
                dispatch.buffers.size(), " buffers, and Metal has ", emulator::kMaxBuffers);
    const emulator::Failure failure = emulator::run(dispatch);
    TORCH_CHECK(failure.message.empty(), "torch_fused emulator: ", kernel, ": ", failure.message,
                failure.pc ? library.place(failure.pc) : "");
    std::lock_guard<std::mutex> lock(mutex_);
    launches_.push_back({kernel, threadgroups, int64_t{group[0]} * group[1] * group[2], std::move(dispatch.buffers)});
  }

  // Each launch so far: kernel, threadgroups, threads in one, and for each buffer the bytes read, written, and distinct
  // bytes read, written. Emptied by clear().
  using Launches = std::tuple<Strings, std::vector<std::vector<int64_t>>>;
  Launches launches() {
    std::lock_guard<std::mutex> lock(mutex_);
    Launches result;
    for (const Record& launch : launches_) {
      std::get<0>(result).push_back(launch.kernel);
      std::vector<int64_t> numbers{launch.threadgroups, launch.threads};
      for (const Buffer& b : launch.buffers) {
        numbers.insert(numbers.end(), {b.read, b.written, b.distinct_read, b.distinct_written});
      }
      std::get<1>(result).push_back(std::move(numbers));
    }
    return result;
  }
  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    launches_.clear();
  }

 private:
  struct Record {
    std::string kernel;
    int64_t threadgroups, threads;
    std::vector<Buffer> buffers;
  };

  const emulator::Settings settings_;
  std::map<std::string, const KernelLibrary*> libraries_;
  std::mutex mutex_;
  std::vector<Record> launches_;
};

// The emulate() blocks that are open, by number, the innermost last. The process has one set of them, so that backward
// threads see them.
std::mutex mutex;
std::map<int64_t, std::shared_ptr<Emulation>> open_emulations;
int64_t next_emulation = 0;
std::atomic<bool> any_open{false};

std::shared_ptr<Emulation> innermost() {
  std::lock_guard<std::mutex> lock(mutex);
  return open_emulations.empty() ? nullptr : open_emulations.rbegin()->second;
}
std::shared_ptr<Emulation> find(int64_t number) {
  std::lock_guard<std::mutex> lock(mutex);
  return open_emulations.at(number);
}

}  // namespace

bool emulating() {
  return any_open.load(std::memory_order_relaxed);
}

void launch_emulated(c10::ArrayRef<Launch> launches) {
  const auto emulation = innermost();
  TORCH_CHECK(emulation, "torch_fused: ", launches[0].kernel.name, ": CPU tensors run GPU kernels only inside ",
              "torch_fused.metal.emulate()");
  for (const Launch& launch : launches) emulation->library(launch.kernel.source.name);
  for (const Launch& launch : launches) {
    if (launch.threadgroups == 0) continue;
    std::vector<Buffer> buffers = buffers_of(launch.tensors);
    const auto params = reinterpret_cast<uintptr_t>(launch.params);
    buffers.push_back({static_cast<int>(buffers.size()), params, params + launch.params_size, 4});
    const auto threads = static_cast<uint32_t>(launch.threads_per_threadgroup);
    emulation->run(emulation->library(launch.kernel.source.name), launch.kernel.name,
                   {static_cast<uint64_t>(launch.threadgroups) * threads, 1, 1}, {threads, 1, 1}, std::move(buffers));
  }
}

}  // namespace torch_fused

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  using namespace torch_fused;

  // Opens an emulate() block and returns its number.
  m.def("_emulator_begin(str[] sources, str[] libraries, bool checked, str schedule, int seed) -> int",
        [](const Strings& sources, const Strings& libraries, bool checked, const std::string& schedule, int64_t seed) {
          auto emulation = std::make_shared<Emulation>(sources, libraries, checked, schedule, seed);
          std::lock_guard<std::mutex> lock(mutex);
          open_emulations.emplace(next_emulation, std::move(emulation));
          any_open = true;
          return next_emulation++;
        });
  m.def("_emulator_end(int emulation) -> ()", [](int64_t emulation) {
    std::lock_guard<std::mutex> lock(mutex);
    open_emulations.erase(emulation);
    any_open = !open_emulations.empty();
  });
  m.def("_emulator_launches(int emulation) -> (str[], int[][])",
        [](int64_t emulation) { return find(emulation)->launches(); });
  m.def("_emulator_clear(int emulation) -> ()", [](int64_t emulation) { find(emulation)->clear(); });

  // One dispatch of a library's kernel, of threads in one to three dimensions, under the innermost emulate() block or,
  // outside of all, checked and in order.
  m.def(
      "_emulator_run(str library, str kernel, int[] threads, int[] group_size, Tensor[] buffers, "
      "int[] threadgroup_bytes) -> ()",
      [](const std::string& library, const std::string& kernel, at::IntArrayRef threads, at::IntArrayRef group_size,
         at::TensorList buffers, at::IntArrayRef threadgroup_bytes) {
        auto emulation = innermost();
        if (!emulation) emulation = std::make_shared<Emulation>(Strings{}, Strings{}, true, "sequential", 0);
        uint64_t grid[3] = {1, 1, 1};
        uint32_t group[3] = {1, 1, 1};
        std::copy(threads.begin(), threads.end(), grid);
        std::copy(group_size.begin(), group_size.end(), group);
        emulation->run(KernelLibrary::open(library), kernel, grid, group, buffers_of(buffers),
                       {threadgroup_bytes.begin(), threadgroup_bytes.end()});
      });
}
