// Tokens drawn from logits: thresholds are found by bisection and by what passes the best so far, never by
// sorting.
//
// A thread owns a row. A first pass finds its largest score; with top-k, a second one keeps those that pass
// the k-th best of the scores so far, which few do. A third writes weights, of what passed only. Thresholds
// are found by bisecting the bits of numbers; each step leaves only those whose side is not known, so that
// all steps together read about twice as much as the first one. The draw needs sums of blocks, and of one
// block its weights. Beside its results that takes a thread 8 bytes a token, and with top-k 8 k. Floor:
// reading the logits once, and an exp of each that top-k leaves.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/exact.h"
#include "cpu/parallel.h"
#include "cpu/random_rounding.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kBlock = 512;  // tokens that are summed in 32 bits: at most 2 ** 31 in a lane of four
constexpr uint32_t kAll = (1u << kLanes) - 1;
constexpr float kNone = 0x1p-41f;  // below every weight but 0
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Numbers as integers of the same order, and back; those between two numbers are numbers.
int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
float float_of(int32_t key) {
  const int32_t bits = key < 0 ? key ^ 0x7fffffff : key;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint64_t units_of(float w) { return uint64_t(w * 0x1p40f); }

// The sum of units of at most kBlock weights: 24 bits before the point and 16 behind it.
class Units {
 public:
  void add(F w) {
    const F scaled = w * 0x1p24f;
    const I high = __builtin_convertvector(scaled, I);
    const F rest = scaled - __builtin_convertvector(high, F);
    high_ += reinterpret_cast<U>(high);
    low_ += reinterpret_cast<U>(__builtin_convertvector(rest * 0x1p16f, I));
  }
  uint64_t total() const {
    uint64_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += (uint64_t(high_[i]) << 16) + low_[i];
    return total;
  }

 private:
  U high_{}, low_{};
};

// Of v[0, n), whole vectors, the units of the weights above `low`.
uint64_t units_above(const float* v, int64_t n, float low) {
  const F limit = broadcast(low);
  uint64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Units units;
    for (int64_t i = begin; i < std::min(begin + kBlock, n); i += kLanes) {
      const F w = load(v + i);
      units.add(w > limit ? w : F{});
    }
    total += units.total();
  }
  return total;
}

// How many they are.
uint64_t count_above(const float* v, int64_t n, float low) {
  uint64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes)
    count += __builtin_popcount(not_at_most(load(v + i), broadcast(low)));
  return count;
}

// Copies those above `low` and up to `high`, and -infinity to a whole vector; `kept` may be v itself. Returns
// how many they are.
int64_t copy_between(const float* v, int64_t n, float low, float high, float* kept) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F x = load(v + i);
    const uint32_t inside = not_at_most(x, broadcast(low)) & ~not_at_most(x, broadcast(high));
    if (inside) count += store_some(kept + count, x, inside);
  }
  store(kept + count, broadcast(-kInfinity));
  return count;
}

int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The least number from (low, high] that those of v[0, n) above it measure less than `needed`; `above` is one
// of the two functions. Each step leaves in `active` only those whose side it is not known.
template <class Above>
float bisect(const float* v, int64_t n, int32_t low, int32_t high, uint64_t needed, Above above,
             float* active) {
  uint64_t passed = 0;
  while (int64_t{high} - low > 1 && n > 0) {
    const int32_t middle = int32_t((int64_t{low} + high) >> 1);
    const uint64_t more = passed + above(v, n, float_of(middle));
    if (more >= needed)
      low = middle;
    else
      high = middle, passed = more;
    n = whole_vectors(copy_between(v, n, float_of(low), float_of(high), active));
    v = active;
  }
  return float_of(high);
}

// total * share / 2 ** 62, rounded down; total has 61 bits.
uint64_t part_of(uint64_t total, uint64_t share) { return uint64_t((unsigned __int128)total * share >> 62); }

template <class T>
class Sampler {
 public:
  Sampler(const SampleShape& s, const SampleOptions& o)
      : s_(s),
        o_(o),
        padded_((s.tokens + kBlock - 1) / kBlock * kBlock),
        sums_(padded_ / kBlock),
        room_(o.top_k < s.tokens ? o.top_k + std::max<int64_t>(o.top_k, 256) : 0),
        weights_(new float[padded_ + kLanes]),
        active_(new float[std::max(padded_, room_) + 2 * kLanes]),
        best_(room_ ? new float[room_ + 2 * kLanes] : nullptr) {}

