// Stochastic gradient descent on a factorisation, as latin_square.cuh goes through a square's blocks.
//
// A rating's two rows are in registers. Bytes of a rating: 4 s for each factor of s bytes, 16 to 20 for the
// rating, and 8 for each bias and sum of squares.
#include "../mf_sgd.h"
#include "../random_bits.h"
#include "latin_square.cuh"

namespace lspm::cuda {
namespace {

template <class R>
struct MfSgdJob {
  using T = typename R::Element;
  struct Pair {
    int32_t user = -1, item = -1;
    float rating = 0.0f, weight = 0.0f;
  };
  struct Rows {
    R user, item;
  };
  const Table<T>&users, &items;
  const MfSgdRatings& of;
  const MfSgdStep& step;

  __device__ __forceinline__ Pair pair(int64_t j) const {
    Pair pair;
    const int32_t user = of.users[j], item = of.items[j];
    if (!users.has(user) || !items.has(item)) return pair;
    pair.user = user;
    pair.item = item;
    pair.rating = of.ratings[j];
    pair.weight = of.weights ? of.weights[j] : 1.0f;
    return pair;
  }
  __device__ __forceinline__ void fetch(const Pair& pair) const {
    users.fetch(pair.user);
    items.fetch(pair.item);
  }
  __device__ __forceinline__ void load(Rows& rows, const Pair& pair, const Pair& before) const {
    if (pair.user < 0) return;
    if (pair.user != before.user) rows.user.load(users, pair.user);
    if (pair.item != before.item) rows.item.load(items, pair.item);
  }
  __device__ __forceinline__ void keep(Rows& rows, const Pair& pair, const Pair& before,
                                       const Rows& from) const {
    if (pair.user == before.user) rows.user = from.user;
    if (pair.item == before.item) rows.item = from.item;
  }

  // lr over the root of the row's sum of squares, as the first lane has it.
  __device__ __forceinline__ float rate(const R& row) const {
    const float own = row.squares > 0.0f ? step.lr / sqrtf(row.squares) : step.lr;
    return __shfl_sync(kAllLanes, own, 0);
  }
  __device__ __forceinline__ float bounded(float v, float shrink) const {
    if (shrink > 0.0f) v = v > shrink ? v - shrink : v < -shrink ? v + shrink : v == v ? 0.0f : v;
    return step.nonnegative && v < 0.0f ? 0.0f : v;
  }
  __device__ __forceinline__ static float rounded(float v, uint32_t bits) {
    const uint32_t exact = __float_as_uint(v);
    const uint32_t kept = v - v == v - v ? exact + bits : exact;  // what is not finite stays so
    return __uint_as_float(kept & 0xffff0000u);
  }

  // Rating j, whose loss it returns.
  __device__ __forceinline__ double update(int64_t j, const Pair& pair, Rows& rows) const {
    R &p = rows.user, &q = rows.item;
    const int factors = users.cols;
    // The score, less the rating where only that is asked for: what is small is rounded less.
    float score = 0.0f;
    if (first_lane()) score = (step.logistic ? step.mean : step.mean - pair.rating) + p.bias + q.bias;
    R::for_each_factor(factors, [&](int n, int) { score += p[n] * q[n]; });
    score = warp_sum(score);
    double loss = double(score) * score;
    float error = -score;
    if (step.logistic) {
      // log(1 + exp(score)) - rating * score, without an overflow.
      loss = fmaxf(score, 0.0f) - pair.rating * score + log1pf(__expf(-fabsf(score)));
      error = pair.rating - 1.0f / (1.0f + __expf(-score));
    }
    const float e = pair.weight * error;
    float lr_user = step.lr, lr_item = step.lr;
    if (users.squares) {
      float2 squares{0.0f, 0.0f};
      R::for_each_factor(factors, [&](int n, int) {
        const float user = e * q[n] - step.l2_user * p[n], item = e * p[n] - step.l2_item * q[n];
        squares.x += user * user;
        squares.y += item * item;
      });
      squares = warp_sum(squares);
      p.squares += squares.x / factors;
      q.squares += squares.y / factors;
      lr_user = rate(p);
      lr_item = rate(q);
    }
    const uint32_t bits = uint32_t(random_bits(step.seed, j) >> 32);
    R::for_each_factor(factors, [&](int n, int k) {
      // p + (to q - shrink p), as p times a rounded 1 - shrink would drift.
      const float user = p[n], item = q[n];
      float new_user = user + (lr_user * e * item - lr_user * step.l2_user * user);
      float new_item = item + (lr_item * e * user - lr_item * step.l2_item * item);
      new_user = bounded(new_user, lr_user * step.l1_user);
      new_item = bounded(new_item, lr_item * step.l1_item);
      if constexpr (std::is_same<T, bf16>::value) {
        const auto random = row_bits(bits + uint32_t(k) * kBitsApart);
        new_user = rounded(new_user, random.user);
        new_item = rounded(new_item, random.item);
      }
      p.set(n, new_user);
      q.set(n, new_item);
    });
    if (users.bias) p.bias += step.lr_bias * (e - step.l2_user_bias * p.bias);
    if (items.bias) q.bias += step.lr_bias * (e - step.l2_item_bias * q.bias);
    p.store(users, pair.user);
    q.store(items, pair.item);
    return pair.weight * loss;
  }
};

template <class R>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mf_sgd_kernel(const Table<typename R::Element> users, const Table<typename R::Element> items,
                  const MfSgdRatings of, float* loss, const MfSgdShape s, const MfSgdStep by, int64_t step) {
  const Block block(of.offsets, s.grid, step, s.ratings);
  if (block.part >= s.grid) return;
  const MfSgdJob<R> job{users, items, of, by};
  double total = 0.0;
  for_each_pair(job, block,
                [&](int64_t j, const auto& pair, auto& rows) { total += job.update(j, pair, rows); });
  if (first_lane()) loss[block.index] = float(total);
}

template <class T>
void run(const MfSgdTables& t, const MfSgdRatings& of, float* loss, const MfSgdShape& s,
         const MfSgdStep& step, int device, void* stream) {
  const bool aligned = aligned_for_vectors(t.user_factors, t.item_factors);
  with_row<T>("mf_sgd_update", s.factors, aligned, [&](auto row) {
    const Table<T> users{static_cast<T*>(t.user_factors), t.user_bias, t.user_squares, s.users,
                         int(s.factors)};
    const Table<T> items{static_cast<T*>(t.item_factors), t.item_bias, t.item_squares, s.items,
                         int(s.factors)};
    const DeviceGuard guard(device);
    launch_steps(s.grid, stream, mf_sgd_kernel<decltype(row)>, users, items, of, loss, s, step);
  });
}

}  // namespace

void mf_sgd_update(const MfSgdTables& tables, const MfSgdRatings& of, float* loss, const MfSgdShape& s,
                   const MfSgdStep& step, int device, void* stream) {
  if (s.dtype != DType::f32 && s.dtype != DType::bf16)
    throw std::invalid_argument("mf_sgd_update: dtype must be f32 or bf16, got " +
                                std::to_string(int(s.dtype)));
  const auto run_of = s.dtype == DType::f32 ? run<float> : run<bf16>;
  run_of(tables, of, loss, s, step, device, stream);
}

}  // namespace lspm::cuda
