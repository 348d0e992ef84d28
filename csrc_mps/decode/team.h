// Threads that run a whole step together, with barriers between its phases.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <thread>

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

// A barrier of `size` threads. A thread that has waited for long sleeps: on a busy machine the thread it
// waits for may need its processor. OpenMP's own barrier spins for milliseconds, and a step has hundreds of barriers.
class Barrier {
 public:
  explicit Barrier(uint32_t size, bool spin) : size_(size), spins_(spin ? kSpins : 0) {}

  void wait() {
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int64_t i = 0; turn_.load(std::memory_order_acquire) == turn; ++i) {
      i < spins_ ? pause() : std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

 private:
  static constexpr int64_t kSpins = 4000;  // some 100 us

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const uint32_t size_;
  const int64_t spins_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

class Team {
 public:
  Team(int64_t member, int64_t size, Barrier* barrier) : member_(member), size_(size), barrier_(barrier) {}

  TORCH_FUSED_INLINE int64_t member() const { return member_; }

  // This member's even share of 0 .. count - 1.
  TORCH_FUSED_INLINE Range share(int64_t count) const {
    return {count * member_ / size_, count * (member_ + 1) / size_};
  }

  // Returns when all members have arrived; their earlier writes can be read afterwards.
  TORCH_FUSED_INLINE void meet() const {
    if (size_ > 1) barrier_->wait();
  }

 private:
  int64_t member_, size_;
  Barrier* barrier_;
};

// The maximum number of threads of a team here: one inside another parallel region.
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
    std::optional<Barrier> barrier;
#pragma omp parallel num_threads(static_cast<int>(size))
    {
      const int came = omp_get_num_threads();
#pragma omp single
      barrier.emplace(came, came <= omp_get_num_procs());
      function(Team(omp_get_thread_num(), came, &*barrier));
    }
    return;
  }
#else
  (void)size;  // always 1
#endif
  function(Team(0, 1, nullptr));
}

}  // namespace torch_fused
