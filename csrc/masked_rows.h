// Batch norm with a mask where the channels lie side by side: padded sequences (N, L, C), pictures
// channels_last. A row takes part or it does not, so it is read or skipped whole.
#pragma once
#include "activate.h"
#include "channel.h"
#include "mask.h"
#include "parallel.h"
#include "rows.h"
#include "write.h"

namespace nw::NW_ISA {

template <class T> struct MaskedRows {
  using R = Compute<T>;
  using P = Pack<R>;
  static constexpr int W = kLanes<R>;
  static constexpr int64_t kTile = 1024;  // columns whose sums stay in the first level cache
  static constexpr int64_t kFlush = 16;   // rows summed in R before they go on in double

  const Call& call;
  const int64_t rows, columns, chunk, chunks, tiles;

  explicit MaskedRows(const Call& c)
      : call(c),
        rows(c.outer),
        columns(c.channels),
        chunk(at_least(64, 262144 / columns)),
        chunks((rows + chunk - 1) / chunk),
        tiles((columns + kTile - 1) / kTile) {}

  // ---- scratch: sums of the chunks, constants of the columns -------------------------------------
  int64_t scratch_bytes() const {
    return int64_t(sizeof(double)) * (chunks * 2 * columns + 6 * columns);
  }
  double* partial() const { return static_cast<double*>(call.scratch); }  // (chunks, 2, columns)
  R* constants() const { return reinterpret_cast<R*>(partial() + chunks * 2 * columns); }

  // Vectors of a stretch of columns, then what is left: the last vector once more, of which only
  // lanes from `fresh` on are new, or of less than a vector one column after the other.
  // f(v, load, fresh).
  template <class F> NW_INLINE static void each_vector(int64_t width, const F& f) {
    int64_t v = 0;
    for (; v + W <= width; v += W) f(v, LoadVector{}, std::integral_constant<bool, true>{}, 0);
    if (v == width) return;
    if (width >= W) {
      f(width - W, LoadVector{}, std::integral_constant<bool, false>{}, W - (width - v));
    } else {
      for (; v < width; ++v) f(v, LoadOne{}, std::integral_constant<bool, true>{}, 0);
    }
  }

  // Adds up the two terms of each row that takes part, for every column: term(v, i, load) gives them
  // at column v, offset i. The sums are partial()[v] and partial()[columns + v] then.
  template <class Term> void sum_columns(const Term& term_) const {
    parallel(chunks * tiles, rows * columns, [=, this](int64_t begin, int64_t end) {
      const Term term = term_;
      const int64_t columns = this->columns;
      const uint8_t* const mask = call.mask;
      alignas(64) R s[kTile], q[kTile];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t k = task / tiles, first = (task % tiles) * kTile;
        const int64_t width = at_most(kTile, columns - first);
        const int64_t last = at_most((k + 1) * chunk, rows);
        double* const into = partial() + k * 2 * columns + first;
        for (int64_t v = 0; v < width; ++v) into[v] = into[columns + v] = 0;
        int64_t terms = 0;
        const auto flush = [&] {
          for (int64_t v = 0; v < width; ++v) into[v] += double(s[v]);
          for (int64_t v = 0; v < width; ++v) into[columns + v] += double(q[v]);
          terms = 0;
        };
        for (int64_t r = k * chunk; r < last; ++r) {
          if (!mask[r]) continue;
          if (terms == 0)
            for (int64_t v = 0; v < width; ++v) s[v] = q[v] = R(0);
          const int64_t base = r * columns + first;
          each_vector(width, [&](int64_t v, auto load_, auto whole, int fresh) NW_LAMBDA_INLINE {
            P a, b;
            term(first + v, base + v, load_, a, b);
            if constexpr (std::is_same_v<decltype(load_), LoadOne>) {
              s[v] += a[0];
              q[v] += b[0];
              return;
            }
            if constexpr (!decltype(whole)::value) {
              const auto here = lane_numbers<R>() >= R(fresh);
              a = here ? a : P{};
              b = here ? b : P{};
            }
            store<R>(s + v, load<R>(s + v) + a);
            store<R>(q + v, load<R>(q + v) + b);
          });
          if (++terms == kFlush) flush();
        }
        if (terms) flush();
      }
    });
    double* const total = partial();
    for (int64_t k = 1; k < chunks; ++k) {
      const double* part = total + k * 2 * columns;
      for (int64_t v = 0; v < 2 * columns; ++v) total[v] += part[v];
    }
  }

