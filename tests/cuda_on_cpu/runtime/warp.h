// Barriers, votes, reductions and shuffles of the CUDA language.
#pragma once

static inline void __syncthreads(emu::Site at = emu::Site::here()) { emu::barrier(false, at); }
static inline int __syncthreads_count(int predicate, emu::Site at = emu::Site::here()) {
  return emu::barrier(predicate, at);
}
static inline int __syncthreads_or(int predicate, emu::Site at = emu::Site::here()) {
  return emu::barrier(predicate, at) > 0;
}
static inline int __syncthreads_and(int predicate, emu::Site at = emu::Site::here()) {
  return emu::barrier(!predicate, at) == 0;
}
static inline void __syncwarp(unsigned mask = ~0u, emu::Site at = emu::Site::here()) {
  emu::sync_warp(mask, at);
}
static inline unsigned __activemask() { return emu::active_mask(); }
static inline void __threadfence() {}  // memory is sequentially consistent here
static inline void __threadfence_block() {}

namespace emu {

struct Shuffle {
  uint64_t in, out;
  int source;  // a lane, or -1: its own value
};
EMU_RAW inline void model_shuffle(void* operands[32], unsigned mask) {
  count(SHUFFLE);
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    auto* mine = static_cast<Shuffle*>(operands[__builtin_ctz(rest)]);
    auto* theirs = mine->source < 0 ? mine : static_cast<Shuffle*>(operands[mine->source]);
    mine->out = theirs ? theirs->in : ~0ull;  // of an absent lane: poison
  }
}
template <class T>
T shuffle(const char* op, unsigned mask, T value, int source, Site at) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "at most 8 bytes are shuffled");
  Shuffle operands = {to_bits(value), 0, source};
  collective(op, mask, false, model_shuffle, &operands, at);
  return from_bits<T>(operands.out);
}

struct Vote {
  uint64_t in, out;
};
template <class Combine>
EMU_RAW void model_vote(void* operands[32], unsigned mask) {
  uint64_t result = static_cast<Vote*>(operands[__builtin_ctz(mask)])->in;
  for (unsigned rest = mask & (mask - 1); rest; rest &= rest - 1)
    result = Combine()(result, static_cast<Vote*>(operands[__builtin_ctz(rest)])->in);
  for (unsigned rest = mask; rest; rest &= rest - 1)
    static_cast<Vote*>(operands[__builtin_ctz(rest)])->out = result;
}
struct Or {
  uint64_t operator()(uint64_t a, uint64_t b) const { return a | b; }
};
struct Add {
  uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Max {
  uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
template <class Combine>
uint64_t vote(const char* op, unsigned mask, uint64_t value, Site at) {
  Vote operands = {value, 0};
  collective(op, mask, false, model_vote<Combine>, &operands, at);
  return operands.out;
}

}  // namespace emu

// The source lane is -1, "own value", where it would leave the segment of `width` lanes, as PTX defines it.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emu::Site at = emu::Site::here()) {
  return emu::shuffle("__shfl_sync", mask, value, (int(emu::lane) & -width) | (source & (width - 1)), at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emu::Site at = emu::Site::here()) {
  const int end = (int(emu::lane) & -width) + width, source = int(emu::lane) ^ bits;
  return emu::shuffle("__shfl_xor_sync", mask, value, source < end ? source : -1, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, emu::Site at = emu::Site::here()) {
  const int end = (int(emu::lane) & -width) + width, source = int(emu::lane + delta);
  return emu::shuffle("__shfl_down_sync", mask, value, source < end ? source : -1, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, emu::Site at = emu::Site::here()) {
  const int start = int(emu::lane) & -width, source = int(emu::lane) - int(delta);
  return emu::shuffle("__shfl_up_sync", mask, value, source >= start ? source : -1, at);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Site at = emu::Site::here()) {
  return emu::vote<emu::Or>("__ballot_sync", mask, predicate ? 1u << emu::lane : 0, at);
}
static inline int __any_sync(unsigned mask, int predicate, emu::Site at = emu::Site::here()) {
  return emu::vote<emu::Or>("__any_sync", mask, predicate != 0, at);
}
static inline int __all_sync(unsigned mask, int predicate, emu::Site at = emu::Site::here()) {
  return !emu::vote<emu::Or>("__all_sync", mask, predicate == 0, at);
}
static inline unsigned __reduce_add_sync(unsigned mask, unsigned value, emu::Site at = emu::Site::here()) {
  return emu::vote<emu::Add>("__reduce_add_sync", mask, value, at);
}
static inline unsigned __reduce_max_sync(unsigned mask, unsigned value, emu::Site at = emu::Site::here()) {
  return emu::vote<emu::Max>("__reduce_max_sync", mask, value, at);
}
