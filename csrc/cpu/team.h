// A team: the threads of one parallel region, which wait in it for one loop after the other. To begin a
// region wakes threads that sleep, by up to 90 microseconds each time; a loop in a team takes less than one,
// if it comes soon: a thread that waits long sleeps too, as it may keep another from what it waits for.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>

namespace lspm::cpu {

using InEachThread = void (*)(void* body, int thread, int threads);

class Team {
 public:
  // Calls main() in this thread, for which meanwhile a team waits; what main throws is thrown again.
  static void run(int threads, const std::function<void()>& main);

  int threads() const { return threads_; }
  void call(InEachThread call, void* body);

  static inline thread_local Team* mine = nullptr;  // that waits for this thread

 private:
  void follow(int thread);
  template <class Done>
  void wait_until(Done done);
  void wake();  // those that sleep, behind what they wait for

  InEachThread call_ = nullptr;  // the loop's; null at the end
  void* body_ = nullptr;
  int threads_ = 1;
  alignas(64) std::atomic<uint64_t> posted_{0};  // loops so far
  alignas(64) std::atomic<int> busy_{0};         // threads that have not done the last one yet
  alignas(64) std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Calls call(body, thread, threads) in each of that many threads, or of as many as OpenMP has.
void call_in_each(int threads, InEachThread call, void* body);

}  // namespace lspm::cpu
