// torch's loop over a range, in one thread: the target has no torch.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace at {

using c10::BFloat16;
using c10::Half;

inline int get_num_threads() {
  return 1;
}
inline bool in_parallel_region() {
  return false;
}

template <class Function>
void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/, const Function& function) {
  if (begin < end) function(begin, end);
}

}  // namespace at