  void moments() const { moments(look_through(call.mask, rows, 1)); }
  void moments(const Taken& taken) const {
    const T* const x = static_cast<const T*>(call.x);
    R* const shift = constants();
    const double n = double(taken.n);
    if (taken.n == 0) {
      for (int64_t c = 0; c < columns; ++c) write_moments(call, c, 0, {0, 0, true});
      return;
    }
    double* const s = partial();
    for (int64_t c = 0; c < columns; ++c) s[c] = 0;
    for (int64_t k = 0; k < taken.samples; ++k)
      for (int64_t c = 0; c < columns; ++c)
        s[c] += double(to_compute(x[taken.sample[k] * columns + c]));
    for (int64_t c = 0; c < columns; ++c) shift[c] = R(s[c] / double(taken.samples));
    sum_columns([=](int64_t v, int64_t i, const auto& load_, P& a, P& b) NW_LAMBDA_INLINE {
      a = load_(x + i) - load_(shift + v);
      b = a * a;
    });
    for (int64_t c = 0; c < columns; ++c) {
      MeanM2 m = finish({s[c], s[columns + c]}, double(shift[c]), n);
      if (!m.trusted) m = careful_moments(x + c, rows, columns, 1, n, call.mask);
      write_moments(call, c, n, m);
    }
  }

  // ---- maps -------------------------------------------------------------------------------------
  Statistics statistics(int64_t c, bool train) const {
    return train ? from_moments(call, c) : from_vectors(call, c);
  }
  void fill_affine(bool train) const {
    R* const k = constants();
    for (int64_t c = 0; c < columns; ++c) {
      const Affine<R> f = affine<R>(call, c, statistics(c, train));
      k[c] = f.centre;
      k[columns + c] = f.scale;
      k[2 * columns + c] = f.offset;
    }
  }
  bool streams(const void* to, int64_t tensors) const {
    return sizeof(T) * W >= kVectorBytes && uintptr_t(to) % kVectorBytes == 0 && columns % W == 0 &&
           rows * columns * int64_t(sizeof(T)) * tensors > caches.last;
  }
  // Writes body(v, i, load) -> Results for every row that takes part, and zeros for the others. The
  // last rows first, as in rows.h.
  template <bool Stream, int Outs, class Body> void write(T* first, T* second, const Body& body) const {
    const int64_t height = at_least(1, 16384 / columns), blocks = (rows + height - 1) / height;
    parallel(blocks, rows * columns, [=, this](int64_t begin, int64_t end) {
      const Body each = body;
      const int64_t columns = this->columns;
      const uint8_t* const mask = call.mask;
      T* const to[2] = {first, second};
      for (int64_t k = end; k-- > begin;) {
        const int64_t last = at_most((k + 1) * height, rows);
        for (int64_t r = k * height; r < last; ++r) {
          const int64_t base = r * columns;
          if (!mask[r]) {
            for (int j = 0; j < Outs; ++j) {
              if constexpr (Stream)
                for (int64_t v = 0; v < columns; v += W) stream<T>(to[j] + base + v, P{});
              else
                std::memset(to[j] + base, 0, size_t(columns) * sizeof(T));
            }
            continue;
          }
          each_vector(columns, [&](int64_t v, auto load_, auto, int) NW_LAMBDA_INLINE {
            const Results<R, Outs> result = each(v, base + v, load_);
            for (int j = 0; j < Outs; ++j) {
              T* const p = to[j] + base + v;
              if constexpr (std::is_same_v<decltype(load_), LoadOne>)
                *p = from_compute<T>(result.v[j][0]);
              else if constexpr (Stream)
                stream<T>(p, result.v[j]);
              else
                store<T>(p, result.v[j]);
            }
          });
        }
      }
      stream_end();
    });
  }

