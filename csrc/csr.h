// A sparse matrix in compressed rows: the entries of row r are those from indptr[r] up to indptr[r + 1].
#pragma once
#include <cstdint>

namespace lspm {

struct Csr {
  int64_t rows, columns, entries;
  const int64_t* indptr;  // (rows + 1), from 0 to entries, never less than before
  const void* indices;    // (entries), the columns: int64 where wide, int32 elsewhere
  bool wide;

  int64_t column(int64_t entry) const {
    return wide ? static_cast<const int64_t*>(indices)[entry] : static_cast<const int32_t*>(indices)[entry];
  }
  int64_t count(int64_t row) const { return indptr[row + 1] - indptr[row]; }
};

}  // namespace lspm
