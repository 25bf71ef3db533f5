// Launches: what CUDA would refuse, then every block, its threads in an order that does its worst.
#include <map>
#include <random>

#include "cuda_runtime.h"
#include "state.h"

namespace emu {

Config config;
Block block;

namespace {

std::map<const void*, size_t> shared_opt_in;
struct Translated {
  PtxKernel kernel;
  unsigned max_threads;
};
std::map<std::string, Translated>& translated_kernels() {  // filled by constructors of other files
  static std::map<std::string, Translated> kernels;
  return kernels;
}
const Translated& translation_of(const void* kernel) {
  static std::map<const void*, Translated> known;
  auto found = known.find(kernel);
  if (found != known.end()) return found->second;
  return known[kernel] = translated_kernels()[mangled_symbol(kernel)];
}

void (*entry)(void*);
void* entry_context;
struct {
  int device;
  cudaStream_t stream;
} last_launch;
int current_device = 0;

void run_thread() {
  entry(entry_context);
  if (!self->copies.empty()) fail("exit with cp.async in flight");
  lane_exited(*self);
}

template <class T>
void shuffle(std::vector<T>& order, std::minstd_rand& random) {
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
}

void prepare_block(uint3 index, size_t shared_bytes) {
  block.index = blockIdx = index;
  block.size = block.alive = blockDim.x * blockDim.y * blockDim.z;
  block.at_barrier = 0;
  block.failed = false;
  const unsigned warps = (block.size + 31) / 32;
  block.waiting.assign(warps, 0);
  block.living.assign(warps, ~0u);
  if (block.size % 32) block.living.back() = (1u << block.size % 32) - 1;
  start_shared_memory(shared_bytes);
  start_epochs();
  block.threads.resize(block.size);
  for (unsigned i = 0; i < block.size; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.id = i;
    thread.warp = i / 32;
    thread.lane = i % 32;
    thread.state = State::ready;
    thread.groups = 0;
    thread.copies.clear();
    memset(thread.clocks, 0, sizeof thread.clocks);
    thread.clocks[thread.lane] = 1;
    start_fiber(thread, run_thread);
  }
}

// Lanes in turn, each as far as it can run, until all of the warp wait.
void run_warp(unsigned warp, const std::vector<unsigned>& lane_order) {
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned in_warp : lane_order) {
      const unsigned i = warp * 32 + in_warp;
      if (i >= block.size || block.threads[i].state != State::ready) continue;
      resume(block.threads[i]);
      if (block.failed) return;
      progress = true;
    }
  }
}

// Adversarial: the first warp of a random order runs as far as it can, alone, before the next one starts;
// likewise the lanes of a warp. Every barrier draws a new order.
void run_block(uint3 index, size_t shared_bytes) {
  prepare_block(index, shared_bytes);
  std::minstd_rand random(config.seed * 2654435761u + index.x * 97 + index.y * 89 + index.z * 83 + 1);
  std::vector<unsigned> warp_order(block.waiting.size()), lane_order(32);
  for (size_t i = 0; i < warp_order.size(); ++i) warp_order[i] = i;
  for (size_t i = 0; i < lane_order.size(); ++i) lane_order[i] = i;
  while (block.alive) {
    if (config.seed) {
      shuffle(warp_order, random);
      shuffle(lane_order, random);
    }
    for (unsigned warp : warp_order) {
      run_warp(warp, lane_order);
      if (block.failed) return;
    }
    if (!block.alive) break;
    if (block.at_barrier == block.alive)
      release_barrier();
    else
      fail_block("deadlock: no thread can run");
    if (block.failed) return;
  }
  if (const std::string broken = broken_red_zone(); !broken.empty())
    report("[" + symbol(block.kernel) + "] " + broken);
}

std::string refusal(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes) {
  const size_t count = size_t(threads.x) * threads.y * threads.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (!count || count > kMaxThreads || threads.z > 64) return text("%zu threads per block", count);
  if (!blocks || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    return text("grid (%u,%u,%u)", grid.x, grid.y, grid.z);
  if (shared_bytes > config.shared_max)
    return text("%zu bytes of dynamic shared memory, limit %zu", shared_bytes, config.shared_max);
  if (shared_bytes > 48 * 1024 && shared_opt_in[kernel] < shared_bytes)
    return text("%zu bytes of dynamic shared memory without cudaFuncSetAttribute", shared_bytes);
  if (translated_kernels().empty()) return "";
  const Translated& translation = translation_of(kernel);
  if (!translation.kernel) return "no PTX for this kernel";
  if (count > translation.max_threads) return "more threads than __launch_bounds__";
  return "";
}

struct Call {  // of translated PTX
  PtxKernel kernel;
  void** arguments;
};
void run_translated(void* context) {
  const Call* call = static_cast<Call*>(context);
  call->kernel(reinterpret_cast<char**>(call->arguments));
}

}  // namespace

PtxEntry::PtxEntry(const char* mangled, PtxKernel kernel, unsigned max_threads) {
  translated_kernels()[mangled] = {kernel, max_threads};
}

void launch(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes, void (*run)(void*),
            void* context, void** arguments) {
  if (const std::string why = refusal(kernel, grid, threads, shared_bytes); !why.empty())
    return report("[" + symbol(kernel) + "] invalid launch: " + why);
  if (failed()) return;  // like CUDA's sticky errors
  prepare_arena();
  prepare_fibers();
  Call call = {nullptr, arguments};
  entry = run;
  entry_context = context;
  if (!translated_kernels().empty()) {
    call.kernel = translation_of(kernel).kernel;
    entry = run_translated;
    entry_context = &call;
  }
  gridDim = grid;
  blockDim = threads;
  block.kernel = kernel;
  next_launch();
  catch_faults(true);
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  for (size_t i = 0; i < blocks && !failed(); ++i) {
    const size_t n = config.seed & 1 ? blocks - 1 - i : i;  // odd seeds: the last block first
    run_block({unsigned(n % grid.x), unsigned(n / grid.x % grid.y), unsigned(n / grid.x / grid.y)},
              shared_bytes);
  }
  catch_faults(false);
}

}  // namespace emu

using namespace emu;
extern "C" {

void emu_configure(uint64_t seed, int strict, size_t shared_max) { config = {seed, strict != 0, shared_max}; }
void emu_set_smem_optin(const void* kernel, size_t bytes) { shared_opt_in[kernel] = bytes; }

// A kernel of PTX translated with export=True.
void emu_launch_ptx(PtxKernel kernel, unsigned x, unsigned y, unsigned z, unsigned threads,
                    size_t shared_bytes, void** arguments) {
  Call call = {kernel, arguments};
  launch(reinterpret_cast<const void*>(kernel), {x, y, z}, threads, shared_bytes, run_translated, &call,
         arguments);
}

int emu_current_device() { return current_device; }
void emu_set_device(int device) { current_device = device; }
void emu_note_launch(cudaStream_t stream) { last_launch = {current_device, stream}; }
int emu_last_device() { return last_launch.device; }
void* emu_last_stream() { return last_launch.stream; }

}  // extern "C"
