// Emulator runtime: CPU tensors run the Metal kernels, compiled for the host and checked (emulator/).
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>

#include "../../torch_fused/metal/include/runtime.h"
#include "emulator/scheduler.h"
#include "launch.h"

namespace torch_fused {
namespace {

using emulator::Schedule;

// A kernel library on disk, loaded once and kept.
struct Library {
  std::string path;
  void* handle;
  uintptr_t begin, end;  // in memory
};

const Library& load(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, Library> libraries;
  std::lock_guard<std::mutex> lock(mutex);
  auto [entry, is_new] = libraries.try_emplace(path);
  Library& library = entry->second;
  if (!is_new) return library;
  library = {path, dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL), 0, 0};
  TORCH_CHECK(library.handle, "torch_fused emulator: ", dlerror());
  auto* set_runtime = reinterpret_cast<void (*)(const msl_runtime*)>(dlsym(library.handle, "msl_set_runtime"));
  set_runtime(&emulator::runtime_table());
  Dl_info info;
  dladdr(reinterpret_cast<void*>(set_runtime), &info);
  library.begin = reinterpret_cast<uintptr_t>(info.dli_fbase);
  library.end = library.begin;
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  library.end += static_cast<uintptr_t>(file.tellg()) + (1 << 16);  // zero-filled pages follow the file's
  return library;
}

// "file.metal:12" of an address in a kernel library, from its debug information; only asked for when something is
// wrong.
std::string source_line(const Library& library, uintptr_t pc) {
  std::ostringstream command;
#ifdef __APPLE__
  command << "atos -o '" << library.path << "' -l " << std::hex << "0x" << library.begin << " 0x" << pc - 1;
#else
  command << "addr2line -i -e '" << library.path << "' 0x" << std::hex << pc - 1 - library.begin;
#endif
  std::string output;
  if (FILE* pipe = popen(command.str().c_str(), "r")) {
    char line[512];
    while (std::fgets(line, sizeof(line), pipe)) {
      // The innermost place in a .metal file: an access inside the shims belongs to the kernel that called them.
      const std::string text(line);
      const size_t end = text.find_first_of(" )\n", text.find(".metal"));
      if (output.empty() && text.find(".metal") != std::string::npos) {
        const size_t slash = text.find_last_of("/(", end);
        output =
            text.substr(slash == std::string::npos ? 0 : slash + 1, end - (slash == std::string::npos ? 0 : slash + 1));
      }
    }
    pclose(pipe);
  }
  return output.empty() ? "unknown line" : output;
}

// What emulate() asked for.
struct Settings {
  std::map<std::string, std::string> libraries;  // op source -> path
  bool checked;
  Schedule schedule;
  uint64_t seed;
};

struct Record {
  std::string kernel;
  int64_t threadgroups, threads;
  std::vector<emulator::Traffic> traffic;
};

std::mutex mutex;  // of the two below
std::vector<Settings> stack;
std::vector<Record> records;
std::atomic<bool> active{false};

Schedule parse_schedule(const std::string& name) {
  if (name == "sequential") return Schedule::kSequential;
  if (name == "reversed") return Schedule::kReversed;
  if (name == "random") return Schedule::kRandom;
  TORCH_CHECK(name == "preemptive",
              "emulate: schedule must be 'sequential', 'reversed', 'random' or 'preemptive', got '", name, "'");
  return Schedule::kPreemptive;
}

// What a kernel may touch of a tensor: from its first element to the last that its strides reach.
emulator::Buffer buffer_of(const at::Tensor& tensor, int index) {
  int64_t span = tensor.numel() ? 1 : 0;
  for (int64_t i = 0; span && i < tensor.dim(); ++i) span += (tensor.size(i) - 1) * tensor.stride(i);
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const auto element = static_cast<uint32_t>(tensor.element_size());
  return {index, begin, begin + span * element, element, false};
}

void run(const std::string& name, const Library& library, emulator::Dispatch& dispatch) {
  auto* kernel = dlsym(library.handle, ("msl_k_" + name).c_str());
  TORCH_CHECK(kernel, "torch_fused emulator: no kernel named ", name);
  dispatch.kernel = reinterpret_cast<void (*)(const msl_args*)>(kernel);
  dispatch.image_begin = library.begin;
  dispatch.image_end = library.end;
  std::vector<emulator::Traffic> traffic;
  const emulator::Failure failure = emulator::run(dispatch, dispatch.checked ? &traffic : nullptr);
  TORCH_CHECK(failure.message.empty(), "torch_fused emulator: ", name, ": ", failure.message,
              failure.pc ? " [" + source_line(library, failure.pc) + "]" : "");
  std::lock_guard<std::mutex> lock(mutex);
  if (dispatch.checked) {
    const int64_t threads = dispatch.group[0] * dispatch.group[1] * dispatch.group[2];
    records.push_back(
        {name, (dispatch.grid[0] * dispatch.grid[1] * dispatch.grid[2] + threads - 1) / threads, threads, traffic});
  }
}

}  // namespace

