// Selects the fiber that runs next, and the fibers that may continue after waiting.
#include <algorithm>
#include <utility>

#include "fiber.h"
#include "runner.h"

namespace torch_fused::emulator {
namespace {

constexpr int kMemDevice = 1, kMemThreadgroup = 2;  // Metal's mem_flags

}  // namespace

void Runner::schedule() {
  size_t done = 0;
  while (done < fibers_.size()) {
    if (ready_.empty() && !release_barrier()) return;
    std::swap(ready_.front(), ready_[order_.next(ready_.size())]);
    Fiber& fiber = fibers_[ready_.front()];
    ready_.pop_front();
    fiber_ = &fiber;
    switch_context(&scheduler_, fiber.context);
    fiber_ = nullptr;
    if (failed()) return;
    Simdgroup& simdgroup = simdgroups_[fiber.simdgroup()];
    const uint32_t bit = 1u << fiber.lane();
    if (fiber.state == Fiber::kDone) {
      ++done;
      simdgroup.done |= bit;
    } else if (fiber.state == Fiber::kExchanging || fiber.state == Fiber::kAtSimdgroupBarrier) {
      simdgroup.arrived |= bit;
    } else {
      continue;
    }
    release_simdgroup(simdgroup, fiber.simdgroup() * kSimdWidth);
  }
}

void Runner::yield() {
  switch_context(&fiber_->context, scheduler_);
}

void Runner::wait(Fiber::State state, int waits_for, Place place) {
  fiber_->state = state;
  fiber_->waits_for = waits_for;
  fiber_->place = place;
  yield();
}

void Runner::make_ready(std::vector<uint32_t> threads) {
  order_.arrange(threads);
  for (const uint32_t thread : threads) {
    fibers_[thread].state = Fiber::kReady;
    ready_.push_back(thread);
  }
}

// Lets a simdgroup continue once all its running lanes wait at the same place for the same thing.
void Runner::release_simdgroup(Simdgroup& simdgroup, uint32_t first) {
  const uint32_t living = simdgroup.lanes & ~simdgroup.done;
  if (!living || (simdgroup.arrived & living) != living) return;
  std::vector<uint32_t> threads;
  for (uint32_t lane = 0; lane < kSimdWidth; ++lane) {
    if (living >> lane & 1) threads.push_back(first + lane);
  }
  const Fiber& leader = fibers_[threads[0]];
  const bool together = std::all_of(threads.begin(), threads.end(), [&](uint32_t thread) {
    const Fiber& fiber = fibers_[thread];
    return fiber.state == leader.state && fiber.waits_for == leader.waits_for && fiber.place == leader.place;
  });
  if (!together) return;
  if (leader.state == Fiber::kExchanging) {
    simdgroup.mask[leader.parity] = living;
  } else {
    simdgroup.threadgroup_epoch += leader.waits_for & kMemThreadgroup ? 1 : 0;
    simdgroup.device_epoch += leader.waits_for & kMemDevice ? 1 : 0;
  }
  simdgroup.arrived = 0;
  make_ready(std::move(threads));
}

// No fiber can run: either all threads wait at one threadgroup barrier, or the kernel is wrong. Returns whether they
// continue.
bool Runner::release_barrier() {
  std::vector<uint32_t> waiting;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state == Fiber::kAtBarrier) {
      waiting.push_back(fiber.thread);
    } else if (fiber.state != Fiber::kDone) {
      fail(divergence(fiber));
      return false;
    }
  }
  const Fiber& first = fibers_[waiting[0]];
  for (const uint32_t thread : waiting) {
    if (fibers_[thread].place == first.place) continue;
    fail("divergent threadgroup_barrier: " + name(first) + " waits at " + first.place.text() + ", " +
         name(fibers_[thread]) + " at " + fibers_[thread].place.text());
    return false;
  }
  if (waiting.size() < fibers_.size()) {
    fail("threadgroup_barrier reached by " + std::to_string(waiting.size()) + " of the " +
         std::to_string(fibers_.size()) + " threads of threadgroup " + std::to_string(threadgroup_) +
         ", the others have returned " + first.place.text());
    return false;
  }
  for (Fiber& fiber : fibers_) {
    fiber.threadgroup_epoch += fiber.waits_for & kMemThreadgroup ? 1 : 0;
    fiber.device_epoch += fiber.waits_for & kMemDevice ? 1 : 0;
  }
  make_ready(std::move(waiting));
  return true;
}

// For a fiber that waits forever for the other lanes of its simdgroup.
std::string Runner::divergence(const Fiber& fiber) const {
  std::string message = "divergent simdgroup operation: " + name(fiber) + " waits at " + fiber.place.text();
  for (const Fiber& other : fibers_) {
    if (other.simdgroup() == fiber.simdgroup() && other.state != Fiber::kDone && !(other.place == fiber.place)) {
      return message + ", " + name(other) + " at " + other.place.text();
    }
  }
  return message;
}

}  // namespace torch_fused::emulator
