// Work over torch's threads. Bodies are split into contiguous ranges, one a thread; nothing that is
// computed may depend on where a range ends.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "simd.h"

namespace nw::NW_ISA {

// Under this many elements waking a second thread (5 to 20 us) costs more than it saves.
constexpr int64_t kWorthThreads = 32768;

NW_INLINE int64_t threads() {
  uint32_t n = 1;
  if (!parallel_for || !thread_count || thread_count(&n) != 0) return 1;
  return n;
}

template <class Body> inline void parallel(int64_t n, int64_t elements, const Body& body) {
  if (n <= 1 || elements < kWorthThreads || !parallel_for) {
    body(int64_t(0), n);
    return;
  }
  parallel_for(
      0, n, 1,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

}  // namespace nw::NW_ISA
