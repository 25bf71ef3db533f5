#include "cpu/team.h"

#include <omp.h>
#include <pthread.h>

#include <exception>

namespace lspm::cpu {

constexpr int kSpins = 512;  // 10 to 25 microseconds: on processors that others use too, more do harm

// A child of fork has none of OpenMP's threads, for which a region would wait.
static bool is_forked = false;
static const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

template <class Done>
void Team::wait_until(Done done) {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  ++sleeping_;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, done);
  }
  --sleeping_;
}

void Team::wake() {
  if (sleeping_ == 0) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
  }  // who found it undone sleeps by now
  changed_.notify_all();
}

void Team::call(InEachThread call, void* body) {
  call_ = call, body_ = body;
  busy_ = threads_ - 1;
  ++posted_;
  wake();
  std::exception_ptr thrown;  // once no other thread works at body any more
  try {
    if (call) call(body, 0, threads_);
  } catch (...) {
    thrown = std::current_exception();
  }
  wait_until([&] { return busy_ == 0; });
  if (thrown) std::rethrow_exception(thrown);
}

void Team::follow(int thread) {
  for (uint64_t next = 1;; ++next) {
    wait_until([&] { return posted_ == next; });
    const InEachThread call = call_;
    if (call) call(body_, thread, threads_);
    if (--busy_ == 0) wake();
    if (!call) return;
  }
}

void Team::run(int threads, const std::function<void()>& main) {
  if (threads <= 1 || mine || is_forked) return main();
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
