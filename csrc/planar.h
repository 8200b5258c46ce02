// Blocks with the channel's values in runs (NCHW, NCL, 5-D): inner >= one vector.
//
// A channel is one task: its moments are taken and its slice is normalized while it is in cache, so
// that memory sees one read and one write. Few channels with large slices are split into chunks and
// take two sweeps. Either way the sums of a slice are those of its chunks, added in order: the same
// bits for any number of threads.
#pragma once
#include <type_traits>

#include "activate.h"
#include "channel.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace nw::NW_ISA {

template <class T> struct Planar {
  using R = Compute<T>;
  using P = Pack<R>;
  static constexpr int W = kLanes<R>;

  const Call& call;
  const int64_t n, stride, run, runs_a_piece, pieces;

  // A run is a row of a channel (inner values), or a part of it if it is long; a chunk is a number
  // of whole runs. 64K elements a chunk: enough tasks for one channel, few sums to add.
  static constexpr int64_t kChunk = 65536;

  explicit Planar(const Call& c)
      : call(c),
        n(c.outer * c.inner),
        stride(c.channels * c.inner),
        run(c.inner <= 2 * kChunk ? c.inner : kChunk),
        runs_a_piece(c.inner <= 2 * kChunk ? (kChunk / c.inner > 0 ? kChunk / c.inner : 1) : 1),
        pieces(c.inner <= 2 * kChunk ? (c.outer + runs_a_piece - 1) / runs_a_piece
                                     : c.outer * (c.inner / kChunk)) {}

  // Calls f(offset, length) for each run of chunk k of channel c.
  template <class F> NW_INLINE void runs(int64_t c, int64_t k, const F& f) const {
    if (run == call.inner) {
      const int64_t first = k * runs_a_piece;
      const int64_t last = first + runs_a_piece < call.outer ? first + runs_a_piece : call.outer;
      for (int64_t o = first; o < last; ++o) f(o * stride + c * call.inner, run);
    } else {
      const int64_t parts = call.inner / kChunk, o = k / parts, part = k % parts;
      // The last part of a row takes the remainder, so no part is shorter than a vector.
      const int64_t length = part + 1 == parts ? call.inner - part * kChunk : kChunk;
      f(o * stride + c * call.inner + part * kChunk, length);
    }
  }

  // Runs of a small slice are far apart in memory and short, which the processor's own prefetcher
  // does not follow; but the next channel's runs follow this one's. While this channel is summed,
  // the next is fetched (backward of (32, 1024, 14, 14), two threads: 1.25 times as fast).
  bool fetch_next() const { return n * int64_t(sizeof(T)) <= 131072; }

  bool split() const {  // too few channels to keep the threads busy one channel each
    return pieces > 1 && call.channels < 4 * threads() && threads() > 1;
  }

  // ---- moments ----------------------------------------------------------------------------------
  double sample_mean(int64_t c) const {
    const T* x = static_cast<const T*>(call.x);
    const int64_t count = sample_count(n), step = n / count;
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * step, o = at / call.inner;
      total += to_compute(x[o * stride + c * call.inner + at - o * call.inner]);
    }
    return total / double(count);
  }

  ShiftedSums chunk_sums(int64_t c, int64_t k, R shift) const {
    const T* x = static_cast<const T*>(call.x);
    const P lane = lane_numbers<R>();
    P s[4] = {}, q[4] = {};
    ShiftedSums total;
    int64_t used = 0;
    // Partial sums of at most 64 terms a lane in R, then on in double: the rounding of the sums
    // stays below that of the values.
    const auto flush = [&]() NW_LAMBDA_INLINE {
      total.s += lane_sum<R>((s[0] + s[1]) + (s[2] + s[3]));
      total.q += lane_sum<R>((q[0] + q[1]) + (q[2] + q[3]));
      for (int j = 0; j < 4; ++j) s[j] = q[j] = P{};
      used = 0;
    };
    const auto add = [&](int j, P v) NW_LAMBDA_INLINE {
      s[j] += v;
      q[j] += v * v;
    };
    const bool fetch = fetch_next();
    runs(c, k, [&](int64_t at, int64_t length) NW_LAMBDA_INLINE {
      const T* p = x + at;
      if (fetch) prefetch(p + length, length);
      int64_t left = length;
      while (left >= 4 * W) {
        int64_t steps = left / (4 * W);
        if (steps > 64 - used) steps = 64 - used;
        for (int64_t i = 0; i < steps; ++i, p += 4 * W) {
          add(0, load<T>(p) - shift);
          add(1, load<T>(p + W) - shift);
          add(2, load<T>(p + 2 * W) - shift);
          add(3, load<T>(p + 3 * W) - shift);
        }
        left -= steps * 4 * W;
        used += steps;
        if (used >= 64) flush();
      }
      for (int j = 0; left >= W; left -= W, p += W, ++j) add(j, load<T>(p) - shift);
      if (left > 0) {  // the last vector of the run, without the lanes already counted
        const P v = load<T>(p + left - W) - shift;
        add(3, lane >= R(W - left) ? v : P{});
      }
      if (++used >= 64) flush();
    });
    flush();
    return total;
  }

  void finish_channel(int64_t c, ShiftedSums sums, R shift) const {
    MeanM2 m = finish(sums, double(shift), double(n));
    if (!m.trusted)
      m = careful_moments(static_cast<const T*>(call.x) + c * call.inner, call.outer, stride,
                          call.inner);
    write_moments(call, c, double(n), m);
  }

  void channel_moments(int64_t c) const {
    const R shift = R(sample_mean(c));
    ShiftedSums sums;
    for (int64_t k = 0; k < pieces; ++k) {
      const ShiftedSums part = chunk_sums(c, k, shift);
      sums.s += part.s;
      sums.q += part.q;
    }
    finish_channel(c, sums, shift);
  }

  // A pair of doubles for each (channel, chunk), or the maps of the channels.
  int64_t scratch_bytes() const {
    const int64_t sums = pieces * int64_t(sizeof(ShiftedSums)), maps = 5 * int64_t(sizeof(R));
    return call.channels * (sums > maps ? sums : maps);
  }

  void moments_split() const {
    ShiftedSums* parts = static_cast<ShiftedSums*>(call.scratch);
    parallel(call.channels * pieces, n * call.channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i / pieces;
        parts[i] = chunk_sums(c, i % pieces, R(sample_mean(c)));
      }
    });
    for (int64_t c = 0; c < call.channels; ++c) {
      ShiftedSums sums;
      for (int64_t k = 0; k < pieces; ++k) {
        sums.s += parts[c * pieces + k].s;
        sums.q += parts[c * pieces + k].q;
      }
      finish_channel(c, sums, R(sample_mean(c)));
    }
  }

  void moments() const {
    if (split()) return moments_split();
    parallel(call.channels, n * call.channels, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) channel_moments(c);
    });
  }

  // ---- forward ----------------------------------------------------------------------------------
  // Streaming stores pay for outputs that will not fit in the last level cache beside x, in runs of
  // many whole lines.
  bool streams() const {
    return std::is_same_v<T, float> && run >= 128 &&
           n * call.channels * int64_t(2 * sizeof(T)) > last_level_cache_bytes();
  }

  // to[i] = one(i) for a run; one(i) makes the vector at i. Overlaps the last vector with the one
  // before it rather than to have a tail: the values are the same.
  template <class One>
  NW_INLINE static void write_run(T* to, int64_t length, bool streaming, const One& one) {
    constexpr int64_t kPerLine = kLine / int64_t(sizeof(T)) > W ? kLine / int64_t(sizeof(T)) : W;
    int64_t i = 0;
    if (streaming) {
      const int64_t head = to_line(to);
      for (; i < head; i += W) store<T>(to + i, one(i));
      i = head;
      for (; i + kPerLine <= length; i += kPerLine)
        for (int64_t j = 0; j < kPerLine; j += W) stream<T>(to + i + j, one(i + j));
    } else {
      for (; i + 2 * W <= length; i += 2 * W) {
        const P a = one(i), b = one(i + W);
        store<T>(to + i, a);
        store<T>(to + i + W, b);
      }
    }
    for (; i + W <= length; i += W) store<T>(to + i, one(i));
    if (i < length) store<T>(to + length - W, one(length - W));
  }

  template <int Act, bool Residual>
  NW_INLINE P forward(const Affine<R>& f, int code, R slope, const T* x, const T* r) const {
    P z = apply<R>(f, load<T>(x));
    if constexpr (Residual) z += load<T>(r);
    if constexpr (Act == kNone) return z;
    if constexpr (Act == kReLU) return relu(z);
    return activate<R>(code, slope, z);
  }

  template <int Act, bool Residual>
  NW_INLINE void normalize_run(const Affine<R>& f, int64_t at, int64_t length, bool streaming) const {
    const T* x = static_cast<const T*>(call.x) + at;
    const T* r = static_cast<const T*>(call.residual) + (Residual ? at : 0);
    const int code = call.activation;
    const R slope = R(call.slope);
    write_run(static_cast<T*>(call.y) + at, length, streaming, [=, this](int64_t i) NW_LAMBDA_INLINE {
      return forward<Act, Residual>(f, code, slope, x + i, Residual ? r + i : nullptr);
    });
  }
  template <int Act, bool Residual>
  void normalize_chunk(int64_t c, int64_t k, Statistics statistics, bool streaming) const {
    const Affine<R> f = affine<R>(call, c, statistics);
    runs(c, k, [=, this](int64_t at, int64_t length) NW_LAMBDA_INLINE {
      normalize_run<Act, Residual>(f, at, length, streaming);
    });
  }

  // By given statistics: straight through memory, in the order in which it lies.
  template <int Act, bool Residual> void normalize_all() const {
    const bool streaming = streams();
    Affine<R>* maps = static_cast<Affine<R>*>(call.scratch);
    for (int64_t c = 0; c < call.channels; ++c) maps[c] = affine<R>(call, c, from_vectors(call, c));
    in_order([=, this](int64_t c, int64_t at, int64_t length) NW_LAMBDA_INLINE {
      normalize_run<Act, Residual>(maps[c], at, length, streaming);
    });
  }

  // Calls f(channel, offset, length) for pieces of rows, in the order of memory.
  template <class F> void in_order(const F& f) const {
    const int64_t parts = run == call.inner ? 1 : call.inner / kChunk;
    const int64_t rows = call.outer * call.channels;
    parallel(rows * parts, n * call.channels, [=, this](int64_t begin, int64_t end) {
      int64_t row = begin / parts, part = begin % parts, c = row % call.channels;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = part * kChunk;
        f(c, row * call.inner + first, part + 1 == parts ? call.inner - first : kChunk);
        if (++part == parts) {
          part = 0;
          ++row;
          if (++c == call.channels) c = 0;
        }
      }
      stream_end();
    });
  }

  template <int Act, bool Residual> void forward_all(bool train) const {
    if (!train) return normalize_all<Act, Residual>();
    const bool streaming = streams();
    if (split()) {
      moments_split();
      parallel(call.channels * pieces, n * call.channels, [=, this](int64_t begin, int64_t end) {
        for (int64_t i = end; i-- > begin;) {  // backwards: what was read last is still in cache
          const int64_t c = i / pieces;
          normalize_chunk<Act, Residual>(c, i % pieces, from_moments(call, c), streaming);
        }
        stream_end();
      });
      return;
    }
    parallel(call.channels, n * call.channels, [=, this](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        channel_moments(c);
        const Statistics s = from_moments(call, c);
        for (int64_t k = pieces; k-- > 0;) normalize_chunk<Act, Residual>(c, k, s, streaming);
      }
      stream_end();
    });
  }

  // ---- backward ---------------------------------------------------------------------------------
  template <int Act> ShiftedSums chunk_gradient_sums(int64_t c, int64_t k, Statistics st) const {
    const Affine<R> f = affine<R>(call, c, st);
    const Upstream<T> up(call);
    const T* x = static_cast<const T*>(call.x);
    const P lane = lane_numbers<R>();
    const auto dz = [=](int64_t i, P xv) NW_LAMBDA_INLINE {
      return up.template dz<Act>(i, LoadVector{}, [=] { return apply<R>(f, xv); });
    };
    P s[2] = {}, q[2] = {};
    ShiftedSums total;
    int64_t used = 0;
    const auto flush = [&]() NW_LAMBDA_INLINE {
      total.s += lane_sum<R>(s[0] + s[1]);
      total.q += lane_sum<R>(q[0] + q[1]);
      for (int j = 0; j < 2; ++j) s[j] = q[j] = P{};
      used = 0;
    };
    const bool fetch = fetch_next();
    runs(c, k, [&](int64_t at, int64_t length) NW_LAMBDA_INLINE {
      if (fetch) prefetch(x + at + length, length);  // dy: in gradient_chunk, to spread the reads
      int64_t i = 0;
      const auto add = [&](int j, int64_t i) NW_LAMBDA_INLINE {
        const P xv = load<T>(x + at + i);
        const P g = dz(at + i, xv);
        s[j] += g;
        q[j] += g * (xv - f.centre);
      };
      while (i + 2 * W <= length) {
        int64_t steps = (length - i) / (2 * W);
        if (steps > 64 - used) steps = 64 - used;
        for (int64_t j = 0; j < steps; ++j, i += 2 * W) {
          add(0, i);
          add(1, i + W);
        }
        used += steps;
        if (used >= 64) flush();
      }
      if (i + W <= length) {
        add(0, i);
        i += W;
      }
      if (i < length) {
        const P xv = load<T>(x + at + length - W);
        const P g = dz(at + length - W, xv);
        const P kept = lane >= R(W - (length - i)) ? g : P{};
        s[1] += kept;
        // Not kept * (x - centre): 0 * inf of a lane that belongs to the previous vector is NaN.
        q[1] += lane >= R(W - (length - i)) ? g * (xv - f.centre) : P{};
      }
      if (++used >= 64) flush();
    });
    flush();
    return total;
  }

  template <int Act>
  NW_INLINE void gradient_run(const Affine<R>& f, const Gradient<R>& g, int64_t at, int64_t length,
                              bool streaming) const {
    const Upstream<T> up(call);
    const T* x = static_cast<const T*>(call.x) + at;
    T* dr = call.dresidual ? static_cast<T*>(call.dresidual) + at : nullptr;
    write_run(static_cast<T*>(call.dx) + at, length, streaming, [=](int64_t i) NW_LAMBDA_INLINE {
      const P xv = load<T>(x + i);
      const P z = up.template dz<Act>(at + i, LoadVector{}, [=] { return apply<R>(f, xv); });
      if (dr) store<T>(dr + i, z);
      return (z - ((xv - f.centre) * g.slope + g.offset)) * f.scale;
    });
  }
  template <int Act>
  void gradient_chunk(int64_t c, int64_t k, Statistics st, bool streaming) const {
    const Affine<R> f = affine<R>(call, c, st);
    const Gradient<R> g = gradient<R>(call, c, st);
    const bool fetch = fetch_next();
    runs(c, k, [=, this](int64_t at, int64_t length) NW_LAMBDA_INLINE {
      if (fetch) prefetch(static_cast<const T*>(call.dy) + at + length, length);
      gradient_run<Act>(f, g, at, length, streaming);
    });
  }
  // By given sums: straight through memory, as normalize_all.
  template <int Act> void gradient_all(bool train) const {
    struct Maps {
      Affine<R> f;
      Gradient<R> g;
    };
    const bool streaming = streams();
    Maps* maps = static_cast<Maps*>(call.scratch);
    for (int64_t c = 0; c < call.channels; ++c) {
      const Statistics st = train ? from_moments(call, c) : from_vectors(call, c);
      maps[c] = {affine<R>(call, c, st), gradient<R>(call, c, st)};
    }
    in_order([=, this](int64_t c, int64_t at, int64_t length) NW_LAMBDA_INLINE {
      gradient_run<Act>(maps[c].f, maps[c].g, at, length, streaming);
    });
  }

  template <int Act> void backward_all(bool reduce, bool input, bool train) const {
    if (!reduce) return gradient_all<Act>(train);
    const bool streaming = input && streams();
    const auto statistics = [=, this](int64_t c) {
      return train ? from_moments(call, c) : from_vectors(call, c);
    };
    if (split()) {
      ShiftedSums* parts = static_cast<ShiftedSums*>(call.scratch);
      parallel(call.channels * pieces, n * call.channels, [=, this](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          parts[i] = chunk_gradient_sums<Act>(i / pieces, i % pieces, statistics(i / pieces));
      });
      for (int64_t c = 0; c < call.channels; ++c) {
        ShiftedSums t;
        for (int64_t k = 0; k < pieces; ++k) {
          t.s += parts[c * pieces + k].s;
          t.q += parts[c * pieces + k].q;
        }
        write_sums<R>(call, c, t.s, t.q, statistics(c));
      }
      if (input) gradient_all<Act>(train);
      return;
    }
    parallel(call.channels, n * call.channels, [=, this](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Statistics st = statistics(c);
        ShiftedSums t;
        for (int64_t k = 0; k < pieces; ++k) {
          const ShiftedSums part = chunk_gradient_sums<Act>(c, k, st);
          t.s += part.s;
          t.q += part.q;
        }
        write_sums<R>(call, c, t.s, t.q, st);
        if (input)
          for (int64_t k = pieces; k-- > 0;) gradient_chunk<Act>(c, k, st, streaming);
      }
      stream_end();
    });
  }
};

}  // namespace nw::NW_ISA
