#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "../../../torch_fused/metal/include/runtime.h"
#include "fiber.h"

namespace torch_fused::emulator {
namespace {

constexpr uint32_t kSimdWidth = 32, kMaxFibers = 1024;
constexpr size_t kThreadgroupBytes = 32768;  // Metal's limit
constexpr size_t kSlotBytes = 16;            // the widest value of a simdgroup operation
constexpr int kBuiltins = 13;
constexpr int kMemDevice = 1, kMemThreadgroup = 2;  // mem_flags
constexpr uint64_t kPreemptOneIn = 16;

enum class State { kReady, kAtBarrier, kAtSimdgroupBarrier, kExchanging, kDone };

struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const { return file == other.file && line == other.line; }
};

struct Fiber {
  void* context;
  char* stack;
  State state;
  uint32_t thread;
  Place place;    // where it waits
  int waits_for;  // mem_flags of a barrier, operation of an exchange
  uint32_t device_epoch, threadgroup_epoch;
  uint32_t parity;  // which of the two sets of slots its next exchange uses
  unsigned builtins[3 * kBuiltins];

  uint32_t simdgroup() const { return thread / kSimdWidth; }
  uint32_t lane() const { return thread % kSimdWidth; }
};

struct Simdgroup {
  uint32_t lanes, arrived, done;  // masks
  uint32_t mask[2];               // lanes of the last exchange of each parity
  uint32_t device_epoch, threadgroup_epoch;
  alignas(16) char slots[2][kSimdWidth][kSlotBytes];
};

struct ThreadgroupArray {
  size_t offset, size;
};

// Memory that outlives a dispatch, because mapping it costs more than a small launch.
struct Arena {
  char* stacks;
  char* threadgroup;
  Arena() : stacks(map(kMaxFibers * kStackBytes)), threadgroup(map(2 * kThreadgroupBytes)) {}
  ~Arena() {
    munmap(stacks, kMaxFibers * kStackBytes);
    munmap(threadgroup, 2 * kThreadgroupBytes);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  static char* map(size_t size) {
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    return static_cast<char*>(memory);
  }
};

const char* base_name(const char* file) {
  const char* slash = file ? std::strrchr(file, '/') : nullptr;
  return slash ? slash + 1 : file;
}
std::string text(const Place& place) {
  return std::string(base_name(place.file)) + ":" + std::to_string(place.line);
}

class Runner;
thread_local Runner* current_runner = nullptr;

class Runner {
 public:
  explicit Runner(const Dispatch& dispatch)
      : dispatch_(dispatch), memory_(dispatch.buffers), random_(dispatch.seed * 2 + 1) {
    static thread_local Arena arena;
    arena_ = &arena;
    for (const Buffer& buffer : dispatch.buffers) {
      pointers_[buffer.index] = reinterpret_cast<void*>(buffer.begin);
      sizes_[buffer.index] = buffer.end - buffer.begin;
    }
    for (int i = 0; i < 8; ++i) next_random();
  }

  Failure run() {
    Runner* outer = std::exchange(current_runner, this);
    uint32_t groups[3], total = 1;
    for (int i = 0; i < 3; ++i) total *= groups[i] = (dispatch_.grid[i] + dispatch_.group[i] - 1) / dispatch_.group[i];
    for (const uint32_t index : order(total)) {
      const uint32_t position[3] = {index % groups[0], index / groups[0] % groups[1], index / groups[0] / groups[1]};
      start_threadgroup(index, position, groups);
      schedule();
      if (failed()) break;
    }
    current_runner = outer;
    return failure_;
  }

  std::vector<Traffic> traffic() {
    std::vector<Traffic> result;
    for (const Buffer& buffer : memory_.buffers()) {
      if (buffer.read + buffer.written == 0) continue;
      const auto [read, written] = memory_.distinct(buffer);
      result.push_back({buffer.index, buffer.read, buffer.written, read, written});
    }
    return result;
  }

  // ---- called by kernels, on a fiber
  // ---------------------------------------------------------------------------------

