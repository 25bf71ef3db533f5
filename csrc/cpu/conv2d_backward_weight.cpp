// The gradient of conv2d's weight: for each tap and channel of x, and each filter, a sum over pixels.
//
// As matrices, (taps x channels) = x' dz. Pixels are split into parts whose number depends on the shape
// alone; a thread owns a part and some panels of filters, packs both sides block by block of pixels, and adds
// the product of each tile of kTileRows channels x kPanel filters to the part's sums. Those are then added in
// order. The left side is the window that the forward reads; bfloat16, which is multiplied in pairs of
// pixels, has it turned: pixels of a channel side by side.
#include "cpu/conv2d_tiles.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kBlockPixels = 512;     // multiplied at a time: both sides of a tile stay in the caches
constexpr int64_t kPartPixels = 3136;     // at least in a part
constexpr int64_t kParts = 16;            // at most, and as
constexpr int64_t kPartBytes = 16 << 20;  // all parts' sums may be this large

template <class O>
bool gathered(const Window<O>& w) {
  return w.kind == Window<O>::gathered;
}

// x as the left side of a block of pixels.
template <class T, class O>
class Pixels {
 public:
  explicit Pixels(const Window<O>& w, int64_t images, int64_t rows)
      : w_(w), window_(images * image_size(rows) + kConvRows<O> * w.pixel_stride()) {
    const int64_t pixels = images * rows * w.c.columns;
    if constexpr (kTurned) {
      phase_ = (w.width + w.c.stride_w - 1) / w.c.stride_w;
      const int64_t row = gathered(w) ? pixels : images * w.rows_of(rows) * w.c.stride_w * phase_;
      channel_ = (round_up(row + 2 * kLanes, kLine) / kLine | 1) * kLine;  // turning writes whole vectors
      turned_ = Room<O>((round_up(left_rows(), kLanes) + kConvRows<O>)*channel_);
    }
  }

  // Images [image, image + images), of each `rows` rows from `first` on.
  void fill(const T* x, int64_t group, int64_t image, int64_t images, int64_t first, int64_t rows) {
    runs_.clear();
    const Correlation& c = w_.c;
    for (int64_t i = 0; i < images; ++i) {
      w_.fill(x, group, (image + i) * c.rows + first, rows, window_.get() + i * image_size(rows));
      for (int64_t r = 0; !gathered(w_) && r < rows; ++r)
        runs_.push_back(kTurned ? (i * w_.rows_of(rows) + r * c.stride_h) * c.stride_w * phase_
                                : i * image_size(rows) + r * w_.row_stride());
    }
    if (gathered(w_)) runs_.push_back(0);
    depth_ = gathered(w_) ? images * rows * c.columns : c.columns;
    if constexpr (kTurned) turn(images * w_.rows_of(rows));
    if (gathered(w_)) depth_ = round_up(depth_, kRunDepth<O>);
  }

  // c += or = the sums for `rows` channels of a run of the window and a panel of dz.
  void multiply(int64_t run, int64_t channel, int64_t rows, const O* right, float* c, int64_t filters,
                bool accumulate) const {
    if constexpr (kTurned) {
      int64_t at = channel * channel_;
      if (!gathered(w_)) {
        const int64_t row = w_.c.taps[run].row - w_.top, column = w_.c.taps[run].column - w_.left;
        at += (row * w_.c.stride_w + column % w_.c.stride_w) * phase_ + column / w_.c.stride_w;
      }
      if constexpr (kRunDepth<O> > 2) {  // tile registers store all their rows: here those of other sums
        alignas(64) float tile[kConvRows<O> * kPanel];
        multiply_runs<false>(turned_.get() + at, channel_, runs_, depth_, right, tile, rows, filters, false);
        for (int64_t i = 0; i < rows * kPanel; i += kLanes)
          store(c + i, accumulate ? load(c + i) + load(tile + i) : load(tile + i));
      } else {
        multiply_runs<false>(turned_.get() + at, channel_, runs_, depth_, right, c, rows, filters,
                             accumulate);
      }
    } else {
      multiply_runs<true>(window_.get() + w_.runs[run] + channel, w_.pixel_stride(), runs_, depth_, right, c,
                          rows, filters, accumulate);
    }
  }

