#include "cuda_graph.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cuda_driver.h"

namespace torch_fused {
namespace {

constexpr size_t kMostGraphs = 4;  // of one owner: a step of one token, of several, on two devices

// Where the arguments of a kernel are: pointers to tensors, then the parameters.
struct Arguments {
  std::array<void*, kMaxBuffers> pointers, list;

  void** operator()(const Launch& launch) {
    const size_t count = launch.tensors.size();
    for (size_t i = 0; i < count; ++i) {
      pointers[i] = launch.tensors[i].data_ptr();
      list[i] = &pointers[i];
    }
    list[count] = const_cast<void*>(launch.params);
    return list.data();
  }
};

// A launch as the graph has it.
struct Node {
  void* handle = nullptr;
  void* function;
  int64_t threadgroups = 0, threads;
  std::vector<void*> pointers;
  std::vector<char> params;

  // Whether it differs; it is then made the same.
  bool take(const Launch& launch, void* const* now) {
    const auto* bytes = static_cast<const char*>(launch.params);
    if (threadgroups == launch.threadgroups && pointers.size() == launch.tensors.size() &&
        std::equal(pointers.begin(), pointers.end(), now) && params.size() == launch.params_size &&
        std::memcmp(params.data(), bytes, params.size()) == 0) {
      return false;
    }
    threadgroups = launch.threadgroups;
    pointers.assign(now, now + launch.tensors.size());
    params.assign(bytes, bytes + launch.params_size);
    return true;
  }
};

class Graph final : public Repeats::Kept {
 public:
  Graph(c10::ArrayRef<Launch> launches, const std::vector<void*>& functions, int device) : device_(device) {
    nodes_.resize(launches.size());
    for (size_t i = 0; i < launches.size(); ++i) {
      nodes_[i].function = functions[i];
      nodes_[i].threads = launches[i].threads_per_threadgroup;
    }
  }
  ~Graph() override {
    // What runs of it runs on. At the end of a process the driver may be gone: it then says so, which changes nothing.
    if (executable_) driver().graph.destroy_executable(executable_);
    if (graph_) driver().graph.destroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Whether these launches are the graph's, except for their grids and arguments.
  bool is_of(c10::ArrayRef<Launch> launches, const std::vector<void*>& functions, int device) const {
    if (device != device_ || launches.size() != nodes_.size()) return false;
    for (size_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].function != functions[i] || nodes_[i].threads != launches[i].threads_per_threadgroup) return false;
    }
    return true;
  }

  void launch(c10::ArrayRef<Launch> launches, void* stream, bool early_launches) {
    if (executable_) {
      update(launches);
    } else {
      build(launches, early_launches);
    }
    driver().check(driver().graph.launch(executable_, stream), launches[0], "cuGraphLaunch");
  }

 private:
  KernelNode describe(const Node& node, void** arguments) const {
    return {node.function,
            {static_cast<unsigned>(node.threadgroups), 1, 1},
            {static_cast<unsigned>(node.threads), 1, 1},
            0,
            arguments,
            nullptr,
            nullptr,
            nullptr};
  }

  void build(c10::ArrayRef<Launch> launches, bool early_launches) {
    const Driver& api = driver();
    if (graph_) api.graph.destroy(graph_);
    api.check(api.graph.create(&graph_, 0), launches[0], "cuGraphCreate");
    Arguments arguments;
    for (size_t i = 0; i < nodes_.size(); ++i) {
      Node& node = nodes_[i];
      void** list = arguments(launches[i]);
      node.take(launches[i], arguments.pointers.data());
      const KernelNode kernel = describe(node, list);
      api.check(api.graph.add_kernel(&node.handle, graph_, nullptr, 0, &kernel), launches[i], "cuGraphAddKernelNode");
      if (i == 0) continue;
      GraphEdge edge{};
      if (launches[i].early && early_launches) edge.from_port = edge.type = kProgrammatic;
      api.check(api.graph.add_edges(graph_, &nodes_[i - 1].handle, &node.handle, &edge, 1), launches[i],
                "cuGraphAddDependencies");
    }
    api.check(api.graph.instantiate(&executable_, graph_, 0), launches[0], "cuGraphInstantiate");
  }

  // Launches that are under way keep the arguments that they began with.
  void update(c10::ArrayRef<Launch> launches) {
    const Driver& api = driver();
    Arguments arguments;
    for (size_t i = 0; i < nodes_.size(); ++i) {
      void** list = arguments(launches[i]);
      if (!nodes_[i].take(launches[i], arguments.pointers.data())) continue;
      const KernelNode kernel = describe(nodes_[i], list);
      const int status = api.graph.set_kernel(executable_, nodes_[i].handle, &kernel);
      if (status != 0) nodes_[i].threadgroups = 0;  // it is not what was taken
      api.check(status, launches[i], "cuGraphExecKernelNodeSetParams");
    }
  }

  int device_;
  void* graph_ = nullptr;
  void* executable_ = nullptr;
  std::vector<Node> nodes_;
};

}  // namespace

bool launch_graph(Repeats& repeats, c10::ArrayRef<Launch> launches, const std::vector<void*>& functions, int device,
                  void* stream, bool early_launches) {
  const Driver& api = driver();
  int capturing = 0;
  if (!api.graph.present || api.graph.is_capturing(stream, &capturing) != 0 || capturing != 0) return false;
  if (std::count(functions.begin(), functions.end(), nullptr) > 0) return false;
  const std::lock_guard<std::mutex> lock(repeats.mutex);
  auto& kept = repeats.kept;
  for (const auto& one : kept) {
    Graph& graph = static_cast<Graph&>(*one);
    if (!graph.is_of(launches, functions, device)) continue;
    graph.launch(launches, stream, early_launches);
    return true;
  }
  if (kept.size() == kMostGraphs) kept.erase(kept.begin());
  kept.push_back(std::make_unique<Graph>(launches, functions, device));
  return false;
}

}  // namespace torch_fused
