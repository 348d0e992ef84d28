// The order in which threads and threadgroups run. A correct kernel gives the same result in every one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace torch_fused::emulator {

enum class Schedule { kSequential, kReversed, kRandom, kPreemptive };

class Order {
 public:
  Order(Schedule schedule, uint64_t seed) : schedule_(schedule), state_(2 * seed + 1) {
    for (int i = 0; i < 8; ++i) random();  // leave the neighbourhood of small seeds
  }

  // Arranges things that start together.
  void arrange(std::vector<uint32_t>& things) {
    if (schedule_ == Schedule::kReversed) std::reverse(things.begin(), things.end());
    if (!is_random()) return;
    for (size_t i = things.size(); i > 1; --i) std::swap(things[i - 1], things[random() % i]);
  }
  // Which of the threads that wait for their turn is next.
  size_t next(size_t waiting) { return is_random() ? random() % waiting : 0; }
  // Whether a thread is interrupted at this memory access.
  bool preempts() { return schedule_ == Schedule::kPreemptive && random() % 16 == 0; }

 private:
  bool is_random() const { return schedule_ == Schedule::kRandom || schedule_ == Schedule::kPreemptive; }
  uint64_t random() {  // xorshift64
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }

  Schedule schedule_;
  uint64_t state_;
};

}  // namespace torch_fused::emulator
