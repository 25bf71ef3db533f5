#include "cpu/team.h"

#include <omp.h>

#include <exception>
#include <thread>

namespace lspm::cpu {
namespace {

constexpr int kSpins = 4096;  // some 100 microseconds; after it others may have the processor

template <class Done>
void wait_until(Done done) {
  for (int i = 0; !done(); ++i) {
    if (i >= kSpins) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

}  // namespace

void Team::call(InEachThread call, void* body) {
  call_ = call, body_ = body;
  busy_.store(threads_ - 1, std::memory_order_relaxed);
  posted_.fetch_add(1, std::memory_order_release);
  if (call) call(body, 0, threads_);
  wait_until([&] { return busy_.load(std::memory_order_acquire) == 0; });
}

void Team::follow(int thread) {
  for (uint64_t next = 1;; ++next) {
    wait_until([&] { return posted_.load(std::memory_order_acquire) == next; });
    const InEachThread call = call_;
    if (call) call(body_, thread, threads_);
    busy_.fetch_sub(1, std::memory_order_release);
    if (!call) return;
  }
}

void Team::run(int threads, const std::function<void()>& main) {
  if (threads <= 1 || mine) return main();
  Team team;
  std::exception_ptr thrown;  // none may leave a parallel region
#pragma omp parallel num_threads(threads)
  if (omp_get_thread_num() == 0) {
    team.threads_ = omp_get_num_threads();
    mine = &team;
    try {
      main();
    } catch (...) {
      thrown = std::current_exception();
    }
    mine = nullptr;
    team.call(nullptr, nullptr);
  } else {
    team.follow(omp_get_thread_num());
  }
  if (thrown) std::rethrow_exception(thrown);
}

void call_in_each(int threads, InEachThread call, void* body) {
  if (Team* team = Team::mine; team && team->threads() == threads) return team->call(call, body);
#pragma omp parallel num_threads(threads)
  call(body, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace lspm::cpu
