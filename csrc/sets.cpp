// The norms of sets for one instruction set (see kernels.cpp): chooses the loops by dtype and
// activation. A file of its own, compiled beside kernels.cpp.
#include "sets.h"

#include "kernels.h"
#include "sets_backward.h"

namespace nw::NW_ISA {
namespace {

template <class F> void by_dtype(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kFloat64: return f(double{});
    case kBFloat16: return f(BFloat16{});
    default: return f(Float16{});
  }
}

}  // namespace

int64_t sets_scratch_bytes(const SetCall& call) {
  int64_t bytes = 0;
  by_dtype(call.dtype, [&](auto of) {
    using T = decltype(of);
    bytes = call.dy ? SetsBackward<T>(call).backward_bytes() : Sets<T>(call).forward_bytes();
  });
  return bytes;
}
void sets_forward(const SetCall& call) {
  by_dtype(call.dtype, [&](auto of) {
    const Sets<decltype(of)> loops(call);
    if (call.activation == kNone && !call.residual)
      loops.template forward<kNone>();
    else
      loops.template forward<kAny>();
  });
}
void sets_backward(const SetCall& call) {
  by_dtype(call.dtype, [&](auto of) {
    const SetsBackward<decltype(of)> loops(call);
    if (call.activation == kNone && !call.dresidual)
      loops.template backward<kNone>();
    else
      loops.template backward<kAny>();
  });
}

}  // namespace nw::NW_ISA
