// The memory checker: bounds, alignment, initialisation, and races whatever the schedule was.
//
// GCC's -fsanitize=thread puts a call around every load and store of a kernel. The kernels are linked to the
// hooks at the end of this file, never to libtsan. Every byte has a shadow cell that says who touched it last
// and when. "When" is an epoch, a counter that every block start and block-wide barrier advances, and within
// an epoch the clock of a lane, which its __syncwarp advances. An access races with an earlier one unless a
// barrier, a __syncwarp of both, or the same thread's program order stands between them.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "state.h"

namespace emu {

bool checking = false;
bool same_value = false;

namespace {

constexpr uint32_t kHostEpoch = 1;  // written by the host; 0 is never
uint32_t launch_epoch = 2, last_epoch = 2;

struct Cell {
  uint32_t write_epoch, write_clock;
  uint32_t read_epoch, read_clock;
  uint32_t read_lanes;      // of warp read_warp
  uint32_t blocks_read_in;  // launch in which several blocks read this byte
  uint16_t writer;          // a thread
  uint16_t read_warp : 8, read_by_warps : 1, written_atomically : 1, copy_pending : 1;
};
Cell* shadow;

Cell& cell(const char* pointer) {
  if (!shadow) {
    shadow = static_cast<Cell*>(mmap(nullptr, kUsableArena * sizeof(Cell), PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (shadow == MAP_FAILED) {
      perror("cuda_on_cpu: mmap");
      abort();
    }
  }
  return shadow[arena_offset(pointer)];
}

// Where an access comes from: instrumented code, or an instruction model.
struct Origin {
  const void* return_address;
  const char* what;
  Site at;
};

[[noreturn]] void refuse(const char* problem, size_t bytes, Access access, const Origin& by,
                         const std::string& detail) {
  const char* kind = access == Access::read ? "read" : access == Access::write ? "write" : "access";
  const std::string where =
      by.what ? text(" by %s at ", by.what) + text(by.at) : " at " + source_line(by.return_address);
  fail("%s: %zu-byte %s%s%s", problem, bytes, kind, where.c_str(), detail.c_str());
}

// Is an earlier access (its epoch, thread and lane clock) not ordered before the current one?
bool unordered(uint32_t epoch, unsigned thread, uint32_t clock, bool shared) {
  if (epoch < launch_epoch) return false;         // an earlier launch, or the host
  if (epoch < block.first_epoch) return !shared;  // another block of this launch
  if (epoch < block.epoch) return false;          // before a barrier
  if (thread == self->id) return false;
  return thread / 32 != self->warp || clock > self->clocks[thread % 32];
}

class ByteAccess {  // to one byte of an access
 public:
  ByteAccess(char* pointer, size_t bytes, Access access, const Origin& by)
      : cell_(cell(pointer)),
        pointer_(pointer),
        bytes_(bytes),
        access_(access),
        by_(by),
        shared_(in_shared(pointer)) {}

  void check() {
    if (cell_.copy_pending && cell_.write_epoch >= block.first_epoch)
      refuse_after("cp.async still in flight to this address (missing wait)", "cp.async", cell_.writer);
    if (access_ == Access::read)
      read();
    else
      write();
  }

 private:
  void read() {
    if (shared_ ? cell_.write_epoch < block.first_epoch : cell_.write_epoch == 0)
      refuse(shared_ ? "uninitialised shared memory" : "uninitialised global memory", bytes_, access_, by_,
             name_of(pointer_));
    if (write_unordered()) refuse_after(race(cell_.write_epoch), "write", cell_.writer);
    if (read_by_other_block()) cell_.blocks_read_in = launch_epoch;
    if (cell_.read_epoch != block.epoch) {
      cell_.read_epoch = block.epoch;
      cell_.read_warp = self->warp;
      cell_.read_lanes = cell_.read_by_warps = 0;
    }
    if (cell_.read_warp != self->warp) {
      cell_.read_by_warps = 1;
    } else {
      const uint32_t clock = self->clocks[self->lane];
      // What comes after this read comes after those that it comes after.
      if (cell_.read_clock != clock && !read_unordered()) cell_.read_lanes = 0;
      cell_.read_lanes |= 1u << self->lane;
      cell_.read_clock = clock;
    }
  }

  void write() {
    const bool both_atomic = access_ == Access::atomic && cell_.written_atomically;
    if (write_unordered() && !both_atomic && !(shared_ && same_value))
      refuse_after(race(cell_.write_epoch), "write", cell_.writer);
    if (!shared_ && (cell_.blocks_read_in == launch_epoch || read_by_other_block()))
      refuse_after("race between blocks", "read", cell_.read_warp * 32);
    if (cell_.read_epoch == block.epoch) {
      const unsigned first = cell_.read_lanes ? __builtin_ctz(cell_.read_lanes) : 0;
      if (cell_.read_by_warps || cell_.read_warp != self->warp)
        refuse_after("race", "read", cell_.read_warp * 32 + first);
      if (const unsigned lanes = read_unordered())
        refuse_after("race", "read", cell_.read_warp * 32 + __builtin_ctz(lanes));
    }
    cell_.write_epoch = block.epoch;
    cell_.write_clock = self->clocks[self->lane];
    cell_.writer = self->id;
    cell_.written_atomically = access_ == Access::atomic;
    cell_.copy_pending = 0;
  }

  bool write_unordered() const {
    return unordered(cell_.write_epoch, cell_.writer, cell_.write_clock, shared_);
  }
  // The other lanes of this warp whose reads are not ordered before this access.
  unsigned read_unordered() const {
    unsigned found = 0;
    for (unsigned lanes = cell_.read_lanes & ~(1u << self->lane); lanes; lanes &= lanes - 1)
      if (cell_.read_clock > self->clocks[__builtin_ctz(lanes)]) found |= lanes & -lanes;
    return found;
  }
  bool read_by_other_block() const {
    return cell_.read_epoch >= launch_epoch && cell_.read_epoch < block.first_epoch;
  }
  static const char* race(uint32_t epoch) {
    return epoch < block.first_epoch ? "race between blocks" : "race";
  }
  [[noreturn]] void refuse_after(const char* problem, const char* other, unsigned thread) const {
    refuse(problem, bytes_, access_, by_, name_of(pointer_) + text(", after %s by thread %u", other, thread));
  }

  Cell& cell_;
  char* pointer_;
  size_t bytes_;
  Access access_;
  const Origin& by_;
  bool shared_;
};

void check_bytes(char* pointer, size_t bytes, Access access, const Origin& by) {
  for (size_t i = 0; i < bytes; ++i) ByteAccess(pointer + i, bytes, access, by).check();
}

// A load or store of instrumented code.
inline void on_access(void* address, size_t bytes, Access access, bool aligned, const void* return_address) {
  if (!self) return;
  char* pointer = static_cast<char*>(address);
  if (!in_arena(pointer)) return;  // the stack, constants
  const Origin by = {return_address, nullptr, {}};
  const bool power_of_two = (bytes & (bytes - 1)) == 0;
  if (aligned && power_of_two && arena_offset(pointer) % bytes)
    refuse("misaligned address", bytes, access, by, name_of(pointer));
  if (!in_bounds(pointer, bytes)) refuse("out of bounds", bytes, access, by, name_of(pointer));
  check_bytes(pointer, bytes, access, by);
  if (access == Access::write) same_value = false;
}

}  // namespace

void check_access(const void* address, size_t bytes, Access access, bool shared_only, const char* what,
                  Site at) {
  char* pointer = static_cast<char*>(const_cast<void*>(address));
  const Origin by = {nullptr, what, at};
  if (shared_only && !in_shared(pointer)) refuse("not a shared memory address", bytes, access, by, "");
#ifdef EMU_ASAN
  if (__asan_region_is_poisoned(pointer, bytes)) refuse("out of bounds", bytes, access, by, "");
#else
  if (!in_arena(pointer)) return;
  if (!in_bounds(pointer, bytes)) refuse("out of bounds", bytes, access, by, name_of(pointer));
  if (checking) check_bytes(pointer, bytes, access, by);
#endif
}

void next_launch() { launch_epoch = ++last_epoch; }
void start_epochs() { block.first_epoch = block.epoch = ++last_epoch; }
void next_epoch() { block.epoch = ++last_epoch; }

void mark_pending(char* to, unsigned bytes) {
  for (unsigned i = 0; checking && i < bytes; ++i) cell(to + i).copy_pending = 1;
}
void mark_copied(char* to, unsigned bytes) {
  for (unsigned i = 0; checking && i < bytes; ++i) {
    Cell& c = cell(to + i);
    c.copy_pending = c.written_atomically = 0;
    c.write_epoch = block.epoch;
    c.write_clock = self->clocks[self->lane];
    c.writer = self->id;
  }
}
void mark_host_write(char* to, size_t bytes) {
  for (size_t i = 0; checking && i < bytes; ++i) cell(to + i).write_epoch = kHostEpoch;
}
void forget_shadow(size_t offset, size_t bytes) {
  if (shadow) madvise(shadow + offset, bytes * sizeof(Cell), MADV_DONTNEED);
}

}  // namespace emu

// What instrumented code calls.
using namespace emu;
#define HOOK(name, bytes, access, aligned) \
  void name(void* address) { on_access(address, bytes, access, aligned, __builtin_return_address(0)); }
#define HOOKS(bytes)                                               \
  HOOK(__tsan_read##bytes, bytes, Access::read, true)              \
  HOOK(__tsan_write##bytes, bytes, Access::write, true)            \
  HOOK(__tsan_unaligned_read##bytes, bytes, Access::read, false)   \
  HOOK(__tsan_unaligned_write##bytes, bytes, Access::write, false) \
  HOOK(__tsan_volatile_read##bytes, bytes, Access::read, true)     \
  HOOK(__tsan_volatile_write##bytes, bytes, Access::write, true)
extern "C" {
void __tsan_init() { checking = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_atomic_thread_fence(int) {}
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) {
  on_access(address, bytes, Access::read, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  on_access(address, bytes, Access::write, false, __builtin_return_address(0));
}
}  // extern "C"
