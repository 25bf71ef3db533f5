// What the updates of two tables by pairs of their rows share: who does which pairs when, and loops over a
// row.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/parallel.h"

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

// A block's pairs, sorted by user and cut into so many runs, lie like cards dealt from the runs in turn: a
// user's row is then read from the nearest cache, and yet no pair waits for the one before it, as it is
// another user's. 4 to 16 measured alike; 1 takes twice as long.
constexpr int64_t kHands = 8;

// Whether a block's rows of either table are more than a core's own caches hold.
inline bool outgrow_caches(int64_t rows, int64_t factors, int64_t size, int64_t grid) {
  constexpr int64_t kCache = 1 << 19;
  return rows * factors * size > kCache * grid;
}

// Calls update(j) for the pairs [begin, end), in order, and where fetching some pairs before fetch_item(j),
// and fetch_user(j) for those whose user is another than that of the hand's pair before.
template <class FetchUser, class FetchItem, class Update>
void for_each_pair_of_rows(const int32_t* users, int64_t begin, int64_t end, bool fetching,
                           FetchUser fetch_user, FetchItem fetch_item, Update update) {
  constexpr int64_t kUsersAhead = 32, kItemsAhead = 12;
  for (int64_t j = begin; j < end; ++j) {
    if (fetching) {
      const int64_t u = j + kUsersAhead, i = j + kItemsAhead;
      if (u < end && users[u] != users[u - kHands]) fetch_user(u);
      if (i < end) fetch_item(i);
    }
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

// The sum of product(k, lanes) over the vectors of a row: four sums, as what follows waits for it.
template <int kVectors, class Product>
inline __attribute__((always_inline)) float sum_over_factors(int64_t factors, Product product) {
  const int64_t n = kVectors ? kVectors * kLanes : factors;
  const AllLanes all;
  F first{}, second{}, third{}, fourth{};
  int64_t k = 0;
#pragma GCC unroll 2
  for (; k + 4 * kLanes <= n; k += 4 * kLanes) {
    first += product(k, all);
    second += product(k + kLanes, all);
    third += product(k + 2 * kLanes, all);
    fourth += product(k + 3 * kLanes, all);
  }
#pragma GCC unroll 3
  for (; k + kLanes <= n; k += kLanes) first += product(k, all);
  if (k < n) second += product(k, FirstLanes{int(n - k)});
  return sum((first + second) + (third + fourth));
}

}  // namespace lspm::cpu