  // The token that a row draws, or -1; and the log of its probability, where that is wanted.
  template <class Logit>
  int64_t draw(const Logit* x, int64_t row, float temperature, float* log_probability) {
    const float largest = largest_of(x);
    if (log_probability) *log_probability = std::numeric_limits<float>::quiet_NaN();
    if (!(std::fabs(largest) < kInfinity) || !(temperature >= 0)) return -1;
    if (temperature == 0) {
      if (log_probability) *log_probability = 0;
      return first_of(x, largest);
    }
    const float inverse = 1 / std::clamp(temperature, 0x1p-126f, 0x1p126f);
    weigh(x, largest, inverse, room_ ? kth_largest(x, largest) : -kInfinity);
    float least = kNone;
    if (o_.top_p < 1) {
      const uint64_t needed =
          part_of(units_above(weights_.get(), padded_, least), uint64_t(o_.top_p * 0x1p62));
      least = bisect(weights_.get(), padded_, key_of(kNone), key_of(1.0f), std::max<uint64_t>(needed, 1),
                     units_above, active_.get());
    }
    least = std::max(least, o_.min_p);
    uint64_t total = 0;
    if (!o_.gumbel || log_probability) total = sum(least);
    const int64_t drawn = o_.gumbel ? race(row, least) : inverse_transform(row, least, total);
    if (log_probability)
      *log_probability = float(std::log(double(units_of(weights_[drawn])) / double(total)));
    return drawn;
  }

  // Scores where tokens of a row have come before: a copy of its logits, with the penalty.
  const float* penalised(const T* x, const int64_t* previous) {
    if (!scores_) scores_.reset(new float[s_.tokens]);
    for_each_vector(s_.tokens, [&](int64_t i, auto lanes) { lanes.store(&scores_[i], lanes.load(x + i)); });
    for (const int64_t* token = previous; token < previous + s_.previous; ++token) {
      if (*token < 0) continue;
      const float v = to_float(x[*token]);
      scores_[*token] = v < 0 ? v * o_.penalty : v / o_.penalty;
    }
    return scores_.get();
  }

 private:
  // NaN or infinity where a score is.
  template <class Logit>
  float largest_of(const Logit* x) const {
    const F most = broadcast(std::numeric_limits<float>::max()), least = broadcast(-kInfinity);
    F top = least;
    uint32_t broken = 0;
    for_each_vector(s_.tokens, [&](int64_t i, auto lanes) {
      F v = lanes.load(x + i);
      if constexpr (!std::is_same_v<decltype(lanes), AllLanes>) v = first_lanes(v, lanes.n, least);
      broken |= not_at_most(v, most);
      top = max(v, top);
    });
    return broken ? kInfinity : max(top);
  }

  template <class Logit>
  int64_t first_of(const Logit* x, float score) const {
    int64_t i = 0;
    while (i + kLanes <= s_.tokens && not_at_most(broadcast(score), load(x + i)) == kAll) i += kLanes;
    while (to_float(x[i]) != score) ++i;
    return i;
  }

  template <class Logit>
  float kth_largest(const Logit* x, float largest) {
    float *const best = best_.get(), least = std::numeric_limits<float>::quiet_NaN();  // all pass
    int64_t count = 0;
    const auto pick = [&] {
      std::fill(best + count, best + whole_vectors(count), -kInfinity);
      least = bisect(best, whole_vectors(count), key_of(-kInfinity) - 1, key_of(largest), o_.top_k,
                     count_above, active_.get());
      const int64_t above = copy_between(best, whole_vectors(count), least, kInfinity, best);
      std::fill(best + above, best + o_.top_k, least);
      count = o_.top_k;
    };
    for_each_vector(s_.tokens, [&](int64_t i, auto lanes) {
      const F v = lanes.load(x + i);
      uint32_t passing = not_at_most(v, broadcast(least));
      if constexpr (!std::is_same_v<decltype(lanes), AllLanes>) passing &= (1u << lanes.n) - 1;
      if (__builtin_expect(passing == 0, 1)) return;
      count += store_some(best + count, v, passing);
      if (count >= room_) pick();
    });
    pick();
    return least;
  }

