// A list of launches as a CUDA graph, where its owner makes it again and again: launching the graph costs the host a
// fraction of the launches, and the GPU goes from kernel to kernel a little faster.
#pragma once

#include <vector>

#include "launch.h"

namespace torch_fused {

// Launches them and returns true, or returns false where they are to be made one by one: the first time, while torch
// captures a graph of its own, and where the driver has none. `early_launches`: the device knows launches that begin
// before the one ahead of them is done.
bool launch_graph(Repeats& repeats, c10::ArrayRef<Launch> launches, const std::vector<void*>& functions, int device,
                  void* stream, bool early_launches);

}  // namespace torch_fused