bool emulating() {
  return active.load(std::memory_order_relaxed);
}

void launch_emulated(const Launch& launch) {
  Settings settings;
  {
    std::lock_guard<std::mutex> lock(mutex);
    TORCH_CHECK(!stack.empty(), "torch_fused: ", launch.kernel, " needs a GPU, or torch_fused.metal.emulate()");
    settings = stack.back();
  }
  emulator::Dispatch dispatch{};
  dispatch.grid[0] = static_cast<uint32_t>(launch.threadgroups * launch.threads_per_threadgroup);
  dispatch.group[0] = static_cast<uint32_t>(launch.threads_per_threadgroup);
  for (int i = 1; i < 3; ++i) dispatch.grid[i] = dispatch.group[i] = 1;
  for (size_t i = 0; i < launch.tensors.size(); ++i) {
    dispatch.buffers.push_back(buffer_of(launch.tensors[i], static_cast<int>(i)));
  }
  const auto params = reinterpret_cast<uintptr_t>(launch.params);
  dispatch.buffers.push_back({static_cast<int>(launch.tensors.size()), params, params + launch.params_size, 1, true});
  dispatch.checked = settings.checked;
  dispatch.schedule = settings.schedule;
  dispatch.seed = settings.seed;
  run(launch.kernel, load(settings.libraries.at(launch.source.name)), dispatch);
}

}  // namespace torch_fused

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  using namespace torch_fused;
  using Strings = std::vector<std::string>;

  m.def("_emulator_begin(str[] names, str[] libraries, bool checked, str schedule, int seed) -> ()",
        [](const Strings& names, const Strings& libraries, bool checked, const std::string& schedule, int64_t seed) {
          Settings settings{{}, checked, parse_schedule(schedule), static_cast<uint64_t>(seed)};
          for (size_t i = 0; i < names.size(); ++i) settings.libraries[names[i]] = libraries[i];
          std::lock_guard<std::mutex> lock(mutex);
          stack.push_back(std::move(settings));
          active = true;
        });
  m.def("_emulator_end() -> ()", []() {
    std::lock_guard<std::mutex> lock(mutex);
    stack.pop_back();
    active = !stack.empty();
    if (stack.empty()) records.clear();
  });

  // Every launch since `first`: its kernel, its (threadgroups, threads), and rows of traffic: (launch, buffer, bytes
  // read, written, distinct bytes read, written).
  m.def("_emulator_launches(int first) -> (str[], int[], int[])", [](int64_t first) {
    Strings kernels;
    std::vector<int64_t> shapes, rows;
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = static_cast<size_t>(first); i < records.size(); ++i) {
      const auto index = static_cast<int64_t>(kernels.size());
      kernels.push_back(records[i].kernel);
      shapes.insert(shapes.end(), {records[i].threadgroups, records[i].threads});
      for (const auto& t : records[i].traffic) {
        rows.insert(rows.end(), {index, t.buffer, int64_t(t.read), int64_t(t.written), int64_t(t.distinct_read),
                                 int64_t(t.distinct_written)});
      }
    }
    return std::make_tuple(kernels, shapes, rows);
  });

  // One dispatch of a kernel outside the ops, for compile_shader: tensors flagged in `constants` are read-only
  // parameters.
  m.def(
      "_emulator_run(str library, str kernel, int[] grid, int[] group, Tensor[] buffers, bool[] constants, bool "
      "checked, "
      "str schedule, int seed) -> ()",
      [](const std::string& library, const std::string& kernel, at::IntArrayRef grid, at::IntArrayRef group,
         at::TensorList buffers, const c10::List<bool>& constants, bool checked, const std::string& schedule,
         int64_t seed) {
        emulator::Dispatch dispatch{};
        for (int i = 0; i < 3; ++i) {
          dispatch.grid[i] = static_cast<uint32_t>(grid[i]);
          dispatch.group[i] = static_cast<uint32_t>(group[i]);
        }
        for (size_t i = 0; i < buffers.size(); ++i) {
          dispatch.buffers.push_back(buffer_of(buffers[i], static_cast<int>(i)));
          dispatch.buffers.back().read_only = constants[i];
        }
        dispatch.checked = checked;
        dispatch.schedule = parse_schedule(schedule);
        dispatch.seed = static_cast<uint64_t>(seed);
        run(kernel, load(library), dispatch);
      });
}
