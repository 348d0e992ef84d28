#include "runner.h"

#include <dlfcn.h>
#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "fiber.h"

namespace torch_fused::emulator {
namespace {

constexpr size_t kReserve = 16 << 10;  // of a stack, for the emulator's own functions
constexpr size_t kArgumentAlignment = 16;
constexpr uintptr_t kPage = 4096;
constexpr uint32_t kMostAtomicLoads = 1 << 20;  // of a thread that does not spin

// Memory that a launching thread keeps, because mapping it costs more than a small launch.
struct Workspace {
  Stacks stacks;
  ThreadgroupMemory threadgroup_memory;
};

Workspace& workspace() {
  static thread_local Workspace workspace;
  return workspace;
}

thread_local Runner* current = nullptr;

void abandon() {
  current->report_fault();
}

bool inside(uintptr_t address, const void* begin, size_t size) {
  return address - reinterpret_cast<uintptr_t>(begin) < size;
}

uint32_t simdgroups_for(const uint32_t (&threads)[3]) {
  return (threads[0] * threads[1] * threads[2] + kSimdWidth - 1) / kSimdWidth;
}

}  // namespace

std::string Place::text() const {
  const char* slash = std::strrchr(file, '/');
  return "[" + std::string(slash ? slash + 1 : file) + ":" + std::to_string(line) + "]";
}

Runner::Runner(Dispatch& dispatch)
    : dispatch_(dispatch),
      device_memory_(dispatch.buffers),
      threadgroup_memory_(workspace().threadgroup_memory),
      stacks_(workspace().stacks),
      order_(dispatch.settings.schedule, dispatch.settings.seed) {
  for (const Buffer& buffer : dispatch.buffers) pointers_[buffer.index] = reinterpret_cast<void*>(buffer.begin);
  for (int i = 0; i < 3; ++i) {
    groups_[i] = static_cast<uint32_t>((dispatch.grid[i] + dispatch.group[i] - 1) / dispatch.group[i]);
  }
}

Failure Runner::run() {
  use_signal_stack();
  catch_faults([]() -> FaultHandler* { return current; }, abandon);
  Runner* outer = std::exchange(current, this);
  const msl_args declare_only{pointers_, nullptr};
  dispatch_.kernel(&declare_only);
  std::vector<uint32_t> threadgroups(failed() ? 0 : groups_[0] * groups_[1] * groups_[2]);
  std::iota(threadgroups.begin(), threadgroups.end(), 0);
  order_.arrange(threadgroups);
  for (const uint32_t threadgroup : threadgroups) {
    start_threadgroup(threadgroup);
    schedule();
    if (failed()) break;
  }
  current = outer;
  device_memory_.write_back();
  return failure_;
}

// Services

void Runner::declare(int index, bool read_only, size_t size, bool present) {
  if (!present) return;
  auto& buffers = dispatch_.buffers;
  const auto buffer = std::find_if(buffers.begin(), buffers.end(), [&](const Buffer& b) { return b.index == index; });
  if (buffer == buffers.end()) return fail("buffer " + std::to_string(index) + " is not bound");
  buffer->read_only = read_only;
  const size_t bound = buffer->end - buffer->begin;
  if (bound < size) {
    fail("buffer " + std::to_string(index) + " has " + std::to_string(bound) + " bytes, the kernel's parameter takes " +
         std::to_string(size));
  }
}

void Runner::access(uintptr_t address, size_t size, msl_access access, uintptr_t pc) {
  if (fiber_ && access == MSL_ATOMIC_READ && ++fiber_->atomic_loads > kMostAtomicLoads) {
    fail("endless wait for another thread: only barriers wait, by " + who(), pc);
  }
  if (!dispatch_.settings.checked || !fiber_) return;
  check_stack(pc);
  if (inside(address, fiber_->stack, kStackBytes)) return;
  if (order_.preempts()) {
    ready_.push_back(fiber_->thread);
    yield();
  }
  const Simdgroup& simdgroup = simdgroups_[fiber_->simdgroup()];
  Accessor accessor{threadgroup_, fiber_->thread, fiber_->device_epoch, simdgroup.device_epoch};
  std::string problem;
  if (threadgroup_memory_.holds(address)) {
    accessor.epoch = fiber_->threadgroup_epoch;
    accessor.simdgroup_epoch = simdgroup.threadgroup_epoch;
    problem = threadgroup_memory_.access(address, size, access, accessor);
  } else if (stacks_.holds(address)) {
    problem = std::string(verb(access)) + " of another thread's memory";
  } else if (device_memory_.holds(address) || !in_image(address)) {
    problem = device_memory_.access(address, size, access, accessor);
  }
  if (!problem.empty()) fail(problem + ", by " + who(), pc);
}

bool Runner::in_image(uintptr_t address) {
  if (address / kPage == image_page_) return true;
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(address), &info) || info.dli_fbase != dispatch_.image) return false;
  image_page_ = address / kPage;
  return true;
}

