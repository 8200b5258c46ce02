// One instruction set: this file is compiled once for each, with NW_ISA its name and the compiler's
// flags its width. Calls with a mask are in masked.cpp.
#include "kernels.h"

#include "dispatch.h"
#include "planar.h"
#include "rows.h"
#include "simd.h"

namespace nw::NW_ISA {

const Kernels* masked_kernels();              // masked.cpp
int64_t sets_scratch_bytes(const SetCall&);  // sets.cpp
void sets_forward(const SetCall&);
void sets_backward(const SetCall&);

namespace {

// The loops that fit the call: runs of a channel that fill a vector, or rows.
// Runs of up to three vectors cost more to begin than to add; in a block that stays in the second
// level cache rows read twice are cheaper, in memory a channel at a time is.
struct ByLayout {
  template <class T, class F> static void with(const Call& call, const F& f) {
    const int64_t bytes = call.outer * call.channels * call.inner * int64_t(sizeof(T));
    if (call.inner >= (bytes <= 131072 ? 4 : 1) * kWidth<T>)
      f(Planar<T>(call));
    else
      f(Rows<T>(call));
  }
};

}  // namespace

const Kernels* kernels() {
  static const Kernels all = [] {
    Kernels k = Operators<ByLayout>::table(NW_TEXT(NW_ISA), masked_kernels());
    k.sets_scratch_bytes = sets_scratch_bytes;
    k.sets_forward = sets_forward;
    k.sets_backward = sets_backward;
    return k;
  }();
  return &all;
}

}  // namespace nw::NW_ISA
