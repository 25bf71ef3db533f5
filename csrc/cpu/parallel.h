// Work over threads: torch's own OpenMP pool, as many threads as torch was told to use.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/team.h"

namespace lspm::cpu {

// Calls body(thread, threads) in each of that many threads.
template <class Body>
void in_each_thread(int threads, Body body) {
  const auto call = [](void* body, int thread, int count) { (*static_cast<Body*>(body))(thread, count); };
  if (threads == 1) return call(&body, 0, 1);
  call_in_each(threads, call, &body);
}

// Below this much work, in elements, a second thread costs more than it brings, as it takes up to 90
// microseconds to wake where OpenMP's threads sleep between regions. Above it all threads are used, never a
// number between, for which OpenMP would resize the pool it shares with torch.
constexpr int64_t kSerialWork = 64 * 1024;

// What parallel_for() does. A template would compile each body twice: for one thread, and for many.
__attribute__((noinline, noclone)) inline void call_for_ranges(int64_t n, int64_t work, int threads,
                                                               void (*call)(void*, int64_t, int64_t),
                                                               void* body) {
  if (n == 0) return;
  if (threads <= 1 || n == 1 || work < kSerialWork) return call(body, 0, n);
  const auto call_for_range = [&](int64_t me, int64_t count) {
    const int64_t share = n / count, rest = n % count;
    const int64_t begin = me * share + std::min(me, rest);
    call(body, begin, begin + share + (me < rest));
  };
  in_each_thread(threads, call_for_range);
}

// Calls body(begin, end) for consecutive ranges of [0, n), one for each thread. `work` is the number of
// elements all in all.
template <class Body>
void parallel_for(int64_t n, int64_t work, int threads, Body body) {
  const auto call = [](void* body, int64_t begin, int64_t end) { (*static_cast<Body*>(body))(begin, end); };
  call_for_ranges(n, work, threads, call, &body);
}

// The same in several calls: who is free takes a part of what is left, of `least` elements or more, so that
// threads end together where one has less of its processor or of memory than another.
template <class Body>
void parallel_share(int64_t n, int64_t work, int64_t least, int threads, Body body) {
  if (n == 0) return;
  if (threads <= 1 || n <= least || work < kSerialWork) return body(0, n);
  std::atomic<int64_t> taken{0};
  in_each_thread(threads, [&](int, int count) {
    int64_t begin = taken;
    while (begin < n) {
      const int64_t end = std::min(n, begin + std::max(least, (n - begin) / (2 * count)));
      if (!taken.compare_exchange_weak(begin, end)) continue;
      body(begin, end);
      begin = taken;
    }
  });
}

// For items of unequal cost: calls body(next, thread) once in each thread, and next() hands out 0, 1, 2, ...
// to whoever is free, n or more when there is none left. `work` as above.
template <class Body>
void parallel_claim(int64_t n, int64_t work, int threads, Body body) {
  std::atomic<int64_t> claimed{0};
  const auto next = [&] { return claimed.fetch_add(1, std::memory_order_relaxed); };
  if (n == 0) return;
  const bool alone = threads <= 1 || n == 1 || work < kSerialWork;
  in_each_thread(alone ? 1 : threads, [&](int thread, int) { body(next, thread); });
}

// Keeps the smallest of the places that threads report, or -1.
class First {
 public:
  void report(int64_t place) {
    int64_t seen = place_.load(std::memory_order_relaxed);
    while (uint64_t(place) < uint64_t(seen) && !place_.compare_exchange_weak(seen, place)) {
    }
  }
  int64_t get() const { return place_.load(); }

 private:
  std::atomic<int64_t> place_{-1};
};

// Turns that threads take at what they share, each thing with turns of its own.
struct Turns {
  std::vector<std::atomic<int64_t>> turns;
  explicit Turns(int64_t n) : turns(n) {}
  void wait(int64_t i, int64_t turn) const {
    while (turns[i].load(std::memory_order_acquire) != turn) std::this_thread::yield();
  }
  void pass(int64_t i, int64_t turn) { turns[i].store(turn + 1, std::memory_order_release); }
};

}  // namespace lspm::cpu