void* Runner::threadgroup_argument(size_t index, size_t size) {
  const auto& bytes = dispatch_.threadgroup_bytes;
  if (index >= bytes.size() || bytes[index] < std::max<size_t>(size, 1)) {
    fail("threadgroup memory " + std::to_string(index) + " is given " +
         std::to_string(index < bytes.size() ? bytes[index] : 0) + " bytes: pass threadgroup_memory={" +
         std::to_string(index) + ": bytes}");
  }
  return threadgroup_array(-1 - static_cast<int>(index), bytes[index], kArgumentAlignment);
}

void* Runner::threadgroup_array(int id, size_t size, size_t align) {
  void* array = threadgroup_memory_.array(id, size, align);
  if (!array) {
    fail("threadgroup memory of " + std::to_string(threadgroup_memory_.used()) + " bytes exceeds the limit of " +
         std::to_string(kThreadgroupBytes));
  }
  return array;
}

void Runner::barrier(bool simdgroup, int flags, Place place) {
  wait(simdgroup ? Fiber::kAtSimdgroupBarrier : Fiber::kAtBarrier, flags, place);
}

void Runner::exchange(const void* value, size_t size, int operation, msl_lanes* all, Place place) {
  Simdgroup& simdgroup = simdgroups_[fiber_->simdgroup()];
  const uint32_t parity = fiber_->parity ^= 1;
  std::memcpy(simdgroup.slots[parity][fiber_->lane()], value, size);
  wait(Fiber::kExchanging, operation, place);
  all->mask = simdgroup.mask[parity];
  all->lane = fiber_->lane();
  std::memcpy(all->slots, simdgroup.slots[parity], sizeof(all->slots));
}

void Runner::fail(const std::string& message, uintptr_t pc) {
  if (!failed()) failure_ = {message, pc};
  if (fiber_) yield();  // for good: a failed run is abandoned
}

// Faults

void Runner::check_stack(uintptr_t pc) {
  const char here = 0;
  if (&here < fiber_->stack + kReserve)
    fail("no memory is left for thread variables: endless recursion or large arrays, by " + who(), pc);
}

bool Runner::take_fault(int signal, uintptr_t address, uintptr_t pc, char** stack) {
  if (!fiber_) return false;
  fault_ = {signal, address, pc};
  *stack = stack_end(fiber_->stack);
  return true;
}

void Runner::report_fault() {
  std::string what = "access to no buffer's memory";
  if (stacks_.is_guard(fault_.address)) {
    what = "no memory is left for thread variables: endless recursion or large arrays";
  } else if (fault_.signal == SIGFPE) {
    what = "integer division out of range: the smallest number by -1";
  } else if (fault_.signal == SIGILL) {
    what = "undefined behaviour that the compiler has seen, such as a function that ends without its return";
  }
  fail(what + ", by " + who(), fault_.pc + 1);
  std::abort();  // a fiber that has failed is never resumed
}

// Threads