 private:
  static constexpr bool kTurned = !std::is_same_v<O, float>;
  static constexpr int64_t kLine = 64 / sizeof(O);

  int64_t image_size(int64_t rows) const { return w_.rows_of(rows) * w_.width * w_.pitch; }
  int64_t left_rows() const { return gathered(w_) ? w_.depth : w_.c.depth; }

  // Each row of the window, and of it each phase of the stride, pixels of a channel side by side.
  void turn(int64_t rows) {
    if (gathered(w_)) return turn_row(window_.get(), w_.pitch, depth_, turned_.get());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t f = 0; f < w_.c.stride_w; ++f)
        turn_row(window_.get() + (r * w_.width + f) * w_.pitch, w_.pixel_stride(),
                 (w_.width - f + w_.c.stride_w - 1) / w_.c.stride_w,
                 turned_.get() + (r * w_.c.stride_w + f) * phase_);
  }
  void turn_row(const O* from, int64_t stride, int64_t pixels, O* to) const {
    if constexpr (kTurned)
      for (int64_t p = 0; p < pixels; p += 2 * kLanes)
        for (int64_t d = 0; d < left_rows(); d += kLanes) {
          F block[kLanes];
          for (int i = 0; i < kLanes; ++i) {
            const int64_t q = p + 2 * i;
            const U even = q < pixels ? reinterpret_cast<U>(load(from + q * stride + d)) >> 16 : U{};
            const U odd = q + 1 < pixels ? reinterpret_cast<U>(load(from + (q + 1) * stride + d)) : U{};
            block[i] = reinterpret_cast<F>(even | odd);
          }
          transpose(block);
          for (int i = 0; i < kLanes; ++i)
            store(reinterpret_cast<float*>(to + (d + i) * channel_ + p), block[i]);
        }
  }

  const Window<O>& w_;
  int64_t phase_ = 0, channel_ = 0, depth_ = 0;
  std::vector<int64_t> runs_;
  Room<O> window_, turned_;
};

// The sums of parts, which lie as [group][panel][tap][channel][kPanel], added up and as the gradient. Where
// its channels lie side by side, blocks are turned first: filters lie far apart, often in one set of the
// cache, and their lines had better be written whole.
template <class T>
void finish(const float* sums, int64_t parts, int64_t part_size, const Correlation& c, int64_t panels,
            T* dweight, int threads) {
  const int64_t taps = c.taps.size();
  const auto total = [&](const float* from) {
    F sum = load(from);
    for (int64_t part = 1; part < parts; ++part) sum += load(from + part * part_size);
    return sum;
  };
  parallel_for(c.groups * panels, parts * part_size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * taps; i < end * taps; ++i) {
      const int64_t panel = i / taps, first = panel % panels * kPanel;
      T* to = dweight + panel / panels * c.group_stride + first * c.filter_stride + c.taps[i % taps].filter;
      const float* from = sums + i * c.depth * kPanel;
      for (int64_t v = 0; v < std::min(kPanel, c.filters - first); v += kLanes) {
        const int64_t filters = std::min<int64_t>(kLanes, c.filters - first - v);
        T* const at = to + v * c.filter_stride;
        if (c.depth_stride == 1) {
          for_each_vector(c.depth, [&](int64_t d, auto lanes) {
            F block[kLanes];
            for (int64_t j = 0; j < kLanes; ++j)
              block[j] = d + j < c.depth ? total(from + (d + j) * kPanel + v) : F{};
            transpose(block);
            for (int64_t n = 0; n < filters; ++n) lanes.store(at + n * c.filter_stride + d, block[n]);
          });
        } else {
          for (int64_t d = 0; d < c.depth; ++d) {
            T row[kLanes];
            store(row, total(from + d * kPanel + v));
            for (int64_t n = 0; n < filters; ++n) at[n * c.filter_stride + d * c.depth_stride] = row[n];
          }
        }
      }
    }
  });
}

}  // namespace

