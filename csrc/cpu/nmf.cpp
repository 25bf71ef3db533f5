// One multiplicative update of a factor of a non-negative matrix. A thread owns runs of rows; of a row it
// meets kLanes entries at a time: their estimates, then both sums in one pass over their y, which lie in the
// first-level cache by then. 6 n K operations; bytes: 4 n K where other_factors comes from memory.
// After Lee and Seung (2001), over observed entries alone.
#include "nmf.h"

#include "cpu/csr_rows.h"

namespace lspm::cpu {

void nmf_update(float* factors, const float* other_factors, const Csr& csr, const float* values,
                int64_t* failed, int64_t k, float reg, float eps, int threads) {
  check(csr);
  const Rows table(other_factors, k, csr, threads);
  const int64_t stride = table.stride;
  First no_row;
  for_runs_of_rows(csr, k, threads, [&] {
    return [&, rows = std::vector<const float*>(), room = zeros(3 * stride)](int64_t begin,
                                                                             int64_t end) mutable {
      float *const p = room.get(), *const above = p + stride, *const below = above + stride;
      for (int64_t row = begin; row < end; ++row) {
        rows.clear();
        if (!table.append(row, rows)) {
          no_row.report(row);
          continue;
        }
        load_row(factors + row * k, k, p);
        std::fill_n(above, 2 * stride, 0.0f);
        const int64_t first = csr.indptr[row], last = csr.indptr[row + 1];
        for (int64_t entry = first; entry < last; entry += kLanes) {
          const float* const* const at = rows.data() + (entry - first);
          add_scaled<2>(at, {values_at(values, entry, last), dots(at, p, stride)}, {above, below}, stride);
        }
        const float weight = float(last - first) * reg;
        for (int64_t c = 0; c < stride; c += kLanes) {
          const F old = load(p + c);
          store(p + c, old * load(above + c) / (load(below + c) + old * weight + eps));
        }
        store_row(p, k, factors + row * k);
      }
    };
  });
  *failed = no_row.get();
}

}  // namespace lspm::cpu
