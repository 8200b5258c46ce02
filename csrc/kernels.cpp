// One instruction set: this file is compiled once for each, with NW_ISA its name and the compiler's
// flags its width. Chooses the loops by layout, dtype and activation.
#include "kernels.h"

#include "planar.h"
#include "rows.h"
#include "simd.h"

namespace nw::NW_ISA {
namespace {

// f(loops) with the loops that fit the call: runs of a channel that fill a vector, or rows.
template <class T, class F> void by_layout(const Call& call, const F& f) {
  if (call.inner >= kWidth<T>)
    f(Planar<T>(call));
  else
    f(Rows<T>(call));
}
template <class F> void dispatch(const Call& call, const F& f) {
  switch (call.dtype) {
    case kFloat32: return by_layout<float>(call, f);
    case kFloat64: return by_layout<double>(call, f);
    case kBFloat16: return by_layout<BFloat16>(call, f);
    default: return by_layout<Float16>(call, f);
  }
}

int64_t scratch_bytes(const Call& call) {
  int64_t bytes = 0;
  dispatch(call, [&](const auto& loops) { bytes = loops.scratch_bytes(); });
  return bytes;
}

void moments(const Call& call) {
  dispatch(call, [](const auto& loops) { loops.moments(); });
}

void forward(const Call& call, bool train) {
  dispatch(call, [&](const auto& loops) {
    const bool residual = call.residual != nullptr;
    switch (call.activation) {
      case kNone:
        return residual ? loops.template forward_all<kNone, true>(train)
                        : loops.template forward_all<kNone, false>(train);
      case kReLU:
        return residual ? loops.template forward_all<kReLU, true>(train)
                        : loops.template forward_all<kReLU, false>(train);
      default:
        return residual ? loops.template forward_all<-1, true>(train)
                        : loops.template forward_all<-1, false>(train);
    }
  });
}
void normalize(const Call& call) { forward(call, false); }
void train_forward(const Call& call) { forward(call, true); }

void backward(const Call& call, bool reduce, bool input, bool train) {
  dispatch(call, [&](const auto& loops) {
    if (call.activation == kNone)
      loops.template backward_all<kNone>(reduce, input, train);
    else if (call.activation == kReLU && !call.residual && !call.output)
      loops.template backward_all<kReLU>(reduce, input, train);
    else
      loops.template backward_all<-1>(reduce, input, train);
  });
}
void backward_reduce(const Call& call) { backward(call, true, false, false); }
void backward_input(const Call& call) { backward(call, false, true, false); }
void train_backward(const Call& call) { backward(call, true, true, true); }

#define NW_TEXT_(x) #x
#define NW_TEXT(x) NW_TEXT_(x)
const Kernels kKernels = {
    NW_TEXT(NW_ISA), scratch_bytes,   moments,        normalize,
    train_forward,   backward_reduce, backward_input, train_backward,
};

}  // namespace

const Kernels* kernels() { return &kKernels; }

}  // namespace nw::NW_ISA
