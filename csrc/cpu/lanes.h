// Rows of any length as vectors: whole ones, and the first lanes of a last one.
#pragma once
#include "cpu/simd.h"

namespace lspm {

// Whole vectors, or the first n lanes of one: for_each_vector() hands one of the two to its body.
struct AllLanes {
  template <class T>
  auto load(const T* p) const {
    return lspm::load(p);
  }
  template <class T, class V>
  void store(T* p, V v) const {
    lspm::store(p, v);
  }
  template <class T>
  void store_unchanged(T* p, F v) const {
    lspm::store_unchanged(p, v);
  }
  F keep(F v) const { return v; }
};

struct FirstLanes {
  int n;
  template <class T>
  auto load(const T* p) const {  // the other lanes read as zero
    T lanes[kLanes];
    load_first(p, n, lanes);
    return lspm::load(lanes);
  }
  template <class T, class V>
  void store(T* p, V v) const {
    T lanes[kLanes];
    lspm::store(lanes, v);
    store_first(p, n, lanes);
  }
  template <class T>
  void store_unchanged(T* p, F v) const {
    T lanes[kLanes];
    lspm::store_unchanged(lanes, v);
    store_first(p, n, lanes);
  }
  F keep(F v) const {  // zeroes the other lanes
    for (int i = n; i < kLanes; ++i) v[i] = 0;
    return v;
  }
};

// Calls body(i, lanes) for each vector of [0, n); the last one may have fewer lanes.
template <class Body>
inline void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, AllLanes{});
  if (i < n) body(i, FirstLanes{int(n - i)});
}

}  // namespace lspm
