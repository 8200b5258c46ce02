// Batch norm with a mask where the channel's values lie in runs: padded sequences (N, C, L).
//
// A lane that takes no part is set to 0 after everything that is computed from it: padding may hold
// NaN. Of each row only the span from its first element that takes part to its last is read, so
// padding at the end costs its zeros and nothing else.
#pragma once
#include "activate.h"
#include "channel.h"
#include "mask.h"
#include "slices.h"
#include "write.h"

namespace nw::NW_ISA {

struct Nobody {
  NW_INLINE void step(int64_t) {}
  NW_INLINE void vector(int64_t) {}
};

template <class T> struct MaskedPlanar {
  using R = Compute<T>;
  using P = Pack<R>;
  static constexpr int W = kLanes<R>;

  const Call& call;
  const Slices<T> at;

  explicit MaskedPlanar(const Call& c) : call(c), at(c) {}

  Span* spans() const { return static_cast<Span*>(call.scratch); }                      // (outer)
  ShiftedSums* parts() const { return reinterpret_cast<ShiftedSums*>(spans() + at.outer); }
  int64_t scratch_bytes() const {
    return at.outer * int64_t(sizeof(Span)) +
           at.channels * at.pieces * int64_t(sizeof(ShiftedSums));
  }
  void find_spans() const {
    for (int64_t o = 0; o < at.outer; ++o) spans()[o] = span_of(call.mask + o * at.inner, at.inner);
  }

  // The lanes of a row: place i has its byte at mask[i + shift].
  struct Lanes {
    const uint8_t* mask;
    int64_t shift;
    NW_INLINE P keep(auto i, P v) const { return taken_at<T>(mask + shift, i) ? v : P{}; }
  };

  // Calls f(first, begin, end, last, lanes) for each run [first, last) of chunk k of channel c:
  // elements outside [begin, end) take no part, and that is nothing or at least a vector.
  template <class F> NW_INLINE void runs(int64_t c, int64_t k, const F& f) const {
    at.runs(c, k, [&](int64_t i, int64_t length) NW_LAMBDA_INLINE {
      const int64_t o = i / at.stride, row = o * at.stride + c * at.inner, last = i + length;
      const Span span = spans()[o];
      int64_t begin = row + span.begin > i ? row + span.begin : i;
      int64_t end = row + span.end < last ? row + span.end : last;
      if (begin >= end) {
        begin = end = i;
      } else if (end - begin < W) {
        begin = end - W > i ? end - W : i;
        end = begin + W;
      }
      f(i, begin, end, last, Lanes{call.mask, o * at.inner - row});
    });
  }

  // Pass: setting(c), terms(setting, lanes), conclude(c, setting, sums) as in slices.h; constants(c),
  // map(constants, lanes) as in sweep.h; kOuts and results() say what is written.
  template <class Pass>
  void add_chunk(const Pass& pass, int64_t c, int64_t k, const auto& setting, Sums<R>& sums) const {
    runs(c, k, [&](int64_t, int64_t begin, int64_t end, int64_t, Lanes lanes) NW_LAMBDA_INLINE {
      if (begin < end) sums.run(begin, end, pass.terms(setting, lanes));
    });
    sums.end_chunk();
  }
  template <class Pass>
  void write_chunk(const Pass& pass, int64_t c, int64_t k, const auto& constants) const {
    const auto [to, streaming] = pass.results();
    runs(c, k, [&](int64_t i, int64_t begin, int64_t end, int64_t last, Lanes lanes) {
      for (int j = 0; j < Pass::kOuts; ++j) {
        std::memset(to.v[j] + i, 0, size_t(begin - i) * sizeof(T));
        std::memset(to.v[j] + end, 0, size_t(last - end) * sizeof(T));
      }
      if (begin == end) return;
      Writer<T, Pass::kOuts> out{{}, end - begin, 1, streaming};
      for (int j = 0; j < Pass::kOuts; ++j) out.to[j] = to.v[j];
      const auto one = pass.map(constants, lanes);
      Nobody nobody;
      out.write(begin, end, {0, end}, [&](int64_t) NW_LAMBDA_INLINE { return one; }, nobody);
    });
  }
  // Channels are summed and written one after the other while they are in cache; of few channels
  // all chunks are summed first.
  template <class Pass> void sweep(const Pass& pass, bool reduce, bool write) const {
    const int64_t size = at.n * at.channels;
    if (reduce && !(at.pieces > 1 && at.channels < 4 * threads() && threads() > 1)) {
      parallel(at.channels, size, [=, this, &pass](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
          const auto setting = pass.setting(c);
          Sums<R> sums;
          sums.clear();
          for (int64_t k = 0; k < at.pieces; ++k) add_chunk(pass, c, k, setting, sums);
          pass.conclude(c, setting, sums.total());
          if constexpr (Pass::kOuts > 0) {
            if (!write) continue;
            const auto constants = pass.constants(c);
            for (int64_t k = at.pieces; k-- > 0;) write_chunk(pass, c, k, constants);
          }
        }
        stream_end();
      });
      return;
    }
    if (reduce) {
      parallel(at.channels * at.pieces, size, [=, this, &pass](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          Sums<R> sums;
          sums.clear();
          const int64_t c = i / at.pieces;
          add_chunk(pass, c, i % at.pieces, pass.setting(c), sums);
          parts()[i] = sums.total();
        }
      });
      for (int64_t c = 0; c < at.channels; ++c) {
        ShiftedSums total;
        for (int64_t k = 0; k < at.pieces; ++k) {
          total.s += parts()[c * at.pieces + k].s;
          total.q += parts()[c * at.pieces + k].q;
        }
        pass.conclude(c, pass.setting(c), total);
      }
    }
    if constexpr (Pass::kOuts > 0) {
      if (!write) return;
      parallel(at.channels * at.pieces, size, [=, this, &pass](int64_t first, int64_t last) {
        for (int64_t i = last; i-- > first;)
          write_chunk(pass, i / at.pieces, i % at.pieces, pass.constants(i / at.pieces));
        stream_end();
      });
    }
  }

  template <int Outs> struct Targets {
    struct {
      T* v[Outs];
    } to;
    bool streaming;
  };
  bool streams(int64_t tensors) const {
    return at.n * at.channels * int64_t(sizeof(T)) * tensors > caches.last;
  }

  // ---- forward ----------------------------------------------------------------------------------
  struct Moments {
    static constexpr int kOuts = 0;
    const Call& call;
    const Taken taken;
    const T* const x = static_cast<const T*>(call.x);

    R setting(int64_t c) const {
      double total = 0;
      for (int64_t k = 0; k < taken.samples; ++k) {
        const int64_t o = taken.sample[k] / call.inner, i = taken.sample[k] % call.inner;
        total += double(to_compute(x[(o * call.channels + c) * call.inner + i]));
      }
      return taken.samples ? R(total / double(taken.samples)) : R(0);
    }
    NW_INLINE auto terms(R shift, Lanes lanes) const {
      return [x = x, shift, lanes](auto i) NW_LAMBDA_INLINE {
        const P d = lanes.keep(i, load<T>(x + i) - shift);
        return Terms<R>{d, d, d};
      };
    }
    void conclude(int64_t c, R shift, ShiftedSums sums) const {
      const double n = double(taken.n);
      if (taken.n == 0) return write_moments(call, c, 0, {0, 0, true});
      MeanM2 m = finish(sums, double(shift), n);
      if (!m.trusted)
        m = careful_moments(x + c * call.inner, call.outer, call.channels * call.inner, call.inner,
                            n, call.mask);
      write_moments(call, c, n, m);
    }
  };

  template <int Act, bool Residual> struct Forward : Moments {
    static constexpr int kOuts = 1;
    const bool train, streaming;

    Forward(const Call& call, const Taken& taken, bool train, bool streaming)
        : Moments{call, taken}, train(train), streaming(streaming) {}
    Affine<R> constants(int64_t c) const {
      const Call& call = this->call;
      return affine<R>(call, c, train ? from_moments(call, c) : from_vectors(call, c));
    }
    NW_INLINE auto map(const Affine<R>& f, Lanes lanes) const {
      const Call& call = this->call;
      return [f, lanes, x = this->x, r = static_cast<const T*>(call.residual),
              code = call.activation, slope = R(call.slope)](auto i) NW_LAMBDA_INLINE {
        P z = apply<R>(f, load<T>(x + i));
        if constexpr (Residual)
          if (Act != kAny || r) z += load<T>(r + i);
        if constexpr (Act == kReLU) z = relu(z);
        if constexpr (Act == kAny) z = activate<R>(code, slope, z);
        return Results<R, 1>{{lanes.keep(i, z)}};
      };
    }
    Targets<1> results() const { return {{{static_cast<T*>(this->call.y)}}, streaming}; }
  };

  Taken look() const {
    find_spans();
    return look_through(call.mask, at.outer, at.inner);
  }
  void moments() const { sweep(Moments{call, look()}, true, false); }
  template <int Act, bool Residual> void forward_all(bool train) const {
    sweep(Forward<Act, Residual>(call, look(), train, streams(Residual ? 3 : 2)), train, true);
  }

  // ---- backward ---------------------------------------------------------------------------------
  template <int Act, int Outs> struct Backward {
    static constexpr int kOuts = Outs;
    struct Setting {
      Statistics statistics;
      Affine<R> f;
    };
    struct Constants {
      Affine<R> f;
      Gradient<R> g;
    };
    const Call& call;
    const bool train, streaming;
    const T* const x = static_cast<const T*>(call.x);

    Statistics statistics(int64_t c) const {
      return train ? from_moments(call, c) : from_vectors(call, c);
    }
    Setting setting(int64_t c) const {
      const Statistics s = statistics(c);
      return {s, affine<R>(call, c, s)};
    }
    NW_INLINE auto terms(const Setting& s, Lanes lanes) const {
      return [f = s.f, lanes, x = x, up = Upstream<T>(call)](auto i) NW_LAMBDA_INLINE {
        const P xv = load<T>(x + i);
        const P g = up.template dz<Act>(i, LoadVector{}, [&] { return apply<R>(f, xv); });
        const P kept = lanes.keep(i, g);
        return Terms<R>{kept, kept, lanes.keep(i, xv - f.centre)};
      };
    }
    void conclude(int64_t c, const Setting& s, ShiftedSums sums) const {
      write_sums<R>(call, c, sums.s, sums.q, s.statistics);
    }
    Constants constants(int64_t c) const {
      const Statistics s = statistics(c);
      return {affine<R>(call, c, s), gradient<R>(call, c, s)};
    }
    NW_INLINE auto map(const Constants& k, Lanes lanes) const {
      return [k, lanes, x = x, up = Upstream<T>(call)](auto i) NW_LAMBDA_INLINE {
        const P xv = load<T>(x + i);
        const P z = up.template dz<Act>(i, LoadVector{}, [&] { return apply<R>(k.f, xv); });
        const P dx = lanes.keep(
            i, (z - multiply_add<R>(xv - k.f.centre, splat<P>(k.g.slope), splat<P>(k.g.offset))) *
                   k.f.scale);
        if constexpr (Outs == 2)
          return Results<R, 2>{{dx, lanes.keep(i, z)}};
        else
          return Results<R, 1>{{dx}};
      };
    }
    Targets<Outs> results() const {
      T *dx = static_cast<T*>(call.dx), *dr = static_cast<T*>(call.dresidual);
      if constexpr (Outs == 2)
        return {{{dx, dr}}, streaming && (uintptr_t(dx) - uintptr_t(dr)) % kLine == 0};
      else
        return {{{dx}}, streaming};
    }
  };

  template <int Act> void backward_all(bool reduce, bool input, bool train) const {
    find_spans();
    if constexpr (Act == kAny || Act == kReLUOfOutput)
      if (call.dresidual)
        return sweep(Backward<Act, 2>{call, train, streams(4)}, reduce, input);
    sweep(Backward<Act, 1>{call, train, streams(3)}, reduce, input);
  }
};

}  // namespace nw::NW_ISA
