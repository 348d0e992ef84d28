// What torch says of the processor: nothing that a kernel should use.
#pragma once

#include <string>

namespace at {

inline std::string get_cpu_capability() {
  return "DEFAULT";
}

}  // namespace at