  void access(uintptr_t address, size_t size, int kind, uintptr_t pc) {
    if (!fiber_ || !dispatch_.checked || in(address, fiber_->stack, kStackBytes)) return;
    if (in(address, simdgroups_.data(), simdgroups_.size() * sizeof(Simdgroup))) return;
    if (dispatch_.schedule == Schedule::kPreemptive && next_random() % kPreemptOneIn == 0) {
      ready_.push_back(fiber_->thread);
      yield();
    }
    if (in(address, arena_->threadgroup, 2 * kThreadgroupBytes)) {
      access_threadgroup(address, size, kind, pc);
    } else if (Buffer* buffer = memory_.find(address, size)) {
      access_device(*buffer, address, size, kind, pc);
    } else if (!(address >= dispatch_.image_begin && address < dispatch_.image_end) &&
               !in(address, this, sizeof(*this)) && !in(address, fiber_, sizeof(*fiber_))) {
      if (in(address, arena_->stacks, kMaxFibers * kStackBytes))
        fail("access to another thread's memory by " + who(), pc);
      fail(std::string("out-of-bounds device ") + verb(kind) + " of " + std::to_string(size) + " bytes" +
               memory_.nearest(address) + " by " + who(),
           pc);
    }
  }

  void* threadgroup_array(int id, size_t size, size_t align) {
    auto [entry, is_new] = arrays_.try_emplace(id);
    if (is_new) {
      const size_t offset = (threadgroup_used_ + align - 1) / align * align;
      if (offset + size > kThreadgroupBytes) {
        fail("threadgroup memory of " + std::to_string(offset + size) + " bytes exceeds the limit of 32768", 0);
      }
      entry->second = {offset, size};
      threadgroup_used_ = offset + size + kSlotBytes;  // a gap, so that running past one array is seen
    }
    return arena_->threadgroup + entry->second.offset;
  }

  void barrier(bool simdgroup, int flags, Place place) {
    wait(simdgroup ? State::kAtSimdgroupBarrier : State::kAtBarrier, flags, place);
  }

  const void* exchange(const void* value, size_t size, int operation, unsigned* mask, unsigned* lane, Place place) {
    Simdgroup& simdgroup = simdgroups_[fiber_->simdgroup()];
    const uint32_t parity = fiber_->parity ^= 1;
    std::memcpy(simdgroup.slots[parity][fiber_->lane()], value, size);
    wait(State::kExchanging, operation, place);
    *mask = simdgroup.mask[parity];
    *lane = fiber_->lane();
    return simdgroup.slots[parity];
  }

  void fail(const std::string& message, uintptr_t pc) {
    if (!failed()) failure_ = {message, pc};
    if (fiber_) {
      fiber_->state = State::kDone;
      yield();  // for good: a failed run is abandoned
    }
  }

  std::string who() const { return who(*fiber_); }

 private:
  static bool in(uintptr_t address, const void* begin, size_t size) {
    return address - reinterpret_cast<uintptr_t>(begin) < size;
  }
  static const char* verb(int kind) { return kind == MSL_WRITE || kind == MSL_ATOMIC_WRITE ? "write" : "read"; }
  bool failed() const { return !failure_.message.empty(); }

  std::string who(const Fiber& fiber) const {
    return "thread " + std::to_string(fiber.thread) + " of threadgroup " + std::to_string(threadgroup_);
  }

  uint64_t next_random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    return random_ ^= random_ << 17;
  }

  bool shuffles() const {
    return dispatch_.schedule == Schedule::kRandom || dispatch_.schedule == Schedule::kPreemptive;
  }

  std::vector<uint32_t> order(uint32_t count) {
    std::vector<uint32_t> indices(count);
    for (uint32_t i = 0; i < count; ++i) indices[i] = dispatch_.schedule == Schedule::kReversed ? count - 1 - i : i;
    if (shuffles()) {
      for (uint32_t i = count; i > 1; --i) std::swap(indices[i - 1], indices[next_random() % i]);
    }
    return indices;
  }

  // ---- memory
  // --------------------------------------------------------------------------------------------------------