void Runner::start_threadgroup(uint32_t index) {
  threadgroup_ = index;
  position_[0] = index % groups_[0];
  position_[1] = index / groups_[0] % groups_[1];
  position_[2] = index / groups_[0] / groups_[1];
  for (int i = 0; i < 3; ++i) {
    const uint64_t left = dispatch_.grid[i] - uint64_t{position_[i]} * dispatch_.group[i];
    size_[i] = static_cast<uint32_t>(std::min<uint64_t>(dispatch_.group[i], left));
  }
  threadgroup_memory_.reset();
  fibers_.resize(size_[0] * size_[1] * size_[2]);
  stacks_.guard(fibers_.size());
  simdgroups_.assign(simdgroups_for(size_), Simdgroup{});
  for (uint32_t thread = 0; thread < fibers_.size(); ++thread) {
    Fiber& fiber = fibers_[thread] = Fiber{};
    fiber.thread = thread;
    fiber.stack = stacks_.stack(thread);
    fiber.context = new_context(fiber.stack, fiber_main);
    simdgroups_[fiber.simdgroup()].lanes |= 1u << fiber.lane();
  }
  std::vector<uint32_t> threads(fibers_.size());
  std::iota(threads.begin(), threads.end(), 0);
  make_ready(std::move(threads));
}

void Runner::fiber_main() {
  Runner* runner = current;
  // Copies on the fiber's own stack, which the kernel may read.
  void* pointers[kMaxBuffers];
  unsigned values[kBuiltins][3];
  std::memcpy(pointers, runner->pointers_, sizeof(pointers));
  runner->builtins(runner->fiber_->thread, values);
  const msl_args args{pointers, values[0]};
  runner->dispatch_.kernel(&args);
  runner->wait(Fiber::kDone, 0, {});
  std::abort();  // a finished fiber is never resumed
}

void Runner::builtins(uint32_t thread, unsigned (&values)[kBuiltins][3]) const {
  const auto& grid = dispatch_.grid;
  const auto& group = dispatch_.group;
  const uint32_t p[3] = {thread % size_[0], thread / size_[0] % size_[1], thread / size_[0] / size_[1]};
  const unsigned all[kBuiltins][3] = {
      // In the order of BUILTINS in torch_fused/metal/program.py.
      {position_[0] * group[0] + p[0], position_[1] * group[1] + p[1], position_[2] * group[2] + p[2]},
      {p[0], p[1], p[2]},
      {thread},
      {position_[0], position_[1], position_[2]},
      {size_[0], size_[1], size_[2]},
      {group[0], group[1], group[2]},
      {groups_[0], groups_[1], groups_[2]},
      {uint32_t(grid[0]), uint32_t(grid[1]), uint32_t(grid[2])},
      {thread % kSimdWidth},
      {thread / kSimdWidth},
      {simdgroups_for(size_)},
      {simdgroups_for(group)},
      {kSimdWidth},
      {thread % kQuadWidth},
      {thread / kQuadWidth},
      {(size_[0] * size_[1] * size_[2] + kQuadWidth - 1) / kQuadWidth},
      {(group[0] * group[1] * group[2] + kQuadWidth - 1) / kQuadWidth},
      {0, 0, 0},
  };
  std::memcpy(values, all, sizeof(all));
}

Failure run(Dispatch& dispatch) {
  return Runner(dispatch).run();
}

const msl_runtime& runtime_table() {
  static const msl_runtime table = {
      [](int buffer, int read_only, unsigned long size, int present) {
        current->declare(buffer, read_only, size, present);
      },
      [](const volatile void* address, unsigned long size, msl_access access, const void* pc) {
        current->access(reinterpret_cast<uintptr_t>(address), size, access, reinterpret_cast<uintptr_t>(pc));
      },
      [](int id, unsigned long size, unsigned long align) { return current->threadgroup_array(id, size, align); },
      [](int index, unsigned long size) { return current->threadgroup_argument(index, size); },
      [](int simdgroup, int flags, int line, const char* file) { current->barrier(simdgroup, flags, {file, line}); },
      [](const void* value, int size, int operation, msl_lanes* all, int line, const char* file) {
        current->exchange(value, size, operation, all, {file, line});
      },
      [](const char* what, int line, const char* file) {
        current->fail(std::string(what) + ", by " + current->who() + " " + Place{file, line}.text());
      },
      [](const char* what, const void* pc) {
        current->fail(std::string(what) + ", by " + current->who(), reinterpret_cast<uintptr_t>(pc));
      },
  };
  return table;
}

}  // namespace torch_fused::emulator
