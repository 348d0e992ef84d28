// Threads that stay together for a whole step and meet between its phases.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "../common/simd.h"

namespace torch_fused {

// Indices begin .. end - 1; none if end <= begin.
struct Range {
  int64_t begin, end;

  // Those from `first` on that are among `count`, counted from `first`.
  TORCH_FUSED_INLINE Range part(int64_t first, int64_t count) const {
    return {std::max<int64_t>(begin - first, 0), std::min(end - first, count)};
  }
};

class Team {
 public:
  Team(int64_t member, int64_t size) : member_(member), size_(size) {}

  TORCH_FUSED_INLINE int64_t member() const { return member_; }

  // This member's even share of 0 .. count - 1.
  TORCH_FUSED_INLINE Range share(int64_t count) const {
    return {count * member_ / size_, count * (member_ + 1) / size_};
  }

  // Returns when all members have come; what they wrote before can be read after.
  TORCH_FUSED_INLINE void meet() const {
    if (size_ > 1) {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }
  }

 private:
  int64_t member_, size_;
};

// How many threads a team may have here: one inside of another parallel region.
inline int64_t team_size() {
#ifdef _OPENMP
  return at::in_parallel_region() ? 1 : at::get_num_threads();
#else
  return 1;
#endif
}

// Calls function(team) in each thread of a team. OpenMP may give fewer threads than `size`: the team counts those.
template <class Function>
void run_team(int64_t size, Function function) {
#ifdef _OPENMP
  if (size > 1) {
#pragma omp parallel num_threads(static_cast<int>(size))
    function(Team(omp_get_thread_num(), omp_get_num_threads()));
    return;
  }
#else
  (void)size;  // always 1
#endif
  function(Team(0, 1));
}

}  // namespace torch_fused