  void access_threadgroup(uintptr_t address, size_t size, int kind, uintptr_t pc) {
    const size_t offset = address - reinterpret_cast<uintptr_t>(arena_->threadgroup);
    const bool inside = std::any_of(arrays_.begin(), arrays_.end(), [&](const auto& entry) {
      return offset >= entry.second.offset && offset + size <= entry.second.offset + entry.second.size;
    });
    if (!inside) {
      fail(
          std::string("out-of-bounds threadgroup ") + verb(kind) + " of " + std::to_string(size) + " bytes by " + who(),
          pc);
    }
    const bool write = kind == MSL_WRITE || kind == MSL_ATOMIC_WRITE;
    for (size_t i = 0; i < size; ++i) {
      if (!write && !threadgroup_cells_[offset + i].write) {
        fail("read of uninitialised threadgroup memory by " + who(), pc);
      }
    }
    record(&threadgroup_cells_[offset], size, kind, fiber_->threadgroup_epoch,
           simdgroups_[fiber_->simdgroup()].threadgroup_epoch, "threadgroup memory", pc);
  }

  void access_device(Buffer& buffer, uintptr_t address, size_t size, int kind, uintptr_t pc) {
    const bool write = kind == MSL_WRITE || kind == MSL_ATOMIC_WRITE;
    if (address % std::min<size_t>(size, 16)) {
      fail("misaligned " + std::to_string(size) + "-byte " + verb(kind) + " at byte " +
               std::to_string(address - buffer.begin) + " of buffer " + std::to_string(buffer.index) + " by " + who(),
           pc);
    }
    if (buffer.read_only) {
      if (write) fail("write to the constant buffer " + std::to_string(buffer.index) + " by " + who(), pc);
      return;
    }
    (write ? buffer.written : buffer.read) += size;
    const auto [cells, count] = memory_.cells(buffer, address, size);
    record(cells, count, kind, fiber_->device_epoch, simdgroups_[fiber_->simdgroup()].device_epoch,
           ("buffer " + std::to_string(buffer.index)).c_str(), pc);
  }

  void record(Cell* cells, size_t count, int kind, uint32_t epoch, uint32_t simdgroup_epoch, const char* where,
              uintptr_t pc) {
    const bool write = kind == MSL_WRITE || kind == MSL_ATOMIC_WRITE, atomic = kind >= MSL_ATOMIC_READ;
    const Accessor accessor{threadgroup_, fiber_->thread, epoch, simdgroup_epoch};
    for (size_t i = 0; i < count; ++i) {
      Accessor other;
      if (const char* hazard = touch(cells[i], accessor, write, atomic, &other)) {
        fail(std::string("data race (") + hazard + ") on " + where + ": " + who() + " and thread " +
                 std::to_string(other.thread) + " of threadgroup " + std::to_string(other.threadgroup),
             pc);
      }
    }
  }

  // ---- scheduling
  // ----------------------------------------------------------------------------------------------------

  void yield() { switch_context(&fiber_->context, scheduler_); }

  void wait(State state, int waits_for, Place place) {
    fiber_->state = state;
    fiber_->waits_for = waits_for;
    fiber_->place = place;
    yield();
  }

  static void fiber_main() {
    Runner* runner = current_runner;
    const msl_args args{runner->pointers_, runner->sizes_, runner->fiber_->builtins};
    runner->dispatch_.kernel(&args);
    runner->fiber_->state = State::kDone;
    runner->yield();
    std::abort();
  }

