// What the parts of the machinery share; kernels see emu.h only.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "emu.h"
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

struct Config {
  uint64_t seed = 0;               // 0: warps and lanes in order; else in an adversarial order drawn from it
  bool strict = true;              // exited threads or different places at a barrier are errors
  size_t shared_max = 163 * 1024;  // a block's shared memory on sm_80
};
extern Config config;

// Set when the kernels are instrumented: every load and store goes through the checker.
extern bool checking;

enum class State : uint8_t { ready, at_barrier, at_warp, exited };

struct Copy {  // a cp.async in flight
  char* to;
  const char* from;
  unsigned bytes, source_bytes;
  int group;
};

struct Thread {
  uint3 index;
  unsigned id, warp, lane;
  State state;

  // What it waits for, if it does.
  const char* op;
  Site at;
  bool predicate;
  unsigned mask;
  bool aligned;
  WarpModel model;
  void* operands;

  std::vector<Copy> copies;
  int groups;  // cp.async groups committed so far

  // For each lane of the warp, the last of its accesses known to come before this thread's next one. A
  // thread's own entry counts its __syncwarp.
  uint32_t clocks[32];

  void* stack_pointer;
  char* stack;
  void* fake_stack;  // AddressSanitizer's
};

struct SharedArray {
  const void* key;
  const char* name;
  char* data;
  size_t bytes;
};

struct Block {  // the one that runs
  const void* kernel;
  uint3 index;
  std::vector<Thread> threads;
  unsigned size, alive, at_barrier;       // threads
  std::vector<unsigned> waiting, living;  // lanes of each warp, as masks
  int barrier_count;                      // the last barrier's result
  std::vector<SharedArray> arrays;        // the first is dynamic shared memory
  size_t shared_used;
  uint32_t first_epoch, epoch;  // see checker.cpp
  bool failed;
};
extern Block block;
extern Thread* self;  // null outside kernels

// fibers.cpp
constexpr unsigned kMaxThreads = 1024;
void prepare_fibers();
void start_fiber(Thread& thread, void (*entry)());
void resume(Thread& thread);          // runs it until it waits, ends or fails
void suspend(bool for_good = false);  // back to the scheduler
bool on_a_stack(const char* pointer);
void catch_faults(bool on);  // while a kernel runs

// memory.cpp
constexpr size_t kRedZone = 256;
bool in_arena(const char* pointer);
bool in_shared(const char* pointer);
size_t arena_offset(const char* pointer);
constexpr size_t kUsableArena = size_t(4) << 30;
void prepare_arena();
void start_shared_memory(size_t dynamic_bytes);
bool in_bounds(const char* pointer, size_t bytes);
std::string name_of(const char* pointer);  // ", array + offset", or nothing
std::string broken_red_zone();             // a report, or nothing

// checker.cpp
void next_launch();
void start_epochs();  // of a block
void next_epoch();    // after a block-wide barrier
void mark_pending(char* to, unsigned bytes);
void mark_copied(char* to, unsigned bytes);
void mark_host_write(char* to, size_t bytes);
void forget_shadow(size_t offset, size_t bytes);

// warps.cpp
void release_barrier();
void lane_exited(Thread& thread);

// reports.cpp
std::string symbol(const void* code);  // demangled name of a function
std::string mangled_symbol(const void* code);
std::string source_line(const void* return_address);  // "file:line"
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(Site at);  // "file:line"
void report(const std::string& message);
void fail_block(const char* what);  // with the list of who waits where
bool failed();

void reset_counters();

}  // namespace emu
