// Batch norm of blocks with the channel's values in runs (NCHW, NCL, 5-D): inner >= one vector.
// What is summed and what is written; sweep.h has the order.
#pragma once
#include "activate.h"
#include "channel.h"
#include "kernels.h"
#include "sweep.h"

namespace nw::NW_ISA {

template <class T> struct Planar {
  using R = Compute<T>;
  using P = Pack<R>;

  const Call& call;
  explicit Planar(const Call& c) : call(c) {}

  // A call for each vector of an activation leaves no registers for a second loop's sums; double and
  // float16 are not worth the code (a tenth of the compile time each).
#if defined(NW_FEW_LOOPS)
  template <int> static constexpr bool fuses = false;
#else
  template <int Act>
  static constexpr bool fuses =
      Act != kAny && (std::is_same_v<T, float> || std::is_same_v<T, BFloat16>);
#endif

  // Streaming stores pay for results that will not fit in the last level cache beside what is read.
  // They need the tensors of results to lie alike to the line.
  bool streams(int64_t tensors) const {
    const int64_t size = call.outer * call.channels * call.inner * int64_t(sizeof(T));
    return size * tensors * call.parts > caches.last;
  }

  // ---- forward ----------------------------------------------------------------------------------
  struct Moments {
    const Call& call;
    const T* const read = static_cast<const T*>(call.x);
    const T* const read2 = nullptr;

    // The mean of some of the channel's values.
    R setting(int64_t c) const {
      const int64_t n = call.outer * call.inner, stride = call.channels * call.inner;
      const int64_t count = sample_count(n), step = n / count;
      double total = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i * step, o = at / call.inner;
        total += to_compute(read[o * stride + c * call.inner + at - o * call.inner]);
      }
      return R(total / double(count));
    }
    NW_INLINE auto terms(R shift) const {
      return [x = read, shift](auto i) NW_LAMBDA_INLINE {
        const P d = load<T>(x + i) - shift;
        return Terms<R>{d, d, d};
      };
    }
    void conclude(int64_t c, R shift, ShiftedSums sums) const {
      const double n = double(call.outer * call.inner);
      MeanM2 m = finish(sums, double(shift), n);
      if (!m.trusted)
        m = careful_moments(read + c * call.inner, call.outer, call.channels * call.inner,
                            call.inner, n);
      write_moments(call, c, n, m);
    }
  };

  template <int Act, bool Residual> struct Forward {
    static constexpr int kOuts = 1;
    static constexpr bool kFuse = fuses<Act>;
    using Summand = Moments;

    const Planar& planar;
    const Call& call;
    const bool train;
    const Summand summand{call};

    Affine<R> constants(int64_t c) const {
      return affine<R>(call, c, train ? from_moments(call, c) : from_vectors(call, c));
    }
    NW_INLINE auto map(const Affine<R>& f) const {
      return [f, x = summand.read, r = static_cast<const T*>(call.residual), code = call.activation,
              slope = R(call.slope)](auto i) NW_LAMBDA_INLINE {
        P z = apply<R>(f, load<T>(x + i));
        if constexpr (Residual)
          if (Act != kAny || r) z += load<T>(r + i);
        if constexpr (Act == kReLU) z = relu(z);
        if constexpr (Act == kAny) z = activate<R>(code, slope, z);
        return Results<R, 1>{{z}};
      };
    }
    Writer<T, 1> writer(int64_t row, int64_t channels) const {
      return {{static_cast<T*>(call.y)}, row, channels, planar.streams(Residual ? 3 : 2)};
    }
  };

  void moments() const {
    const Moments pass{call};
    const Slices<T> at(call);
    Summation<T, Moments>{pass, at}.sum_all(call.scratch);
  }
  template <int Act, bool Residual> void forward_all(bool train) const {
    const Forward<Act, Residual> pass{*this, call, train};
    const Sweep<T, Forward<Act, Residual>> sweep(pass, call);
    if (train)
      sweep.sum_and_write(call.scratch);
    else
      sweep.write_all(call.scratch);
  }

