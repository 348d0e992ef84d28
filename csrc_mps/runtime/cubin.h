// Compiles the CUDA translation of a Metal source with NVRTC, torch's own copy, and keeps the result on disk per user.
#pragma once

#include <string>

#include "launch.h"

namespace torch_fused {

// The machine code of `source` for compute capability major.minor. Throws LibraryUnavailable with NVRTC's log.
std::string cubin(const Source& source, int major, int minor);

// Opens a shared library, `path` first as given; throws LibraryUnavailable. `symbol` finds a function in it, `bind`
// gives it its type.
void* open_library(std::initializer_list<std::string> paths);
void* symbol(void* library, const char* name);
template <class Function>
void bind(void* library, Function& function, const char* name) {
  function = reinterpret_cast<Function>(symbol(library, name));
}

}  // namespace torch_fused
