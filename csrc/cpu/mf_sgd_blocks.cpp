// Sorts ratings into the blocks of a Latin square and, within a block, deals them from kHands hands.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/latin_square.h"
#include "cpu/parallel.h"
#include "mf_sgd.h"

namespace lspm::cpu {
namespace {

// The block's ratings in the order of their users, dealt into the same places.
struct Dealer {
  std::vector<std::pair<int32_t, int32_t>> order;  // user, place within the block
  std::vector<int64_t> dealt;

  void sort(const int32_t* users, int64_t n) {
    order.resize(n);
    dealt.resize(n);
    for (int64_t j = 0; j < n; ++j) order[j] = {users[j], int32_t(j)};
    std::sort(order.begin(), order.end());
    const int64_t each = n / kHands, rest = n % kHands;
    for (int64_t hand = 0, next = 0; hand < kHands; ++hand)
      for (int64_t card = 0; card < each + (hand < rest); ++card)
        dealt[card * kHands + hand] = order[next++].second;
  }

  template <class T>
  void deal(T* of, std::vector<T>& room) const {
    if (!of) return;
    room.assign(of, of + dealt.size());
    for (size_t j = 0; j < dealt.size(); ++j) of[j] = room[dealt[j]];
  }
};

}  // namespace

void mf_sgd_blocks(const MfSgdRatings& from, const uint8_t* user_part, const uint8_t* item_part,
                   int32_t* users, int32_t* items, float* ratings, float* weights, int64_t* offsets,
                   int64_t n, int64_t grid, int threads) {
  const int64_t blocks = grid * grid, runs = std::max(1, threads), run = (n + runs - 1) / runs;
  const auto block_of = [&](int64_t j) {
    const int64_t user = user_part[from.users[j]], item = item_part[from.items[j]];
    return (item + grid - user) % grid * grid + user;
  };
  // next[b][r]: where the next rating of block b goes that is in the r-th run of what is given, so that the
  // order is the same for any number of runs.
  std::vector<int64_t> next(blocks * runs);
  const auto for_each_run = [&](auto body) {
    parallel_for(runs, n, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t j = r * run; j < std::min(n, (r + 1) * run); ++j) body(j, next[block_of(j) * runs + r]);
    });
  };
  for_each_run([](int64_t, int64_t& count) { ++count; });
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    offsets[b] = total;
    for (int64_t r = 0; r < runs; ++r) total += std::exchange(next[b * runs + r], total);
    if (total - offsets[b] > std::numeric_limits<int32_t>::max())  // Dealer's places have 32 bits
      throw std::invalid_argument("rating_blocks: grid must part ratings into fewer than 2 ** 31, got " +
                                  std::to_string(grid) + " with a block of " +
                                  std::to_string(total - offsets[b]));
  }
  offsets[blocks] = total;
  for_each_run([&](int64_t j, int64_t& place) {
    const int64_t to = place++;
    users[to] = from.users[j];
    items[to] = from.items[j];
    ratings[to] = from.ratings[j];
    if (weights) weights[to] = from.weights[j];
  });
  parallel_claim(blocks, n, threads, [&](auto claim, int) {
    Dealer dealer;
    std::vector<int32_t> ids;
    std::vector<float> values;
    for (int64_t b; (b = claim()) < blocks;) {
      const int64_t at = offsets[b];
      dealer.sort(users + at, offsets[b + 1] - at);
      dealer.deal(users + at, ids);
      dealer.deal(items + at, ids);
      dealer.deal(ratings + at, values);
      dealer.deal(weights ? weights + at : nullptr, values);
    }
  });
}

}  // namespace lspm::cpu
