// A list of launches as a CUDA graph, for owners that repeat it: launching the graph costs the host a
// fraction of the launches, and the GPU changes kernels a little faster.
#pragma once

#include <vector>

#include "launch.h"

namespace torch_fused {

// Launches them and returns true, or returns false if they must be launched one by one: the first time, while torch
// captures its own graph, and if the driver has no graphs. `early_launches`: the device supports launches that begin
// before the one ahead of them is done.
bool launch_graph(Repeats& repeats, c10::ArrayRef<Launch> launches, const std::vector<void*>& functions, int device,
                  void* stream, bool early_launches);

}  // namespace torch_fused
