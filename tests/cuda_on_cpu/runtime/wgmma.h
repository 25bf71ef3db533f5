// wgmma m64nNk16 (k8 in tf32) of sm_90, a warp and its 16 rows at a time. Operands in shared memory: PTX ISA,
// "Matrix descriptor"; layouts as in CUTLASS's mma_sm90_desc.hpp.
#pragma once
#include <vector>

namespace translated {

struct tf32 {
  u32 bits;
};
inline float to_float(tf32 value) { return as<float>(value.bits & ~0x1FFFu); }
using lspm::cuda::to_float;

// Where element (mn, k) of an operand is; mn: a row of A or a column of B. Along mn: 16-bit elements only.
inline u32 wgmma_address(u64 descriptor, bool along_mn, int mn, int k, int bytes = 2) {
  if (descriptor >> 49 & 7) emu::fail("wgmma: descriptor with a base offset");
  const u32 base = (descriptor & 0x3FFF) << 4;
  const u32 leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  const int swizzle = descriptor >> 62;  // none, 128, 64, 32 bytes
  constexpr u32 kWidth[] = {16, 128, 64, 32}, kSwizzleBits[] = {0, 7, 3, 1};
  const u32 width = kWidth[swizzle], per_row = width / 2;
  u32 offset;
  if (!along_mn) {
    const u32 along_k = swizzle ? k * bytes : k * bytes / 16 * leading + k * bytes % 16;
    offset = mn / 8 * stride + mn % 8 * width + along_k;
  } else if (swizzle) {
    offset = mn / per_row * leading + mn % per_row * 2 + k % 8 * width + k / 8 * stride;
  } else {
    offset = mn / 8 * stride + mn % 8 * 2 + k % 8 * 16 + k / 8 * leading;
  }
  const u32 address = base + offset;
  return address ^ (address >> 7 & kSwizzleBits[swizzle]) << 4;
}

template <int kCols>
struct Wgmma {
  float d[kCols / 2];
  u32 a[4];
  u64 a_descriptor, b_descriptor;
  bool a_in_registers, a_along_mn, b_along_mn;
};

inline int first_row_of_warp() { return threadIdx.x / 32 % 4 * 16; }

template <class T, int kCols>
EMU_RAW inline void model_wgmma(void* operands[32], unsigned) {
  emu::count(emu::MMA);
  constexpr int kBytes = sizeof(T), kDepth = 32 / kBytes;
  static float a[16][16], b[16][kCols], d[16][kCols];  // too large for a fiber's stack
  const auto& first = *static_cast<Wgmma<kCols>*>(operands[0]);
  auto element = [](u64 descriptor, bool along_mn, int mn, int k) {
    T value;
    memcpy(&value, at_shared(wgmma_address(descriptor, along_mn, mn, k, kBytes)), kBytes);
    return to_float(value);
  };
  for (int k = 0; k < kDepth; ++k)
    for (int col = 0; col < kCols; ++col) b[k][col] = element(first.b_descriptor, first.b_along_mn, col, k);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Wgmma<kCols>*>(operands[lane]);
    if (mine.a_descriptor != first.a_descriptor || mine.b_descriptor != first.b_descriptor)
      emu::fail("wgmma: descriptors differ between lanes");
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 4 / kBytes; ++e) {
        const int row = lane / 4 + 8 * (i % 2), k = 4 / kBytes * (lane % 4) + e + kDepth / 2 * (i / 2);
        T value;
        memcpy(&value, reinterpret_cast<const char*>(&mine.a[i]) + 2 * e, kBytes);
        a[row][k] = mine.a_in_registers
                        ? to_float(value)
                        : element(mine.a_descriptor, mine.a_along_mn, first_row_of_warp() + row, k);
      }
  }
  memset(d, 0, sizeof d);
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; ++k)
      for (int col = 0; col < kCols; ++col) d[row][col] += a[row][k] * b[k][col];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < kCols / 2; ++i)
      static_cast<Wgmma<kCols>*>(operands[lane])->d[i] +=
          d[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
}

// A thread's wgmma in flight: results land at the matching wait, and their registers hold NaN until then.
class WgmmaQueue {
 public:
  template <class T, int kCols>
  EMU_RAW void run(Wgmma<kCols>& wgmma, u32** registers, bool accumulate, emu::Site at) {
    reads_.push_back({wgmma.a_descriptor, wgmma.b_descriptor, wgmma.a_in_registers, wgmma.a_along_mn,
                      wgmma.b_along_mn, kCols, groups_, at});
    check(reads_.back());
    Result* pending[kCols / 2];
    size_t next = 0;  // a chain of wgmma names the same registers in the same order
    for (int i = 0; i < kCols / 2; ++i) {
      pending[i] = find(registers[i], next);
      if (pending[i]) next = pending[i] - results_.data() + 1;
      wgmma.d[i] = accumulate ? as<float>(pending[i] ? pending[i]->value : *registers[i]) : 0.0f;
    }
    emu::collective("wgmma", ~0u, true, model_wgmma<T, kCols>, &wgmma, at);
    for (int i = 0; i < kCols / 2; ++i)
      if (pending[i]) *pending[i] = {registers[i], as<u32>(wgmma.d[i]), groups_};
    for (int i = 0; i < kCols / 2; ++i) {  // this may move the others
      if (!pending[i]) results_.push_back({registers[i], as<u32>(wgmma.d[i]), groups_});
      poison(*registers[i]);
    }
  }
  void commit() { ++groups_; }
  EMU_RAW void wait(int pending_groups) {
    auto landed = [&](int group) { return group < groups_ - pending_groups; };
    for (const Read& read : reads_)
      if (landed(read.group)) check(read);
    for (const Result& result : results_)
      if (landed(result.group)) *result.to = result.value;
    erase(reads_, landed);
    erase(results_, landed);
  }

 private:
  struct Result {
    u32* to;
    u32 value;
    int group;
  };
  struct Read {  // of shared memory: at any time up to the wait, so it is checked at both ends
    u64 a_descriptor, b_descriptor;
    bool a_in_registers, a_along_mn, b_along_mn;
    int cols, group;
    emu::Site at;
  };
  EMU_RAW static void check(const Read& read) {
    auto check_neighbours = [&](u64 descriptor, bool along_mn, int n, int i, int first) {  // 8 elements
      const u32 address = along_mn ? wgmma_address(descriptor, true, first + i % (n / 8) * 8, i / (n / 8))
                                   : wgmma_address(descriptor, false, first + i / 2, i % 2 * 8);
      emu::check_access(at_shared(address), 16, emu::Access::read, true, "wgmma", read.at);
    };
    for (int i = emu::lane; i < 2 * read.cols; i += 32)
      check_neighbours(read.b_descriptor, read.b_along_mn, read.cols, i, 0);
    if (!read.a_in_registers)
      check_neighbours(read.a_descriptor, read.a_along_mn, 16, emu::lane, first_row_of_warp());
  }
  Result* find(u32* to, size_t likely) {
    if (likely < results_.size() && results_[likely].to == to) return &results_[likely];
    for (Result& result : results_)
      if (result.to == to) return &result;
    return nullptr;
  }
  template <class Item, class Landed>
  static void erase(std::vector<Item>& items, Landed landed) {
    items.erase(
        std::remove_if(items.begin(), items.end(), [&](const Item& item) { return landed(item.group); }),
        items.end());
  }
  std::vector<Result> results_;
  std::vector<Read> reads_;
  int groups_ = 0;
};

}  // namespace translated
