// Blocks whose rows hold all channels (channels_last, (N, C), and runs shorter than a vector).
//
// The block is read as a matrix of `columns` columns, a multiple of the vector: `group` rows of
// (channels, inner) side by side, so that no row has a tail. Column v belongs to channel
// v / inner % channels. The few rows that do not fill a group are summed one by one. Sums are kept
// for each (chunk of rows, column) and added in order: the same bits for any number of threads.
#pragma once
#include <type_traits>

#include "activate.h"
#include "channel.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace nw::NW_ISA {

NW_INLINE int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t t = a % b;
    a = b;
    b = t;
  }
  return a;
}
NW_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
NW_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T> struct Rows {
  using R = Compute<T>;
  using P = Pack<R>;
  static constexpr int W = kLanes<R>;
  static constexpr int64_t kTile = 1024;   // columns whose sums stay in the first level cache
  // Narrow rows are summed four at a time, which saves loads and stores of the sums. Wide ones are
  // not: four streams in one page confuse the prefetcher (backward of (32, 256, 56, 56),
  // channels_last: 0.87 of torch.nn's speed with four, 1.15 with one).
  static constexpr int64_t kNarrow = 128;
  static constexpr int64_t kFlush = 64;    // rows summed in R before they go on in double

  const Call& call;
  const int64_t row, n, group, columns, rows, rest, chunk, chunks, tiles;

  explicit Rows(const Call& c)
      : call(c),
        row(c.channels * c.inner),
        n(c.outer * c.inner),
        group(pick_group(row)),
        columns(row * group),
        rows(c.outer / group),
        rest(rows * group),  // first row of the remainder
        chunk(at_least(kFlush, 262144 / columns)),
        chunks((rows + chunk - 1) / chunk),
        tiles((columns + kTile - 1) / kTile) {}

  // The smallest number of rows that fills whole vectors; of narrow rows as many as make a loop.
  static int64_t pick_group(int64_t row) {
    int64_t g = W / greatest_common_divisor(row, W);
    while (g * row < 8 * W) g *= 2;
    return g;
  }
  NW_INLINE int64_t channel_of(int64_t column) const { return column / call.inner % call.channels; }

  // ---- scratch: shift, sums of the chunks, constants of the columns ------------------------------
  int64_t sums_count() const { return at_least(chunks, 1) * 2 * columns; }
  int64_t scratch_bytes() const {
    return int64_t(sizeof(double)) * (sums_count() + 3 * call.channels + 6 * columns) + 64;
  }
  double* partial() const { return static_cast<double*>(call.scratch); }
  double* channel_sums() const { return partial() + sums_count(); }                 // (2, channels)
  double* rstd() const { return channel_sums() + 2 * call.channels; }                // (channels)
  R* column_constants() const {                                                     // (5, columns)
    return reinterpret_cast<R*>(rstd() + call.channels);
  }
  R* column_shift() const { return column_constants() + 5 * columns; }              // (columns)

  // Each column gets its channel's constants, `Count` of them: of_channel(c, values) computes them
  // once a channel; column v's lie at to[v], to[columns + v], …
  template <int Count, class F> void fill(R* to, const F& of_channel) const {
    int64_t v = 0;
    for (int64_t c = 0; c < call.channels; ++c) {
      R values[Count];
      of_channel(c, values);
      for (int64_t i = 0; i < call.inner; ++i, ++v)
        for (int j = 0; j < Count; ++j) to[j * columns + v] = values[j];
    }
    for (int j = 0; j < Count; ++j) {
      R* part = to + j * columns;
      for (int64_t u = v; u < columns; ++u) part[u] = part[u - row];
    }
  }

  // Adds up term_a and term_b of each row for every column. term(v, i): the two packs at column v,
  // offset i.
  template <class Term> void sum_columns(const Term& term_) const {
    parallel(chunks * tiles, rows * columns, [=, this](int64_t begin, int64_t end) {
      const Term term = term_;
      const int64_t columns = this->columns;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t k = task / tiles, first = (task % tiles) * kTile;
        const int64_t width = at_most(kTile, columns - first);
        const int64_t last = at_most((k + 1) * chunk, rows);
        double* into = partial() + k * 2 * columns + first;
        for (int64_t v = 0; v < width; ++v) into[v] = into[columns + v] = 0;
        alignas(64) R s[kTile], q[kTile];
        // At most 16 additions in R either way, then on in double.
        const int64_t flush = columns < kNarrow ? kFlush : kFlush / 4;
        for (int64_t r = k * chunk; r < last; r += flush) {
          const int64_t stop = at_most(r + flush, last);
          for (int64_t v = 0; v < width; ++v) s[v] = q[v] = R(0);
          int64_t o = r;
          for (; kNarrow > columns && o + 4 <= stop; o += 4) {
            const int64_t base = o * columns + first;
            for (int64_t v = 0; v < width; v += W) {
              P a[4], b[4];
              for (int j = 0; j < 4; ++j) term(first + v, base + j * columns + v, a[j], b[j]);
              store<R>(s + v, load<R>(s + v) + ((a[0] + a[1]) + (a[2] + a[3])));
              store<R>(q + v, load<R>(q + v) + ((b[0] + b[1]) + (b[2] + b[3])));
            }
          }
          for (; o < stop; ++o) {
            const int64_t base = o * columns + first;
            for (int64_t v = 0; v < width; v += W) {
              P a, b;
              term(first + v, base + v, a, b);
              store<R>(s + v, load<R>(s + v) + a);
              store<R>(q + v, load<R>(q + v) + b);
            }
          }
          for (int64_t v = 0; v < width; ++v) into[v] += double(s[v]);
          for (int64_t v = 0; v < width; ++v) into[columns + v] += double(q[v]);
        }
      }
      stream_end();
    });
    // Chunks in order, then the columns of a channel in order.
    double* total = partial();
    for (int64_t k = 1; k < chunks; ++k) {
      const double* part = partial() + k * 2 * columns;
      for (int64_t v = 0; v < 2 * columns; ++v) total[v] += part[v];
    }
    double *s = channel_sums(), *q = s + call.channels;
    for (int64_t c = 0; c < 2 * call.channels; ++c) s[c] = 0;
    if (rows > 0) {
      for (int64_t v = 0; v < columns; v += row)
        for (int64_t c = 0; c < call.channels; ++c)
          for (int64_t i = 0; i < call.inner; ++i) {
            s[c] += total[v + c * call.inner + i];
            q[c] += total[columns + v + c * call.inner + i];
          }
    }
  }

  // ---- moments ----------------------------------------------------------------------------------
  void moments() const {
    const T* x = static_cast<const T*>(call.x);
    R* shift = column_shift();
    // The shift of a channel: the mean of some of its values, spread over the rows.
    const int64_t samples = sample_count(call.outer), step = call.outer / samples;
    double *s = channel_sums(), *q = s + call.channels;
    for (int64_t c = 0; c < call.channels; ++c) s[c] = 0;
    for (int64_t k = 0; k < samples; ++k)
      for (int64_t c = 0; c < call.channels; ++c)
        s[c] += double(to_compute(x[k * step * row + c * call.inner]));
    fill<1>(shift, [&](int64_t c, R* to) { to[0] = R(s[c] / double(samples)); });

    sum_columns([=](int64_t v, int64_t i, P& a, P& b) NW_LAMBDA_INLINE {
      a = load<T>(x + i) - load<R>(shift + v);
      b = a * a;
    });
    for (int64_t o = rest; o < call.outer; ++o)
      for (int64_t c = 0, i = o * row; c < call.channels; ++c) {
        const double from = double(shift[c * call.inner]);
        for (int64_t l = 0; l < call.inner; ++l, ++i) {
          const double d = double(to_compute(x[i])) - from;
          s[c] += d;
          q[c] += d * d;
        }
      }
    for (int64_t c = 0; c < call.channels; ++c) {
      MeanM2 m = finish({s[c], q[c]}, double(shift[c * call.inner]), double(n));
      if (!m.trusted) m = careful_moments(x + c * call.inner, call.outer, row, call.inner, double(n));
      write_moments(call, c, double(n), m);
    }
  }

  // ---- maps -------------------------------------------------------------------------------------
  Statistics statistics(int64_t c, bool train) const {
    return {train ? call.moments[call.channels + c] : read(call.mean, c, 0), rstd()[c]};
  }
  void fill_affine(bool train) const {
    double* r = rstd();
    if (train) {  // a loop of its own, which the compiler turns into vector roots and divisions
      const double *count = call.moments, *m2 = count + 2 * call.channels;
      for (int64_t c = 0; c < call.channels; ++c)
        r[c] = 1 / std::sqrt(m2[c] / count[c] + call.eps);
    } else {
      for (int64_t c = 0; c < call.channels; ++c)
        r[c] = 1 / std::sqrt(read(call.var, c, 1) + call.eps);
    }
    fill<3>(column_constants(), [&](int64_t c, R* to) {
      const Affine<R> f = affine<R>(call, c, statistics(c, train));
      to[0] = f.centre;
      to[1] = f.scale;
      to[2] = f.offset;
    });
  }

  bool streams(const void* to, int64_t tensors) const {
    return sizeof(T) * W >= kVectorBytes && uintptr_t(to) % kVectorBytes == 0 &&
           n * call.channels * int64_t(sizeof(T)) * tensors * call.parts > caches.last;
  }
  template <bool Stream> NW_INLINE static void put(T* to, P v) {
    if constexpr (Stream)
      stream<T>(to, v);
    else
      store<T>(to, v);
  }

  // Calls body(v, i) for every vector: column v, offset i; and one(v, i) for the values that are
  // left over. The last rows first, block by block: a pass over the sums went forwards, and its end
  // is still in cache. Inside a block forwards, as the prefetcher likes it.
  template <class Body, class One> void map(const Body& body, const One& one) const {
    const int64_t height = at_least(1, 16384 / columns), blocks = (rows + height - 1) / height;
    parallel(blocks, rows * columns, [=, this](int64_t begin, int64_t end) {
      const int64_t width = columns;
      const Body each = body;
      for (int64_t k = end; k-- > begin;) {
        const int64_t last = at_most((k + 1) * height, rows);
        for (int64_t o = k * height; o < last; ++o)
          for (int64_t v = 0; v < width; v += W) each(v, o * width + v);
      }
      stream_end();
    });
    for (int64_t i = rest * row; i < call.outer * row; ++i) one(i % row, i);
  }

  template <int Act, bool Residual> void forward_all(bool train) const {
    if (train) moments();
    fill_affine(train);
    const R *centre = column_constants(), *scale = centre + columns, *offset = scale + columns;
    const T* x = static_cast<const T*>(call.x);
    const T* r = static_cast<const T*>(call.residual);
    T* y = static_cast<T*>(call.y);
    const int code = call.activation;
    const R slope = R(call.slope);
    const auto finish = [=](P z) NW_LAMBDA_INLINE {
      if constexpr (Act == kNone) return z;
      if constexpr (Act == kReLU) return relu(z);
      return activate<R>(code, slope, z);
    };
    const auto one = [=](int64_t v, int64_t i) {
      R z = (to_compute(x[i]) - centre[v]) * scale[v] + offset[v];
      if (Residual && r) z += to_compute(r[i]);
      y[i] = from_compute<T>(finish(splat<P>(z))[0]);
    };
    const auto vector = [=](int64_t v, int64_t i) NW_LAMBDA_INLINE {
      P z = apply<R>(load<R>(centre + v), load<R>(scale + v), load<R>(offset + v), load<T>(x + i));
      if constexpr (Residual)
        if (Act != kAny || r) z += load<T>(r + i);
      return finish(z);
    };
    if (streams(y, 2))
      map([=](int64_t v, int64_t i) NW_LAMBDA_INLINE { put<true>(y + i, vector(v, i)); }, one);
    else
      map([=](int64_t v, int64_t i) NW_LAMBDA_INLINE { put<false>(y + i, vector(v, i)); }, one);
  }

  template <int Act> void backward_all(bool reduce, bool input, bool train) const {
    fill_affine(train);
    R* k = column_constants();
    const R *centre = k, *scale = k + columns, *shift = k + 2 * columns;
    const T* x = static_cast<const T*>(call.x);
    const Upstream<T> up(call);
    const auto dz = [=](int64_t v, int64_t i, P xv) NW_LAMBDA_INLINE {
      return up.template dz<Act>(i, LoadVector{}, [=] {
        return apply<R>(load<R>(centre + v), load<R>(scale + v), load<R>(shift + v), xv);
      });
    };
    // Values that are left over go through the same code, one value in all lanes.
    const LoadOne single;
    const auto dz_one = [=](int64_t v, int64_t i, P xv) {
      return up.template dz<Act>(i, single, [=] {
        return apply<R>(single(centre + v), single(scale + v), single(shift + v), xv);
      });
    };
    T* dx = static_cast<T*>(call.dx);
    T* dr = static_cast<T*>(call.dresidual);
    const bool streaming = input && streams(dx, 3) && (!dr || streams(dr, 3));
    // With constant statistics dx needs no sums: it is written in the loop that takes them.
    const bool together = reduce && input && call.constant;
    if (reduce) {
      const auto sum = [&](const auto& also) {
        sum_columns([=](int64_t v, int64_t i, P& a, P& b) NW_LAMBDA_INLINE {
          const P xv = load<T>(x + i);
          a = dz(v, i, xv);
          b = a * (xv - load<R>(centre + v));
          also(v, i, a);
        });
      };
      if (together)
        sum([=](int64_t v, int64_t i, P g) NW_LAMBDA_INLINE {
          const P d = g * load<R>(scale + v);
          if (streaming) {
            put<true>(dx + i, d);
            if (dr) put<true>(dr + i, g);
          } else {
            put<false>(dx + i, d);
            if (dr) put<false>(dr + i, g);
          }
        });
      else
        sum([](int64_t, int64_t, P) NW_LAMBDA_INLINE {});
      double *s = channel_sums(), *q = s + call.channels;
      for (int64_t o = rest; o < call.outer; ++o)
        for (int64_t v = 0, i = o * row; v < row; ++v, ++i) {
          const P xv = single(x + i), g = dz_one(v, i, xv);
          const int64_t c = channel_of(v);
          s[c] += double(g[0]);
          q[c] += double(g[0]) * (double(xv[0]) - double(centre[v]));
        }
      for (int64_t c = 0; c < call.channels; ++c)
        write_sums<R>(call, c, s[c], q[c], statistics(c, train));
    }
    if (!input) return;
    R *slope = k + 3 * columns, *offset = k + 4 * columns;
    fill<2>(slope, [&](int64_t c, R* to) {
      const Gradient<R> g = gradient<R>(call, c, statistics(c, train));
      to[0] = g.slope;
      to[1] = g.offset;
    });
    const auto one = [=](int64_t v, int64_t i) {
      const P xv = single(x + i), g = dz_one(v, i, xv);
      if (dr) dr[i] = from_compute<T>(g[0]);
      dx[i] = from_compute<T>(R((g[0] - ((xv[0] - centre[v]) * slope[v] + offset[v])) * scale[v]));
    };
    if (together) {
      for (int64_t i = rest * row; i < call.outer * row; ++i) one(i % row, i);
      return;
    }
    const auto write = [&](auto streams) {
      constexpr bool Stream = decltype(streams)::value;
      map(
          [=](int64_t v, int64_t i) NW_LAMBDA_INLINE {
            const P xv = load<T>(x + i), g = dz(v, i, xv);
            if (dr) put<Stream>(dr + i, g);
            put<Stream>(dx + i, (g - ((xv - load<R>(centre + v)) * load<R>(slope + v) +
                                      load<R>(offset + v))) * load<R>(scale + v));
          },
          one);
    };
    if (streaming)
      write(std::true_type{});
    else
      write(std::false_type{});
  }
};

}  // namespace nw::NW_ISA