  template <int Act, bool Residual> void forward_all(bool train) const {
    if (train) moments();
    fill_affine(train);
    const R *centre = constants(), *scale = centre + columns, *offset = scale + columns;
    const T* x = static_cast<const T*>(call.x);
    const T* r = static_cast<const T*>(call.residual);
    T* y = static_cast<T*>(call.y);
    const int code = call.activation;
    const R slope = R(call.slope);
    const auto body = [=](int64_t v, int64_t i, const auto& load_) NW_LAMBDA_INLINE {
      P z = apply<R>(load_(centre + v), load_(scale + v), load_(offset + v), load_(x + i));
      if constexpr (Residual)
        if (Act != kAny || r) z += load_(r + i);
      if constexpr (Act == kReLU) z = relu(z);
      if constexpr (Act == kAny) z = activate<R>(code, slope, z);
      return Results<R, 1>{{z}};
    };
    if (streams(y, 2))
      write<true, 1>(y, nullptr, body);
    else
      write<false, 1>(y, nullptr, body);
  }

  template <int Act> void backward_all(bool reduce, bool input, bool train) const {
    fill_affine(train);
    R* const k = constants();
    const int64_t columns = this->columns;
    const R *centre = k, *scale = k + columns, *shift = k + 2 * columns;
    const T* x = static_cast<const T*>(call.x);
    const Upstream<T> up(call);
    const auto dz = [=](int64_t v, int64_t i, const auto& load_, P xv) NW_LAMBDA_INLINE {
      return up.template dz<Act>(i, load_, [=] {
        return apply<R>(load_(centre + v), load_(scale + v), load_(shift + v), xv);
      });
    };
    if (reduce) {
      sum_columns([=](int64_t v, int64_t i, const auto& load_, P& a, P& b) NW_LAMBDA_INLINE {
        const P xv = load_(x + i);
        a = dz(v, i, load_, xv);
        b = a * (xv - load_(centre + v));
      });
      for (int64_t c = 0; c < columns; ++c)
        write_sums<R>(call, c, partial()[c], partial()[columns + c], statistics(c, train));
    }
    if (!input) return;
    R *slope = k + 3 * columns, *offset = k + 4 * columns;
    for (int64_t c = 0; c < columns; ++c) {
      const Gradient<R> g = gradient<R>(call, c, statistics(c, train));
      slope[c] = g.slope;
      offset[c] = g.offset;
    }
    const auto body = [=](auto outs) {
      return [=](int64_t v, int64_t i, const auto& load_) NW_LAMBDA_INLINE {
        const P xv = load_(x + i), g = dz(v, i, load_, xv);
        const P dx = (g - ((xv - load_(centre + v)) * load_(slope + v) + load_(offset + v))) *
                     load_(scale + v);
        if constexpr (decltype(outs)::value == 2)
          return Results<R, 2>{{dx, g}};
        else
          return Results<R, 1>{{dx}};
      };
    };
    T *dx = static_cast<T*>(call.dx), *dr = static_cast<T*>(call.dresidual);
    if (dr)
      write<false, 2>(dx, dr, body(std::integral_constant<int, 2>{}));
    else if (streams(dx, 3))
      write<true, 1>(dx, nullptr, body(std::integral_constant<int, 1>{}));
    else
      write<false, 1>(dx, nullptr, body(std::integral_constant<int, 1>{}));
  }
};

}  // namespace nw::NW_ISA