  // Weights, 0 of scores below `least`.
  template <class Logit>
  void weigh(const Logit* x, float largest, float inverse, float least) {
    const F limit = broadcast(least), zero{};
    const bool all = least == -kInfinity;
    for_each_vector(s_.tokens, [&](int64_t i, auto lanes) {
      const F v = lanes.load(x + i);
      const bool none = !all && not_at_most(limit, v) == kAll;
      store(&weights_[i], none ? zero : lanes.keep(v >= limit ? exact_exp((v - largest) * inverse) : zero));
    });
    std::fill(&weights_[s_.tokens], &weights_[padded_], 0.0f);
  }

  // The units of the weights from `least` on, and of each block of them.
  uint64_t sum(float least) {
    uint64_t total = 0;
    const float below = float_of(key_of(least) - 1);
    for (int64_t b = 0; b < padded_ / kBlock; ++b)
      total += sums_[b] = units_above(&weights_[b * kBlock], kBlock, below);
    return total;
  }

  int64_t inverse_transform(int64_t row, float least, uint64_t total) const {
    U x[4] = {{}, U{} + uint32_t(row), U{} + uint32_t(uint64_t(row) >> 32), {}};
    philox(o_.seed, x);
    uint64_t place = part_of(total, uint64_t(x[0][0] >> 1) << 31 | x[1][0] >> 1);
    int64_t block = 0;
    for (; place >= sums_[block]; ++block) place -= sums_[block];
    for (int64_t i = block * kBlock;; ++i) {
      const uint64_t units = weights_[i] >= least ? units_of(weights_[i]) : 0;
      if (place < units) return i;
      place -= units;
    }
  }

  // Weights over exponential numbers: the largest quotient is each token's with its own probability.
  int64_t race(int64_t row, float least) const {
    constexpr int64_t kDrawn = 64;  // by counters of their own
    F best{};
    U winner{};
    for (int64_t begin = 0; begin < padded_; begin += kDrawn) {
      uint32_t any = 0;
      for (int64_t i = begin; i < begin + kDrawn; i += kLanes)
        any |= ~not_at_most(broadcast(least), load(&weights_[i])) & kAll;
      if (!any) continue;
      for_each_word(o_.seed, row, begin, begin + kDrawn, [&](int64_t i, U word, auto) {
        const F w = load(&weights_[i]), quotient = (w >= least ? w : F{}) / exact_exponential(word);
        const auto better = quotient > best;
        winner = better ? U{} + uint32_t(i) : winner;  // of the vector: a lane adds its own number
        best = better ? quotient : best;
      });
    }
    int64_t token = s_.tokens;
    const float most = max(best);
    for (int i = 0; i < kLanes; ++i)
      if (best[i] == most) token = std::min<int64_t>(token, winner[i] + i);
    return token;
  }

  const SampleShape& s_;
  const SampleOptions& o_;
  const int64_t padded_;
  std::vector<uint64_t> sums_;
  const int64_t room_;
  std::unique_ptr<float[]> weights_, active_, best_, scores_;
};

void check(const int64_t* previous, const SampleShape& s) {
  for (int64_t i = 0; previous && i < s.rows * s.previous; ++i)
    if (previous[i] >= s.tokens)
      throw std::invalid_argument("sample: previous must be below " + std::to_string(s.tokens) + ", got " +
                                  std::to_string(previous[i]));
}

template <class T>
void forward(const void* logits, const float* temperature, const int64_t* previous, int64_t* drawn,
             float* log_probability, const SampleShape& s, const SampleOptions& o, int threads) {
  parallel_for(s.rows, s.rows * s.tokens, threads, [&](int64_t begin, int64_t end) {
    Sampler<T> sampler(s, o);
    for (int64_t row = begin; row < end; ++row) {
      const T* const x = static_cast<const T*>(logits) + row * s.tokens;
      const float t = temperature ? temperature[row] : o.temperature;
      float* const log = log_probability ? log_probability + row : nullptr;
      drawn[row] = previous ? sampler.draw(sampler.penalised(x, previous + row * s.previous), row, t, log)
                            : sampler.draw(x, row, t, log);
    }
  });
}

}  // namespace

void sample_forward(const void* logits, const float* temperature, const int64_t* previous, int64_t* drawn,
                    float* log_probability, const SampleShape& shape, const SampleOptions& options,
                    int threads) {
  check(previous, shape);
  const auto run = shape.dtype == DType::f32    ? &forward<float>
                   : shape.dtype == DType::bf16 ? &forward<bf16>
                                                : &forward<f16>;
  run(logits, temperature, previous, drawn, log_probability, shape, options, threads);
}

}  // namespace lspm::cpu