template <class T>
void conv2d_backward_weight(const T* dz, const T* x, T* dweight, const Conv2dShape& s, int threads) {
  using O = OperandOf<T>;
  const Correlation c = sums_over_x(s);
  // Turned, only what is gathered lies in equal strides; and tile registers take 32 pixels of one run.
  const bool gathers =
      !std::is_same_v<O, float> && (kRunDepth<O> > 2 || Window<O>(c).kind == Window<O>::strips);
  const Window<O> w(c, gathers);
  const int64_t taps = c.taps.size(), panels = w.panels(), images = c.batch, per_image = c.rows * c.columns;
  const int64_t run_rows = taps * c.depth / std::max<int64_t>(1, w.runs.size());
  const int64_t run_tiles = (run_rows + kConvRows<O> - 1) / kConvRows<O>;
  const int64_t part_size = c.groups * panels * taps * c.depth * kPanel;
  // A block is some whole images, or some rows of one.
  const int64_t block_images = std::clamp<int64_t>(kBlockPixels / per_image, 1, images);
  const int64_t block_rows = std::clamp<int64_t>(kBlockPixels / c.columns, 1, c.rows);
  const int64_t per = block_images > 1 ? 1 : (c.rows + block_rows - 1) / block_rows;  // blocks of an image
  const int64_t blocks = (images + block_images - 1) / block_images * per;
  const int64_t parts = std::max<int64_t>(
      1, std::min({kParts, blocks, images * per_image / kPartPixels, kPartBytes / int64_t(4 * part_size)}));
  const int64_t chunks = std::clamp<int64_t>((2 * threads + parts - 1) / parts, 1, panels);
  const int64_t items = parts * c.groups * chunks;
  const Room<float> sums(parts * part_size);
  const int64_t work = images * per_image * part_size;
  parallel_claim(items, work, threads, [&](auto next, int) {
    const TileRegisters tiles;
    Pixels<T, O> left(w, block_images, block_rows);
    const int64_t right_size = (block_images * block_rows * round_up(c.columns, 2) + 64) * kPanel;
    const Room<O> right(right_size);
    for (int64_t item; (item = next()) < items;) {
      const int64_t chunk = item % chunks, group = item / chunks % c.groups, part = item / chunks / c.groups;
      const int64_t first_panel = panels * chunk / chunks, last_panel = panels * (chunk + 1) / chunks;
      const int64_t first_block = blocks * part / parts;
      for (int64_t b = first_block; b < blocks * (part + 1) / parts; ++b) {
        const int64_t image = b / per * block_images, row = b % per * block_rows;
        const int64_t count = std::min(block_images, images - image),
                      rows = std::min(block_rows, c.rows - row);
        left.fill(x, group, image, count, row, rows);
        for (int64_t p = first_panel; p < last_panel; ++p) {
          const int64_t filters = std::min(kPanel, c.filters - p * kPanel);
          O* panel = right.get();
          const T* from =
              dz + (image * per_image + row * c.columns) * s.filters + group * c.filters + p * kPanel;
          // Where runs are rows, an odd one ends in half a pair.
          const int64_t runs = gathered(w) ? 1 : count * rows,
                        pixels = gathered(w) ? count * rows * c.columns : c.columns;
          for (int64_t r = 0; r < runs; ++r)
            pack_right(from + r * pixels * s.filters, s.filters,
                       panel + r * round_up(pixels, Step<O>::kDepth) * kPanel, 0, pixels, filters);
          float* sum = sums.get() + part * part_size + (group * panels + p) * taps * c.depth * kPanel;
          for (size_t run = 0; run < w.runs.size(); ++run)
            for (int64_t i = 0; i < run_tiles; ++i) {
              const int64_t channel = run_rows * i / run_tiles,
                            channels = run_rows * (i + 1) / run_tiles - channel;
              left.multiply(run, channel, channels, panel, sum, filters, b > first_block);
              sum += channels * kPanel;
            }
        }
      }
    }
  });
  finish(sums.get(), parts, part_size, c, panels, dweight, threads);
}

template void conv2d_backward_weight(const float*, const float*, float*, const Conv2dShape&, int);
template void conv2d_backward_weight(const bf16*, const bf16*, bf16*, const Conv2dShape&, int);
template void conv2d_backward_weight(const f16*, const f16*, f16*, const Conv2dShape&, int);

}  // namespace lspm::cpu