  // ---- backward ---------------------------------------------------------------------------------
  template <int Act> struct Gradients {
    struct Setting {
      Statistics statistics;
      Affine<R> f;
    };
    const Call& call;
    const bool train;
    const T* const read = static_cast<const T*>(call.x);
    const T* const read2 = static_cast<const T*>(call.dy);

    Statistics statistics(int64_t c) const {
      return train ? from_moments(call, c) : from_vectors(call, c);
    }
    Setting setting(int64_t c) const {
      const Statistics s = statistics(c);
      return {s, affine<R>(call, c, s)};
    }
    NW_INLINE auto terms(const Setting& s) const {
      return [f = s.f, x = read, up = Upstream<T>(call)](auto i) NW_LAMBDA_INLINE {
        const P xv = load<T>(x + i);
        const P g = up.template dz<Act>(i, LoadVector{}, [&] { return apply<R>(f, xv); });
        return Terms<R>{g, g, xv - f.centre};
      };
    }
    void conclude(int64_t c, const Setting& s, ShiftedSums sums) const {
      write_sums<R>(call, c, sums.s, sums.q, s.statistics);
    }
  };

  struct BackwardConstants {
    Affine<R> f;
    Gradient<R> g;
  };
  template <int Act, int Outs> struct Backward {
    static constexpr int kOuts = Outs;
    static constexpr bool kFuse = fuses<Act>;
    using Summand = Gradients<Act>;

    const Planar& planar;
    const Call& call;
    const bool train;
    const Summand summand{call, train};

    BackwardConstants constants(int64_t c) const {
      const Statistics s = summand.statistics(c);
      return {affine<R>(call, c, s), gradient<R>(call, c, s)};
    }
    NW_INLINE auto map(const BackwardConstants& k) const {
      return [k, x = summand.read, up = Upstream<T>(call)](auto i) NW_LAMBDA_INLINE {
        const P xv = load<T>(x + i);
        const P z = up.template dz<Act>(i, LoadVector{}, [&] { return apply<R>(k.f, xv); });
        const P dx = (z - multiply_add<R>(xv - k.f.centre, splat<P>(k.g.slope), splat<P>(k.g.offset))) * k.f.scale;
        if constexpr (Outs == 2)
          return Results<R, 2>{{dx, z}};
        else
          return Results<R, 1>{{dx}};
      };
    }
    Writer<T, Outs> writer(int64_t row, int64_t channels) const {
      T *dx = static_cast<T*>(call.dx), *dr = static_cast<T*>(call.dresidual);
      const bool streaming = planar.streams(3 + Outs - 1 + (call.output != nullptr));
      if constexpr (Outs == 2)
        return {{dx, dr}, row, channels, streaming && (uintptr_t(dx) - uintptr_t(dr)) % kLine == 0};
      else
        return {{dx}, row, channels, streaming};
    }
  };

  template <int Act> void reduce_all(bool train) const {
    const Gradients<Act> pass{call, train};
    const Slices<T> at(call);
    Summation<T, Gradients<Act>>{pass, at}.sum_all(call.scratch);
  }
  template <int Act, int Outs> void backward_pass(bool reduce, bool train) const {
    const Backward<Act, Outs> pass{*this, call, train};
    const Sweep<T, Backward<Act, Outs>> sweep(pass, call);
    if (reduce)
      sweep.sum_and_write(call.scratch);
    else
      sweep.write_all(call.scratch);
  }
  template <int Act> void backward_all(bool reduce, bool input, bool train) const {
    if (!input) return reduce_all<Act>(train);
    if constexpr (Act == kAny || Act == kReLUOfOutput)
      if (call.dresidual) return backward_pass<Act, 2>(reduce, train);
    backward_pass<Act, 1>(reduce, train);
  }

  int64_t scratch_bytes() const { return Sweep<T, Backward<kNone, 1>>::scratch_bytes(call); }
};

}  // namespace nw::NW_ISA