  void start_threadgroup(uint32_t index, const uint32_t position[3], const uint32_t groups[3]) {
    uint32_t size[3];  // smaller at the edge of the grid
    for (int i = 0; i < 3; ++i)
      size[i] = std::min(dispatch_.group[i], dispatch_.grid[i] - position[i] * dispatch_.group[i]);
    const uint32_t count = size[0] * size[1] * size[2];
    threadgroup_ = index;
    fibers_.assign(count, Fiber{});
    simdgroups_.assign((count + kSimdWidth - 1) / kSimdWidth, Simdgroup{});
    arrays_.clear();
    // NaN to whoever reads what was not written.
    std::memset(arena_->threadgroup, 0xff, std::min(threadgroup_used_, kThreadgroupBytes));
    if (dispatch_.checked) threadgroup_cells_.assign(2 * kThreadgroupBytes, Cell{});
    threadgroup_used_ = 0;
    ready_.clear();
    const uint32_t full_simdgroups =
        (dispatch_.group[0] * dispatch_.group[1] * dispatch_.group[2] + kSimdWidth - 1) / kSimdWidth;
    for (uint32_t t = 0; t < count; ++t) {
      Fiber& fiber = fibers_[t];
      fiber.thread = t;
      fiber.state = State::kReady;
      fiber.stack = arena_->stacks + t * kStackBytes;
      fiber.context = new_context(fiber.stack, fiber_main);
      simdgroups_[fiber.simdgroup()].lanes |= 1u << fiber.lane();
      const uint32_t p[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
      const uint32_t values[kBuiltins][3] = {
          // in the order of BUILTINS in metal/program.py
          {position[0] * dispatch_.group[0] + p[0], position[1] * dispatch_.group[1] + p[1],
           position[2] * dispatch_.group[2] + p[2]},
          {p[0], p[1], p[2]},
          {t},
          {position[0], position[1], position[2]},
          {size[0], size[1], size[2]},
          {dispatch_.group[0], dispatch_.group[1], dispatch_.group[2]},
          {groups[0], groups[1], groups[2]},
          {dispatch_.grid[0], dispatch_.grid[1], dispatch_.grid[2]},
          {fiber.lane()},
          {fiber.simdgroup()},
          {static_cast<uint32_t>(simdgroups_.size())},
          {full_simdgroups},
          {kSimdWidth}};
      std::memcpy(fiber.builtins, values, sizeof(values));
    }
    release_all();
  }

  // Makes every fiber ready, in the order of the schedule.
  void release_all() {
    for (Fiber& fiber : fibers_) {
      fiber.state = State::kReady;
      ready_.push_back(fiber.thread);
    }
    if (dispatch_.schedule == Schedule::kReversed) std::reverse(ready_.begin(), ready_.end());
  }

  void schedule() {
    size_t done = 0, head = 0;
    while (done < fibers_.size()) {
      if (head == ready_.size()) {
        ready_.clear();
        head = 0;
        if (!release_barrier()) return;
      }
      if (shuffles()) std::swap(ready_[head], ready_[head + next_random() % (ready_.size() - head)]);
      Fiber& fiber = fibers_[ready_[head++]];
      fiber_ = &fiber;
      switch_context(&scheduler_, fiber.context);
      fiber_ = nullptr;
      if (failed()) return;
      Simdgroup& simdgroup = simdgroups_[fiber.simdgroup()];
      const uint32_t bit = 1u << fiber.lane();
      if (fiber.state == State::kDone) {
        ++done;
        simdgroup.done |= bit;
      } else if (fiber.state == State::kExchanging || fiber.state == State::kAtSimdgroupBarrier) {
        simdgroup.arrived |= bit;
      } else {
        continue;
      }
      release_simdgroup(simdgroup, fiber.simdgroup() * kSimdWidth);
    }
  }

  // Lets a simdgroup go on once all its living lanes wait at the same place for the same thing.
  void release_simdgroup(Simdgroup& simdgroup, uint32_t first) {
    const uint32_t living = simdgroup.lanes & ~simdgroup.done;
    if (!living || (simdgroup.arrived & living) != living) return;
    const Fiber* leader = nullptr;
    for (uint32_t lane = 0; lane < kSimdWidth; ++lane) {
      if (!(living >> lane & 1)) continue;
      const Fiber& fiber = fibers_[first + lane];
      if (!leader) leader = &fiber;
      if (fiber.state != leader->state || fiber.waits_for != leader->waits_for || !(fiber.place == leader->place))
        return;
    }
    if (leader->state == State::kExchanging) {
      simdgroup.mask[leader->parity] = living;
    } else {
      simdgroup.threadgroup_epoch += leader->waits_for & kMemThreadgroup ? 1 : 0;
      simdgroup.device_epoch += leader->waits_for & kMemDevice ? 1 : 0;
    }
    simdgroup.arrived = 0;
    for (uint32_t lane = 0; lane < kSimdWidth; ++lane) {
      if (!(living >> lane & 1)) continue;
      fibers_[first + lane].state = State::kReady;
      ready_.push_back(first + lane);
    }
  }

  // Nobody can run: either all threads wait at one threadgroup barrier, or the kernel is wrong. Returns whether they go
  // on.
  bool release_barrier() {
    const Fiber *at_barrier = nullptr, *elsewhere = nullptr, *in_simdgroup = nullptr;
    size_t waiting = 0;
    for (const Fiber& fiber : fibers_) {
      if (fiber.state == State::kAtBarrier) {
        ++waiting;
        if (!at_barrier) at_barrier = &fiber;
        if (!(fiber.place == at_barrier->place)) elsewhere = &fiber;
      } else if (fiber.state != State::kDone && !in_simdgroup) {
        in_simdgroup = &fiber;
      }
    }
    if (in_simdgroup) {
      fail(divergent_simdgroup(*in_simdgroup), 0);
    } else if (elsewhere) {
      fail("divergent threadgroup_barrier: " + who(*at_barrier) + " waits at [" + text(at_barrier->place) +
               "], thread " + std::to_string(elsewhere->thread) + " at [" + text(elsewhere->place) + "]",
           0);
    } else if (waiting < fibers_.size()) {
      fail("threadgroup_barrier is reached by " + std::to_string(waiting) + " of " + std::to_string(fibers_.size()) +
               " threads of threadgroup " + std::to_string(threadgroup_) + ", the others have returned [" +
               text(at_barrier->place) + "]",
           0);
    } else {
      for (Fiber& fiber : fibers_) {
        fiber.threadgroup_epoch += fiber.waits_for & kMemThreadgroup ? 1 : 0;
        fiber.device_epoch += fiber.waits_for & kMemDevice ? 1 : 0;
      }
      release_all();
      return true;
    }
    return false;
  }

  std::string divergent_simdgroup(const Fiber& fiber) const {
    std::string message = "divergent simdgroup operation: " + who(fiber) + " waits at [" + text(fiber.place) + "]";
    for (const Fiber& other : fibers_) {
      if (other.simdgroup() != fiber.simdgroup() || other.state == State::kDone || other.place == fiber.place) continue;
      return message + ", lane " + std::to_string(other.lane()) + " at [" + text(other.place) + "]";
    }
    return message;
  }

  const Dispatch& dispatch_;
  DeviceMemory memory_;
  Arena* arena_;
  Failure failure_;
  void* pointers_[32] = {};
  unsigned long sizes_[32] = {};
  uint64_t random_;

  uint32_t threadgroup_ = 0;
  std::vector<Fiber> fibers_;
  std::vector<Simdgroup> simdgroups_;
  std::map<int, ThreadgroupArray> arrays_;
  std::vector<Cell> threadgroup_cells_;
  size_t threadgroup_used_ = kThreadgroupBytes;
  std::vector<uint32_t> ready_;
  Fiber* fiber_ = nullptr;  // the one that runs
  void* scheduler_ = nullptr;
};

}  // namespace

const msl_runtime& runtime_table() {
  static const msl_runtime table = {
      [](const volatile void* address, unsigned long size, int kind, const void* pc) {
        current_runner->access(reinterpret_cast<uintptr_t>(address), size, kind, reinterpret_cast<uintptr_t>(pc));
      },
      [](int id, unsigned long size, unsigned long align) {
        return current_runner->threadgroup_array(id, size, align);
      },
      [](int simdgroup, int flags, int line, const char* file) {
        current_runner->barrier(simdgroup, flags, {file, line});
      },
      [](const void* value, int size, int operation, unsigned* mask, unsigned* lane, int line, const char* file) {
        return current_runner->exchange(value, size, operation, mask, lane, {file, line});
      },
      [](const char* what, int line, const char* file) {
        current_runner->fail(std::string(what) + " by " + current_runner->who() + " [" + text({file, line}) + "]", 0);
      }};
  return table;
}

Failure run(const Dispatch& dispatch, std::vector<Traffic>* traffic) {
  Runner runner(dispatch);
  const Failure failure = runner.run();
  if (traffic) *traffic = runner.traffic();
  return failure;
}

}  // namespace torch_fused::emulator
