// Bayesian personalised ranking, as latin_square.cuh goes through a square's blocks.
//
// A pair's three rows are in registers. Which item a pair is against does not depend on the tables: the lane
// that looks a pair up draws it, so that 32 pairs search what their users have seen at once. Bytes of a pair:
// 24 for each factor, 8 for the pair, and 16 for two biases.
#include "../bpr.h"
#include "../random_bits.h"
#include "latin_square.cuh"

namespace lspm::cuda {
namespace {

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

template <class R>
struct BprJob {
  struct Pair {
    int32_t user = -1, item = -1, other = -1;
  };
  struct Rows {
    R user, item, other;
  };
  const Table<float>&users, &items;
  const BprPairs& of;
  const BprShape& shape;
  const BprStep& step;
  int64_t first, size;  // of the part's items in part_items
  unsigned skipped;

  __device__ BprJob(const Table<float>& users, const Table<float>& items, const BprPairs& of,
                    const BprShape& shape, const BprStep& step, int64_t part)
      : users(users), items(items), of(of), shape(shape), step(step), skipped(0) {
    first = clamped(of.part_offsets[part], 0, shape.placed);
    size = clamped(of.part_offsets[part + 1], first, shape.placed) - first;
  }

  __device__ __forceinline__ bool has_seen(int32_t user, int32_t item) const {
    if (!of.seen) return false;
    int64_t begin = clamped(of.seen_indptr[user], 0, shape.seen);
    const int64_t end = clamped(of.seen_indptr[user + 1], begin, shape.seen);
    for (int64_t above = end; begin < above;) {
      const int64_t middle = (begin + above) / 2;
      if (of.seen[middle] < item)
        begin = middle + 1;
      else
        above = middle;
    }
    return begin < end && of.seen[begin] == item;
  }

  // The pair with an item of the part that is not its own and that its user has not seen.
  __device__ __forceinline__ Pair pair(int64_t j) {
    Pair pair;
    const int32_t user = of.users[j], item = of.items[j];
    if (!users.has(user) || !items.has(item)) return pair;
    for (int64_t attempt = 0; attempt < kBprDraws && size > 0; ++attempt) {
      const int32_t other = of.part_items[first + random_below(size, step.seed, j * kBprDraws + attempt)];
      if (other == item || !items.has(other) || has_seen(user, other)) continue;
      pair.user = user;
      pair.item = item;
      pair.other = other;
      return pair;
    }
    ++skipped;
    return pair;
  }
  __device__ __forceinline__ void fetch(const Pair& pair) const {
    users.fetch(pair.user);
    items.fetch(pair.item);
    items.fetch(pair.other);
  }

  __device__ __forceinline__ void load(Rows& rows, const Pair& pair, const Pair& before) const {
    if (pair.user < 0) return;
    const auto had = [&](int32_t id) { return id == before.item || id == before.other; };
    if (pair.user != before.user) rows.user.load(users, pair.user);
    if (!had(pair.item)) rows.item.load(items, pair.item);
    if (!had(pair.other)) rows.other.load(items, pair.other);
  }
  __device__ __forceinline__ void keep(Rows& rows, const Pair& pair, const Pair& before,
                                       const Rows& from) const {
    const auto keep_item = [&](R& row, int32_t id) {
      if (id == before.item) row = from.item;
      if (id == before.other) row = from.other;
    };
    if (pair.user == before.user) rows.user = from.user;
    keep_item(rows.item, pair.item);
    keep_item(rows.other, pair.other);
  }

  // A pair, whose loss it returns.
  __device__ __forceinline__ float update(const Pair& pair, Rows& rows) const {
    R &p = rows.user, &q = rows.item, &r = rows.other;
    float x = first_lane() ? q.bias - r.bias : 0.0f;
    R::for_each_factor(users.cols, [&](int n, int) { x += p[n] * (q[n] - r[n]); });
    x = warp_sum(x);
    const float g = step.lr / (1.0f + __expf(x));
    const float shrink_user = step.lr * step.l2_user, shrink_item = step.lr * step.l2_item;
    R::for_each_factor(users.cols, [&](int n, int) {
      const float u = p[n], i = q[n], j = r[n];
      p.set(n, u + (g * (i - j) - shrink_user * u));
      q.set(n, i + (g * u - shrink_item * i));
      r.set(n, j - (g * u + shrink_item * j));
    });
    if (items.bias) {
      const float shrink = step.lr * step.l2_bias;
      q.bias += g - shrink * q.bias;
      r.bias -= g + shrink * r.bias;
    }
    p.store(users, pair.user);
    q.store(items, pair.item);
    r.store(items, pair.other);
    return fmaxf(-x, 0.0f) + log1pf(__expf(-fabsf(x)));
  }
};

template <class R>
__global__ void __launch_bounds__(kThreads, kBlocks)
    bpr_kernel(const Table<float> users, const Table<float> items, const BprPairs of, float* loss,
               int32_t* skipped, const BprShape s, const BprStep by, int64_t step) {
  const Block block(of.offsets, s.grid, step, s.pairs);
  if (block.part >= s.grid) return;
  BprJob<R> job(users, items, of, s, by, (block.part + step) % s.grid);
  double total = 0.0;
  for_each_pair(job, block, [&](int64_t, const auto& pair, auto& rows) { total += job.update(pair, rows); });
  const unsigned without = __reduce_add_sync(kAllLanes, job.skipped);
  if (!first_lane()) return;
  loss[block.index] = float(total);
  skipped[block.index] = int32_t(without);
}

}  // namespace

void bpr_update(float* user_factors, float* item_factors, float* item_bias, const BprPairs& of, float* loss,
                int32_t* skipped, const BprShape& s, const BprStep& step, int device, void* stream) {
  with_row<float>("bpr_update", s.factors, aligned_for_vectors(user_factors, item_factors), [&](auto row) {
    const Table<float> users{user_factors, nullptr, nullptr, s.users, int(s.factors)};
    const Table<float> items{item_factors, item_bias, nullptr, s.items, int(s.factors)};
    const DeviceGuard guard(device);
    launch_steps(s.grid, stream, bpr_kernel<decltype(row)>, users, items, of, loss, skipped, s, step);
  });
}

}  // namespace lspm::cuda
