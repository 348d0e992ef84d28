// The sources of one op's kernels. It needs no torch headers: setup.py makes a file that includes it for each source.
#pragma once

#include <string>

namespace torch_fused {

// The flattened Metal text and its CUDA translation, embedded at build time. A Source is a static object that registers
// itself; they form a list, for `find_source` and for the emulator.
struct Source {
  Source(const char* name, const char* metal, const char* cuda);
  const char* name;
  const char* metal;
  const char* cuda;
  const Source* next;
};
const Source* first_source();
const Source& find_source(const std::string& name);

}  // namespace torch_fused
