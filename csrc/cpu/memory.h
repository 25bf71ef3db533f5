// Large outputs: where they are stored and how their memory comes to be.
#pragma once
#include <cstdint>

#include "cpu/pairs.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lspm::cpu {

// Outputs from this size on are written past the cache: beside its input such an output would push all else
// out of the second-level caches (2 MiB a core), and a plain store first reads the line it fills.
constexpr int64_t kLargeBytes = 4 << 20;

// Asks for huge pages under an output that is about to be written. The allocator hands large blocks out
// fresh, and faulting them in 4 KiB at a time takes longer than computing what goes there (measured: 4.4
// against 12 GB/s).
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  // Advice: where the system has none to give, memory is as it was.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Makes `elements` of `out`, or null, ready to be written; returns whether they are many.
template <class T>
bool prepare_output(T* out, int64_t elements) {
  const int64_t bytes = elements * int64_t(sizeof(T));
  if (!out || bytes < kLargeBytes) return false;
  prefer_huge_pages(out, bytes);
  return true;
}

// Whether `elements` of `out`, or null, which lie in runs of `run`, are to be streamed; makes them ready.
template <class T>
bool streams(T* out, int64_t elements, int64_t run) {
  return prepare_output(out, elements) && reinterpret_cast<uintptr_t>(out) % sizeof(F) == 0 &&
         run % (2 * kLanes) == 0;
}

// Stores a vector or a pair, past the cache where kStream.
template <bool kStream, class T, class V, class Lanes>
void write(T* p, V v, Lanes lanes) {
  if constexpr (kStream)
    lanes.stream(p, v);
  else
    lanes.store(p, v);
}

}  // namespace lspm::cpu
