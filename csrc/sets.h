// Norms of sets (layer, RMS, group, instance norm): x is (samples, groups, runs, length), each
// (sample, group) a set of runs * length neighbouring values that is normalized by its own moments.
//
// A weight serves a run. Runs of some vectors are written with constants of their own; shorter ones
// (layer norm: one value) by columns, a weight for each place of a sample. A set is read from memory
// once if it stays in cache between its statistics and its results.
#pragma once
#include <type_traits>

#include "activate.h"
#include "channel.h"
#include "kernels.h"
#include "parallel.h"
#include "sums.h"
#include "write.h"

namespace nw::NW_ISA {

template <class T> struct Sets {
  using R = Compute<T>;
  using P = Pack<R>;
  static constexpr int W = kLanes<R>;
  static constexpr int64_t kChunk = 65536;      // values summed apart, in order
  static constexpr int64_t kShortRun = 4 * W;   // under this: by columns
  static constexpr int64_t kPerLine = kLine / int64_t(sizeof(T));
  static constexpr int64_t kStreamed = kPerLine > 2 * W ? kPerLine : 2 * W;  // values, whole lines

  const SetCall& call;
  const bool affine, by_column;
  // Without parameters a set is one run.
  const int64_t sets, runs, length, n, columns, pieces;

  explicit Sets(const SetCall& c)
      : call(c),
        affine(c.weight.data || c.bias.data),
        by_column(affine && c.runs > 1 && c.length < kShortRun),
        sets(c.samples * c.groups),
        runs(affine ? c.runs : 1),
        length(affine ? c.length : c.runs * c.length),
        n(c.runs * c.length),
        columns(c.groups * n),
        pieces((n + kChunk - 1) / kChunk) {}

  // Enough sets for the threads, or so small that it does not matter.
  bool split() const { return pieces > 1 && sets < 4 * threads() && threads() > 1; }

  // ---- statistics -------------------------------------------------------------------------------
  // One set's, as the maps use them: xhat = (x - centre) * rstd + lost, where `lost` carries what
  // rounding the mean to R left out: float32 values around 1e6 come out exact to rounding.
  struct Constants {
    R centre, rstd, lost;
    NW_INLINE P xhat(P x) const {
      return multiply_add<R>(x - centre, splat<P>(rstd), splat<P>(lost));
    }
  };
  NW_INLINE Constants constants(Statistics s) const {
    const R centre = R(s.mean);
    return {centre, R(s.rstd), R(-(s.mean - double(centre)) * s.rstd)};
  }
  NW_INLINE Statistics of(MeanM2 m) const {
    return {m.mean, 1 / std::sqrt(m.m2 / double(n) + call.eps)};
  }

  void add_piece(const T* x, int64_t k, R shift, Sums<R>& sums) const {
    const int64_t first = k * kChunk, last = k + 1 == pieces ? n : first + kChunk;
    const P from = splat<P>(shift);
    const auto terms = [=](int64_t i) NW_LAMBDA_INLINE {
      const P d = load<T>(x + i) - from;
      return Terms<R>{d, d, d};
    };
    // The last piece of a set may be shorter than a vector: its end alone is then summed.
    if (last - first >= W) {
      sums.run(first, last, terms);
      sums.end_chunk();
    } else {
      for (int64_t i = first; i < last; ++i) {
        const double d = double(to_compute(x[i])) - double(shift);
        sums.total_s += d;
        sums.total_q += d * d;
      }
    }
  }
  // Near the values: the mean of the first few. RMS norm sums about 0.
  NW_INLINE R first_shift(const T* x) const {
    if (!call.centred || n < W) return call.centred ? R(to_compute(x[0])) : R(0);
    const P v = load<T>(x);
    R sum = 0;
    for (int i = 0; i < W; ++i) sum += v[i];
    // Equal values must come out as themselves, so that a constant set has deviations of 0.
    const R low = v[0], mean = low + (sum - low * R(W)) / R(W);
    return std::isfinite(mean) ? mean : low;
  }
  NW_INLINE MeanM2 close(const T* x, ShiftedSums total, R shift) const {
    MeanM2 m;
    if (call.centred) {
      m = finish(total, double(shift), double(n));
    } else {
      const bool fits = total.q < 1e300 && (total.q > 1e-30 * double(n) || total.s == 0);
      m = {0, total.q, fits};
    }
    if (m.trusted) return m;
    if (call.centred && total.q < 1e300 && total.q > 1e-30 * double(n)) {
      // The first values lie apart from the others: once more, about the mean that was found.
      const R better = R(m.mean);
      const MeanM2 again = finish(sum(x, better), double(better), double(n));
      if (again.trusted) return again;
    }
    return careful(x);
  }
  __attribute__((noinline)) MeanM2 careful(const T* x) const {
    if (call.centred) return careful_moments(x, 1, n, n, double(n));
    double q = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double v = double(to_compute(x[i]));
      q += v * v;
    }
    return {0, q, true};
  }
  ShiftedSums sum(const T* x, R shift) const {
    Sums<R> sums;
    sums.clear();
    for (int64_t k = 0; k < pieces; ++k) add_piece(x, k, shift, sums);
    return sums.total();
  }
  NW_INLINE void keep(int64_t set, MeanM2 m) const {
    call.moments[set] = double(n);
    call.moments[sets + set] = m.mean;
    call.moments[2 * sets + set] = m.m2;
  }
  // Of set `set`; written down where they are asked for.
  Statistics statistics(int64_t set) const {
    const T* x = static_cast<const T*>(call.x) + set * n;
    const R shift = first_shift(x);
    const MeanM2 m = close(x, sum(x, shift), shift);
    if (call.moments) keep(set, m);
    return of(m);
  }
  // The same of all sets, by all threads, where there are few sets: the same sums in the same order.
  void statistics_split(Statistics* to, ShiftedSums* parts) const {
    const T* x = static_cast<const T*>(call.x);
    parallel(sets * pieces, sets * n, [=, this](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* own = x + t / pieces * n;
        Sums<R> sums;
        sums.clear();
        add_piece(own, t % pieces, first_shift(own), sums);
        parts[t] = sums.total();
      }
    });
    for (int64_t set = 0; set < sets; ++set) {
      ShiftedSums total;
      for (int64_t k = 0; k < pieces; ++k) {
        total.s += parts[set * pieces + k].s;
        total.q += parts[set * pieces + k].q;
      }
      const T* own = x + set * n;
      const MeanM2 m = close(own, total, first_shift(own));
      if (call.moments) keep(set, m);
      to[set] = of(m);
    }
  }

  // ---- columns ----------------------------------------------------------------------------------
  // The parameter of every place of a sample in R: the tensor itself where it is that already.
  const R* column_values(const Vector& v, double absent, R* to) const {
    constexpr int own = std::is_same_v<R, double> ? kFloat64 : kFloat32;
    if (call.length == 1 && v.data && v.dtype == own) return static_cast<const R*>(v.data);
    const int64_t each = call.length, count = call.groups * call.runs;
    for (int64_t c = 0; c < count; ++c) {
      const R value = R(read(v, c, absent));
      for (int64_t i = 0; i < each; ++i) to[c * each + i] = value;
    }
    return to;
  }

  // While a set is written the next one, `length` values on, is fetched into the second level cache,
  // if it leaves room for this one: memory would else be idle.
  static int64_t ahead(int64_t length) {
    return length * int64_t(sizeof(T)) * 6 <= caches.second ? length : 0;
  }

  // ---- writing ----------------------------------------------------------------------------------
  bool streams(int64_t tensors) const {
    return sizeof(T) * W * 2 >= 32 && sets * n * int64_t(sizeof(T)) * tensors > caches.last;
  }
  template <int Outs> NW_INLINE static void put(T* const (&to)[Outs], int64_t i,
                                                const Results<R, Outs>& r) {
    for (int k = 0; k < Outs; ++k) store<T>(to[k] + i, r.v[k]);
  }
  // Lanes [from, from + count) of r, which belongs to place i.
  template <int Outs>
  NW_INLINE static void put_some(T* const (&to)[Outs], int64_t i, const Results<R, Outs>& r,
                                 int64_t from, int64_t count) {
    for (int k = 0; k < Outs; ++k) {
      T lanes[W];
      store<T>(lanes, r.v[k]);
      for (int64_t j = from; j < from + count; ++j) to[k][i + j] = lanes[j];
    }
  }
  // Results for places [begin, end): f(load, i) makes those of the vector at i. Streamed, the lines
  // at either end, which hold a neighbour's values too, are stored as usual.
  template <int Outs, class F>
  NW_INLINE static void write(T* const (&to)[Outs], int64_t begin, int64_t end, bool streaming,
                              const F& f) {
    int64_t i = begin;
    if (end - begin < W) {
      for (; i < end; ++i) put_some<Outs>(to, i, f(LoadOne{}, i), 0, 1);
      return;
    }
    if (streaming) {
      const int64_t from = begin + to_line(to[0] + begin);
      if (from + 4 * kStreamed <= end) {
        for (; i + W <= from; i += W) put<Outs>(to, i, f(LoadVector{}, i));
        if (i < from) put_some<Outs>(to, i, f(LoadVector{}, i), 0, from - i);
        const int64_t until = end - (end - from) % kStreamed;
        for (i = from; i < until; i += 2 * W) {
          const Results<R, Outs> a = f(LoadVector{}, i), b = f(LoadVector{}, i + W);
          for (int k = 0; k < Outs; ++k) stream<T>(to[k] + i, a.v[k], b.v[k]);
        }
        for (; i + W <= end; i += W) put<Outs>(to, i, f(LoadVector{}, i));
        if (i < end) put_some<Outs>(to, end - W, f(LoadVector{}, end - W), W - (end - i), end - i);
        return;
      }
    }
    for (; i + 2 * W <= end; i += 2 * W) {
      const Results<R, Outs> a = f(LoadVector{}, i), b = f(LoadVector{}, i + W);
      put<Outs>(to, i, a);
      put<Outs>(to, i + W, b);
    }
    if (i + W <= end) {
      put<Outs>(to, i, f(LoadVector{}, i));
      i += W;
    }
    if (i < end) put<Outs>(to, end - W, f(LoadVector{}, end - W));  // overlaps: the same values
  }

  // Calls f(c, begin, end) for every stretch of one run in [begin, end), c the run's parameter.
  template <class F> NW_INLINE void each_run(int64_t begin, int64_t end, const F& f) const {
    int64_t r = begin / length;
    for (int64_t i = begin; i < end; ++r) {
      const int64_t stop = (r + 1) * length < end ? (r + 1) * length : end;
      f(r, i, stop);
      i = stop;
    }
  }

  // ---- forward ----------------------------------------------------------------------------------
  struct Scratch {
    R *weight, *bias;
    Statistics* statistics;
    ShiftedSums* parts;
  };
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  int64_t forward_bytes() const {
    return (by_column ? 2 * rounded(columns * int64_t(sizeof(R))) : 0) +
           (pieces > 1 ? rounded(sets * int64_t(sizeof(Statistics))) +
                             rounded(sets * pieces * int64_t(sizeof(ShiftedSums)))
                       : 0);
  }
  Scratch lay_out() const {
    char* at = static_cast<char*>(call.scratch);
    const auto take = [&](int64_t bytes) {
      char* here = at;
      at += rounded(bytes);
      return here;
    };
    Scratch s{};
    if (by_column) {
      s.weight = reinterpret_cast<R*>(take(columns * int64_t(sizeof(R))));
      s.bias = reinterpret_cast<R*>(take(columns * int64_t(sizeof(R))));
    }
    if (pieces > 1) {
      s.statistics = reinterpret_cast<Statistics*>(take(sets * int64_t(sizeof(Statistics))));
      s.parts = reinterpret_cast<ShiftedSums*>(take(sets * pieces * int64_t(sizeof(ShiftedSums))));
    }
    return s;
  }

  template <int Act> void forward() const {
    const Scratch scratch = lay_out();
    const R* weight = by_column ? column_values(call.weight, 1, scratch.weight) : nullptr;
    const R* bias = by_column ? column_values(call.bias, 0, scratch.bias) : nullptr;
    const T* residual = static_cast<const T*>(call.residual);
    const bool streaming = streams(residual ? 3 : 2);
    // Places [begin, end) of a set with these statistics.
    const auto results = [=, this](int64_t set, Statistics s, int64_t begin, int64_t end) {
      const T* x = static_cast<const T*>(call.x) + set * n;
      const T* r = residual ? residual + set * n : nullptr;
      T* const y[1] = {static_cast<T*>(call.y) + set * n};
      const int64_t group = set % call.groups;
      const int code = call.activation;
      const R slope = R(call.slope);
      const T* next = x + ahead(n);
      const auto finished = [=](const auto& load_at, int64_t i, P z) NW_LAMBDA_INLINE {
        if constexpr (Act == kNone) return Results<R, 1>{{z}};
        if (r) z += load_at(r + i);
        if (code == kReLU) z = relu(z);
        else if (code != kNone) z = activate<R>(code, slope, z);
        return Results<R, 1>{{z}};
      };
      if (by_column) {
        const Constants k = constants(s);
        const R *w = weight + group * n, *b = bias + group * n;
        write<1>(y, begin, end, streaming, [=](const auto& load_at, int64_t i) NW_LAMBDA_INLINE {
          __builtin_prefetch(next + i, 0, 2);
          const P z = multiply_add<R>(k.xhat(load_at(x + i)), load_at(w + i), load_at(b + i));
          return finished(load_at, i, z);
        });
      } else {
        each_run(begin, end, [&](int64_t run, int64_t from, int64_t to) {
          const int64_t c = group * runs + run;
          const double scale = s.rstd * read(call.weight, c, 1);
          const R centre = R(s.mean);
          const Affine<R> f = {centre, R(scale),
                               R(read(call.bias, c, 0) - (s.mean - double(centre)) * scale)};
          write<1>(y, from, to, streaming, [=](const auto& load_at, int64_t i) NW_LAMBDA_INLINE {
            __builtin_prefetch(next + i, 0, 2);
            return finished(load_at, i, apply<R>(f, load_at(x + i)));
          });
        });
      }
    };
    if (split()) {
      statistics_split(scratch.statistics, scratch.parts);
      parallel(sets * pieces, sets * n, [=, this](int64_t first, int64_t last) {
        for (int64_t t = last; t-- > first;) {
          const int64_t k = t % pieces, set = t / pieces;
          results(set, scratch.statistics[set], k * kChunk, k + 1 == pieces ? n : (k + 1) * kChunk);
        }
        stream_end();
      });
      return;
    }
    parallel(sets, sets * n, [=, this](int64_t first, int64_t last) {
      for (int64_t set = first; set < last; ++set) results(set, statistics(set), 0, n);
      stream_end();
    });
  }
};

}  // namespace nw::NW_ISA
