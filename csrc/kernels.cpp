// One instruction set: this file is compiled once for each, with NW_ISA its name and the compiler's
// flags its width. Chooses the loops by layout, dtype and activation.
#include "kernels.h"

#include <type_traits>

#include "planar.h"
#include "rows.h"
#include "simd.h"

namespace nw::NW_ISA {

int64_t sets_scratch_bytes(const SetCall&);  // sets.cpp
void sets_forward(const SetCall&);
void sets_backward(const SetCall&);

namespace {

// f(loops) with the loops that fit the call: runs of a channel that fill a vector, or rows.
// Runs of up to three vectors cost more to begin than to add; in a block that stays in the second
// level cache rows read twice are cheaper, in memory a channel at a time is.
template <class T, class F> void by_layout(const Call& call, const F& f) {
  const int64_t bytes = call.outer * call.channels * call.inner * int64_t(sizeof(T));
  if (call.inner >= (bytes <= 131072 ? 4 : 1) * kWidth<T>)
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

// Which loops serve a call: relu and no activation have their own, but for double, which few use.
#if defined(NW_FEW_LOOPS)
template <class Loops> constexpr bool own_loops = false;
#else
template <class Loops> constexpr bool own_loops = !std::is_same_v<typename Loops::R, double>;
#endif

void forward(const Call& call, bool train) {
  dispatch(call, [&](const auto& loops) {
    const bool residual = call.residual != nullptr;
    if (call.activation == kNone && !residual) return loops.template forward_all<kNone, false>(train);
    if constexpr (own_loops<std::decay_t<decltype(loops)>>) {
      if (call.activation == kNone) return loops.template forward_all<kNone, true>(train);
      if (call.activation == kReLU)
        return residual ? loops.template forward_all<kReLU, true>(train)
                        : loops.template forward_all<kReLU, false>(train);
    }
    loops.template forward_all<kAny, true>(train);
  });
}
void normalize(const Call& call) { forward(call, false); }
void train_forward(const Call& call) { forward(call, true); }

void backward(const Call& call, bool reduce, bool input, bool train) {
  dispatch(call, [&](const auto& loops) {
    if (call.activation == kNone && !call.dresidual)
      return loops.template backward_all<kNone>(reduce, input, train);
    if constexpr (own_loops<std::decay_t<decltype(loops)>>) {
      if (call.activation == kReLU && call.output)
        return loops.template backward_all<kReLUOfOutput>(reduce, input, train);
      if (call.activation == kReLU && !call.residual && !call.dresidual)
        return loops.template backward_all<kReLU>(reduce, input, train);
    }
    loops.template backward_all<kAny>(reduce, input, train);
  });
}
void backward_reduce(const Call& call) { backward(call, true, false, false); }
void backward_input(const Call& call) { backward(call, false, true, false); }
void train_backward(const Call& call) { backward(call, true, true, true); }
void eval_backward(const Call& call) { backward(call, true, true, false); }

#define NW_TEXT_(x) #x
#define NW_TEXT(x) NW_TEXT_(x)
const Kernels kKernels = {
    NW_TEXT(NW_ISA), scratch_bytes,   moments,        normalize,
    train_forward,   backward_reduce, backward_input, train_backward,
    eval_backward,     sets_scratch_bytes, sets_forward, sets_backward,
};

}  // namespace

const Kernels* kernels() { return &kKernels; }

}  // namespace nw::NW_ISA
