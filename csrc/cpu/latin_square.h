// What the updates of two tables by pairs of their rows share: who does which pairs when, and loops over a
// row.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace lspm::cpu {

// Calls body(block) for the grid * grid blocks of a Latin square, of which block s * grid + i has the users
// of part i and the items of part (i + s) % grid. A thread takes one after the other and waits until those
// before it in its row and in its column are done (the schedule of Gemulla et al., "Large-scale matrix
// factorization with distributed stochastic gradient descent", 2011, without a barrier): two threads never
// change the same row, and the bits are those of one thread.
template <class Body>
void for_each_block(int64_t grid, int64_t work, int threads, Body body) {
  Turns users(grid), items(grid);
  const int64_t blocks = grid * grid;
  parallel_claim(blocks, work, threads, [&](auto next, int) {
    for (int64_t b; (b = next()) < blocks;) {
      const int64_t turn = b / grid, user = b % grid, item = (user + turn) % grid;
      users.wait(user, turn);
      items.wait(item, turn);
      body(b);
      users.pass(user, turn);
      items.pass(item, turn);
    }
  });
}

// Calls update(j) for the pairs [begin, end), in order, and fetch(j) some pairs before.
template <class Fetch, class Update>
void for_each_pair_of_rows(int64_t begin, int64_t end, Fetch fetch, Update update) {
  constexpr int64_t kAhead = 12;
  for (int64_t j = begin; j < std::min(begin + kAhead, end); ++j) fetch(j);
  for (int64_t j = begin; j < end; ++j) {
    if (j + kAhead < end) fetch(j + kAhead);
    update(j);
  }
}

template <class T>
void fetch_row(const T* row, int64_t factors) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < factors * int64_t(sizeof(T)); at += 64) prefetch(bytes + at);
}

// Calls body(k, lanes) for the vectors of a row: kVectors of them, or where that is 0 as many as it takes.
template <int kVectors, class Body>
inline __attribute__((always_inline)) void for_each_factor(int64_t factors, Body body) {
  if constexpr (kVectors) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) body(int64_t(v * kLanes), AllLanes{});
  } else {
    for_each_vector(factors, body);
  }
}

}  // namespace lspm::cpu
