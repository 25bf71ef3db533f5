// One fiber per CUDA thread: its stack, the switch to it and back, and what a wild access in it says.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers on this stack and continues on the other.
extern "C" void emu_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emu {

unsigned lane;
Thread* self;

namespace {
#ifdef EMU_ASAN
constexpr size_t kStack = 512 * 1024;  // instrumented frames are larger
#else
constexpr size_t kStack = 128 * 1024;
#endif
constexpr size_t kGuard = 4096;
char* stacks;
void* scheduler_stack_pointer;
[[maybe_unused]] const void* scheduler_stack;  // AddressSanitizer wants to know
[[maybe_unused]] size_t scheduler_stack_bytes;
void (*thread_entry)();

void fiber_main() {
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  thread_entry();
  suspend(true);
  abort();
}

#ifndef EMU_ASAN
// A guard page, or a vector instruction that wants an aligned address.
void on_segmentation_fault(int signal_number, siginfo_t* info, void* context) {
  if (!self) {
    signal(signal_number, SIG_DFL);
    return;
  }
  const char* address = static_cast<const char*>(info->si_addr);
  const auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const char* what = !address              ? "null or misaligned address"
                     : on_a_stack(address) ? "stack overflow"
                     : in_arena(address)   ? "out of bounds (guard page)"
                                           : "wild address";
  // source_line() takes a return address: one past the instruction.
  fail("%s at %s", what, source_line(reinterpret_cast<const char*>(registers[REG_RIP]) + 1).c_str());
}
#endif
}  // namespace

bool on_a_stack(const char* pointer) { return pointer >= stacks && pointer < stacks + kMaxThreads * kStack; }

void prepare_fibers() {
  if (stacks) return;
  stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStack, kGuard, PROT_NONE);
}

#ifndef EMU_ASAN
namespace {
struct sigaction previous_action;
}
// The handler runs on its own stack and only while a kernel does: the process has its own ideas otherwise.
void catch_faults(bool on) {
  if (!on) {
    sigaction(SIGSEGV, &previous_action, nullptr);
    return;
  }
  static char handler_stack[256 * 1024];
  stack_t alternative = {};
  alternative.ss_sp = handler_stack;
  alternative.ss_size = sizeof handler_stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_segmentation_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous_action);
}
#else
void catch_faults(bool) {}
#endif

void start_fiber(Thread& thread, void (*entry)()) {
  thread_entry = entry;
  thread.stack = stacks + thread.id * kStack + kGuard;
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(thread.stack, kStack - kGuard);
#endif
  // What emu_switch finds: six registers, its return address, and a return address for fiber_main.
  void** top = reinterpret_cast<void**>(stacks + (thread.id + 1) * kStack);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(fiber_main);
  memset(top - 8, 0, 6 * sizeof(void*));
  thread.stack_pointer = top - 8;
}

void resume(Thread& thread) {
  self = &thread;
  threadIdx = thread.index;
  lane = thread.lane;
#ifdef EMU_ASAN
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStack - kGuard);
#endif
  emu_switch(&scheduler_stack_pointer, thread.stack_pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  self = nullptr;
}

void suspend([[maybe_unused]] bool for_good) {
  Thread& thread = *self;
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
  emu_switch(&thread.stack_pointer, scheduler_stack_pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace emu
