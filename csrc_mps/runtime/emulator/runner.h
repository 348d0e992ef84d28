// Runs the threadgroups of one dispatch, one after another: a fiber a thread, which waits at barriers and simdgroup
// operations and has its memory accesses checked.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "dispatch.h"
#include "fault.h"
#include "stacks.h"
#include "threadgroup_memory.h"

namespace torch_fused::emulator {

constexpr uint32_t kSimdWidth = 32;
constexpr size_t kSlotBytes = 16;  // the widest value of a simdgroup operation
constexpr int kBuiltins = 18;
constexpr uint32_t kQuadWidth = 4;

// Where in the source a fiber waits.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const { return file == other.file && line == other.line; }
  std::string text() const;  // "[rms_norm.metal:42]"
};

struct Fiber {
  enum State { kReady, kAtBarrier, kAtSimdgroupBarrier, kExchanging, kDone };

  void* context;
  char* stack;
  State state = kReady;
  uint32_t thread;
  Place place{};      // where it waits
  int waits_for = 0;  // mem_flags of a barrier, operation of an exchange
  uint32_t device_epoch = 0, threadgroup_epoch = 0;
  uint32_t atomic_loads = 0;
  uint32_t parity = 0;  // which of the two sets of slots its last exchange used

  uint32_t simdgroup() const { return thread / kSimdWidth; }
  uint32_t lane() const { return thread % kSimdWidth; }
};

struct Simdgroup {
  uint32_t lanes = 0, arrived = 0, done = 0;  // masks
  uint32_t mask[2] = {};                      // lanes that took part in the last exchange of each parity
  uint32_t device_epoch = 0, threadgroup_epoch = 0;
  // Two sets: a lane may start the next exchange while others still read from this one.
  char slots[2][kSimdWidth][kSlotBytes];
};

class Runner : public FaultHandler {
 public:
  explicit Runner(Dispatch& dispatch);
  Failure run();

  // The services of runtime.h, called by the kernel on a fiber.
  void declare(int buffer, bool read_only, size_t size, bool present);
  void access(uintptr_t address, size_t size, msl_access access, uintptr_t pc);
  void* threadgroup_array(int id, size_t size, size_t align);
  void* threadgroup_argument(size_t index, size_t size);
  void barrier(bool simdgroup, int flags, Place place);
  void exchange(const void* value, size_t size, int operation, msl_lanes* all, Place place);
  void fail(const std::string& message, uintptr_t pc = 0);
  bool take_fault(int signal, uintptr_t address, uintptr_t pc, char** stack) override;
  [[noreturn]] void report_fault();
  std::string who() const { return name(*fiber_); }

 private:
  bool failed() const { return !failure_.message.empty(); }
  std::string name(const Fiber& fiber) const { return thread_name(fiber.thread, threadgroup_); }
  bool in_image(uintptr_t address);
  void check_stack(uintptr_t pc);

  void start_threadgroup(uint32_t index);
  static void fiber_main();
  void builtins(uint32_t thread, unsigned (&values)[kBuiltins][3]) const;
  void schedule();
  void yield();
  void wait(Fiber::State state, int waits_for, Place place);
  void make_ready(std::vector<uint32_t> threads);
  void release_simdgroup(Simdgroup& simdgroup, uint32_t first);
  bool release_barrier();
  std::string divergence(const Fiber& fiber) const;

  Dispatch& dispatch_;
  DeviceMemory device_memory_;
  ThreadgroupMemory& threadgroup_memory_;
  Stacks& stacks_;
  Order order_;
  Failure failure_;
  struct {
    int signal;
    uintptr_t address, pc;
  } fault_;
  void* pointers_[kMaxBuffers] = {};
  uint32_t groups_[3];
  uintptr_t image_page_ = ~uintptr_t{0};  // known to belong to the kernel's library

  uint32_t threadgroup_ = 0;
  uint32_t position_[3];  // of the threadgroup
  uint32_t size_[3];      // of the threadgroup, smaller than the dispatch's at the edge
  std::vector<Fiber> fibers_;
  std::vector<Simdgroup> simdgroups_;
  std::deque<uint32_t> ready_;
  Fiber* fiber_ = nullptr;  // the one that runs
  void* scheduler_ = nullptr;
};

}  // namespace torch_fused::emulator
