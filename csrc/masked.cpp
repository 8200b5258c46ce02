// The same for calls with a mask: compiled once for each instruction set.
#include "dispatch.h"
#include "kernels.h"
#include "masked_planar.h"
#include "masked_rows.h"
#include "simd.h"

namespace nw::NW_ISA {
namespace {

struct ByLayout {
  template <class T, class F> static void with(const Call& call, const F& f) {
    if (call.inner >= kMaskedRun)
      f(MaskedPlanar<T>(call));
    else
      f(MaskedRows<T>(call));
  }
};

}  // namespace

const Kernels* masked_kernels() {
  static const Kernels table = Operators<ByLayout>::table(NW_TEXT(NW_ISA), nullptr);
  return &table;
}

}  // namespace nw::NW_ISA
