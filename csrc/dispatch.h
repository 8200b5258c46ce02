// From a call to its loops: by dtype, activation and what is asked for. `Choice` names the loops of
// a dtype: Choice::with<T>(call, f) calls f(loops).
#pragma once
#include <type_traits>

#include "channel.h"
#include "kernels.h"
#include "simd.h"

namespace nw::NW_ISA {

// Which loops serve a call: relu and no activation have their own, but for double, which few use.
#if defined(NW_FEW_LOOPS)
template <class Loops> constexpr bool own_loops = false;
#else
template <class Loops> constexpr bool own_loops = !std::is_same_v<typename Loops::R, double>;
#endif

template <class Choice> struct Operators {
  template <class F> static void dispatch(const Call& call, const F& f) {
    switch (call.dtype) {
      case kFloat32: return Choice::template with<float>(call, f);
      case kFloat64: return Choice::template with<double>(call, f);
      case kBFloat16: return Choice::template with<BFloat16>(call, f);
      default: return Choice::template with<Float16>(call, f);
    }
  }

  static int64_t scratch_bytes(const Call& call) {
    int64_t bytes = 0;
    dispatch(call, [&](const auto& loops) { bytes = loops.scratch_bytes(); });
    return bytes;
  }
  static void moments(const Call& call) {
    dispatch(call, [](const auto& loops) { loops.moments(); });
  }

  static void forward(const Call& call, bool train) {
    dispatch(call, [&](const auto& loops) {
      const bool residual = call.residual != nullptr;
      if (call.activation == kNone && !residual)
        return loops.template forward_all<kNone, false>(train);
      if constexpr (own_loops<std::decay_t<decltype(loops)>>) {
        if (call.activation == kNone) return loops.template forward_all<kNone, true>(train);
        if (call.activation == kReLU)
          return residual ? loops.template forward_all<kReLU, true>(train)
                          : loops.template forward_all<kReLU, false>(train);
      }
      loops.template forward_all<kAny, true>(train);
    });
  }
  static void normalize(const Call& call) { forward(call, false); }
  static void train_forward(const Call& call) { forward(call, true); }

  static void backward(const Call& call, bool reduce, bool input, bool train) {
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
  static void backward_reduce(const Call& call) { backward(call, true, false, false); }
  static void backward_input(const Call& call) { backward(call, false, true, false); }
  static void train_backward(const Call& call) { backward(call, true, true, true); }
  static void eval_backward(const Call& call) { backward(call, true, true, false); }

  // The table of these; that of the norms of sets is filled in by who has them.
  static constexpr Kernels table(const char* name, const Kernels* masked) {
    return {name,           scratch_bytes,  moments,       normalize, train_forward, backward_reduce,
            backward_input, train_backward, eval_backward, nullptr,   nullptr,       nullptr,
            masked};
  }
};

#define NW_TEXT_(x) #x
#define NW_TEXT(x) NW_TEXT_(x)

}  // namespace nw::NW_ISA
