// Backward of the norms of sets. With dz = dy * activation'(z), g = dz * weight and sums over a set
// of n values: dx = (g - sum(g) / n - xhat * sum(g * xhat) / n) * rstd, without the first sum where
// the mean is taken for 0; dweight = sum dz * xhat and dbias = sum dz over the samples.
#pragma once
#include "sets.h"

namespace nw::NW_ISA {

template <class T> struct SetsBackward : Sets<T> {
  using Base = Sets<T>;
  using typename Base::Constants;
  using typename Base::P;
  using typename Base::R;
  using Base::by_column, Base::call, Base::columns, Base::kChunk, Base::length, Base::n, Base::runs,
      Base::sets, Base::W;

  static constexpr int64_t kRows = 32;   // samples to a block at least
  static constexpr int64_t kFlush = 64;  // samples added in R before they go on in double
  static constexpr int64_t kTile = 1024;  // columns at once
  static constexpr int64_t kPartials = int64_t(4) << 20;  // bytes for the sums of the blocks

  const bool gradients, wide;
  const int64_t block, blocks, run_pieces;

  explicit SetsBackward(const SetCall& c)
      : Base(c),
        gradients(c.dweight || c.dbias),
        // Few samples of many columns: the columns' sums are taken apart, tile by tile, so that all
        // threads have something to do. Depends on the shape alone, as the order of additions does.
        wide(by_column && c.samples < 4 * kRows && columns >= kTile &&
             c.samples * columns >= 2 * kWorthThreads),
        block(pick_block()),
        blocks((c.samples + block - 1) / block),
        run_pieces((length + kChunk - 1) / kChunk) {}

  int64_t pick_block() const {
    int64_t count = kPartials / (columns * int64_t(2 * sizeof(double)));
    count = count < 16 ? 16 : count > 64 ? 64 : count;
    const int64_t rows = (call.samples + count - 1) / count;
    return rows < kRows ? kRows : rows;
  }

  // Statistics of a set: those that were kept, or once more from x.
  NW_INLINE Statistics known(int64_t set) const {
    if (!call.moments) return this->statistics(set);
    return this->of({call.moments[sets + set], call.moments[2 * sets + set], true});
  }
  struct Means {
    R g, gx;  // means over the set of g and of g * xhat
  };
  NW_INLINE Means means(double s, double q) const {
    return {call.centred ? R(s / double(n)) : R(0), R(q / double(n))};
  }

  // ---- by columns -------------------------------------------------------------------------------
  // What dz and xhat are made from, for one set.
  template <int Act> struct Maker {
    const T* x;
    Upstream<T> up;
    const R *w, *b;
    Constants k;
    int64_t base;  // of the set in the tensors
    NW_INLINE P xhat(const auto& load_at, int64_t i) const { return k.xhat(load_at(x + base + i)); }
    NW_INLINE P dz(const auto& load_at, int64_t i, P xhat) const {
      return up.template dz<Act>(base + i, load_at, [=, this] {
        return multiply_add<R>(xhat, load_at(w + i), load_at(b + i));
      });
    }
  };
  template <int Act> Maker<Act> maker(int64_t set, Statistics s, const R* w, const R* b) const {
    const int64_t at = set % call.groups * n;
    return {static_cast<const T*>(call.x), Upstream<T>(call), w + at, b + at, this->constants(s),
            set * n};
  }

  // Sums of a set's places [begin, end), at least a vector or all there are; the columns' own sums
  // go to dw and db if they are given.
  template <int Act>
  NW_INLINE ShiftedSums sum_places(const Maker<Act>& m, int64_t begin, int64_t end, R* dw, R* db) const {
    if (end - begin < W) {
      ShiftedSums total;
      for (int64_t i = begin; i < end; ++i) {
        const P xhat = m.xhat(LoadOne{}, i), dz = m.dz(LoadOne{}, i, xhat);
        const double g = double(dz[0]) * double(m.w[i]);
        total.s += g;
        total.q += g * double(xhat[0]);
        if (dw) dw[i] += dz[0] * xhat[0], db[i] += dz[0];
      }
      return total;
    }
    Sums<R> sums;
    sums.clear();
    auto lanes = sums.lanes;
    const auto at = [&](int64_t i) NW_LAMBDA_INLINE {
      const P xhat = m.xhat(LoadVector{}, i), dz = m.dz(LoadVector{}, i, xhat);
      if (dw) {
        store<R>(dw + i, multiply_add<R>(dz, xhat, load<R>(dw + i)));
        store<R>(db + i, load<R>(db + i) + dz);
      }
      const P g = dz * load<R>(m.w + i);
      return Terms<R>{g, g, xhat};
    };
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W) sums.step(lanes, i, at);
    if (i + W <= end) {
      const Terms<R> t = at(i);
      lanes.s0 += t.s;
      lanes.q0 = multiply_add<R>(t.left, t.right, lanes.q0);
      i += W;
    }
    if (i < end) {  // the last vector, without the lanes already counted
      const int64_t from = end - W;
      const P xhat = m.xhat(LoadVector{}, from), dz = m.dz(LoadVector{}, from, xhat);
      const auto fresh = lane_numbers<R>() >= R(W - (end - i));
      const P g = dz * load<R>(m.w + from);
      if (dw) {
        const P w = load<R>(dw + from), b = load<R>(db + from);
        store<R>(dw + from, fresh ? multiply_add<R>(dz, xhat, w) : w);
        store<R>(db + from, fresh ? b + dz : b);
      }
      lanes.s1 += fresh ? g : P{};
      lanes.q1 = fresh ? multiply_add<R>(g, xhat, lanes.q1) : lanes.q1;
    }
    sums.lanes = lanes;
    sums.end_chunk();
    return sums.total();
  }
  // dx and dresidual of a set's places [begin, end). The next set is fetched meanwhile.
  template <int Act>
  NW_INLINE void write_places(const Maker<Act>& m, Means means, int64_t begin, int64_t end,
                              bool streaming) const {
    const auto gradient = [=](P g, P xhat) NW_LAMBDA_INLINE {
      return multiply_add<R>(-xhat, splat<P>(means.gx), g - means.g) * m.k.rstd;
    };
    T* const dx = static_cast<T*>(call.dx) + m.base;
    const T* next = m.x + m.base + this->ahead(n);
    const int64_t other = m.up.dy - m.x;
    if (Act == kNone || !call.dresidual) {
      T* const to[1] = {dx};
      this->template write<1>(to, begin, end, streaming,
                              [=](const auto& load_at, int64_t i) NW_LAMBDA_INLINE {
        const P xhat = m.xhat(load_at, i);
        __builtin_prefetch(next + i, 0, 2);
        __builtin_prefetch(next + other + i, 0, 2);
        return Results<R, 1>{{gradient(m.dz(load_at, i, xhat) * load_at(m.w + i), xhat)}};
      });
    } else {
      T* const to[2] = {dx, static_cast<T*>(call.dresidual) + m.base};
      this->template write<2>(to, begin, end, streaming,
                              [=](const auto& load_at, int64_t i) NW_LAMBDA_INLINE {
        const P xhat = m.xhat(load_at, i), dz = m.dz(load_at, i, xhat);
        return Results<R, 2>{{gradient(dz * load_at(m.w + i), xhat), dz}};
      });
    }
  }
  bool streams() const {
    const bool apart = call.dresidual && (uintptr_t(call.dx) - uintptr_t(call.dresidual)) % kLine;
    return !apart && Base::streams(call.dresidual ? 4 : 3);
  }

  struct Scratch {
    R *weight, *bias;      // (columns)
    double* partial;       // (blocks, 2, columns)
    R* sums;               // (blocks, 2, columns)
    Statistics* statistics;  // (sets), wide
    ShiftedSums* parts;      // (sets, pieces or runs * pieces)
  };
  static constexpr int64_t kR = sizeof(R);
  int64_t padded() const { return (columns + 15) / 16 * 16; }
  int64_t backward_bytes() const {
    char* const nowhere = nullptr;
    return lay_out(nowhere).second;
  }
  std::pair<Scratch, int64_t> lay_out(char* at) const {
    char* const start = at;
    Scratch s{};
    const auto take = [&](auto*& to, int64_t count) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(at);
      at += Base::rounded(count * int64_t(sizeof(*to)));
    };
    if (by_column) {
      take(s.weight, columns);
      take(s.bias, columns);
      if (gradients) take(s.partial, (wide ? 1 : blocks) * 2 * columns);
      if (gradients && !wide) take(s.sums, blocks * 2 * padded());
      if (wide) take(s.statistics, sets);
      if (wide) take(s.parts, sets * this->pieces);
    } else {
      take(s.statistics, sets);
      take(s.parts, sets * runs * run_pieces);
    }
    return {s, at - start};
  }

  // Blocks of samples, one after another in a thread: a set is summed and written while it is in
  // cache, its columns' sums added to the block's.
  template <int Act> void by_blocks(const Scratch& scratch, const R* w, const R* b) const {
    const bool streaming = streams();
    parallel(blocks, sets * n, [=, this](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        R *dw = nullptr, *db = nullptr;
        double* into = nullptr;
        if (gradients) {
          dw = scratch.sums + k * 2 * padded(), db = dw + padded();
          into = scratch.partial + k * 2 * columns;
          for (int64_t i = 0; i < 2 * columns; ++i) into[i] = 0;
          for (int64_t i = 0; i < 2 * padded(); ++i) dw[i] = 0;
        }
        const int64_t end = (k + 1) * block < call.samples ? (k + 1) * block : call.samples;
        for (int64_t sample = k * block; sample < end; ++sample) {
          for (int64_t group = 0; group < call.groups; ++group) {
            const int64_t set = sample * call.groups + group, at = group * n;
            const Maker<Act> m = maker<Act>(set, known(set), w, b);
            const ShiftedSums t =
                sum_places<Act>(m, 0, n, dw ? dw + at : nullptr, db ? db + at : nullptr);
            write_places<Act>(m, means(t.s, t.q), 0, n, streaming);
          }
          if (dw && ((sample + 1 - k * block) % kFlush == 0 || sample + 1 == end)) {
            for (int64_t i = 0; i < columns; ++i) {
              into[i] += double(dw[i]), into[columns + i] += double(db[i]);
              dw[i] = db[i] = R(0);
            }
          }
        }
      }
      stream_end();
    });
  }
  // Few samples: first the sums of the sets, then tile after tile of columns through all samples.
  template <int Act> void by_tiles(const Scratch& scratch, const R* w, const R* b) const {
    const bool streaming = streams();
    if (call.moments)
      for (int64_t set = 0; set < sets; ++set) scratch.statistics[set] = known(set);
    else
      this->statistics_split(scratch.statistics, scratch.parts);
    const int64_t pieces = this->pieces;
    const auto piece_end = [=, this](int64_t k) { return k + 1 == pieces ? n : (k + 1) * kChunk; };
    parallel(sets * pieces, sets * n, [=, this](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const int64_t set = t / pieces, k = t % pieces;
        const Maker<Act> m = maker<Act>(set, scratch.statistics[set], w, b);
        scratch.parts[t] = sum_places<Act>(m, k * kChunk, piece_end(k), nullptr, nullptr);
      }
    });
    for (int64_t set = 0; set < sets; ++set) {
      ShiftedSums& total = scratch.parts[set * pieces];
      for (int64_t k = 1; k < pieces; ++k) {
        total.s += scratch.parts[set * pieces + k].s;
        total.q += scratch.parts[set * pieces + k].q;
      }
    }
    const int64_t tiles = (n + kTile - 1) / kTile;  // of a group
    parallel(call.groups * tiles, sets * n, [=, this](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const int64_t group = t / tiles, begin = t % tiles * kTile;
        const int64_t end = begin + kTile < n ? begin + kTile : n;
        alignas(64) R dw[kTile] = {}, db[kTile] = {};
        for (int64_t sample = 0; sample < call.samples; ++sample) {
          const int64_t set = sample * call.groups + group;
          const Maker<Act> m = maker<Act>(set, scratch.statistics[set], w, b);
          if (gradients) sum_places<Act>(m, begin, end, dw - begin, db - begin);
          const ShiftedSums sums = scratch.parts[set * pieces];
          write_places<Act>(m, means(sums.s, sums.q), begin, end, streaming);
        }
        if (gradients)
          for (int64_t i = begin; i < end; ++i) {
            scratch.partial[group * n + i] = double(dw[i - begin]);
            scratch.partial[columns + group * n + i] = double(db[i - begin]);
          }
      }
      stream_end();
    });
  }
  // Blocks in order, then the places of a run in order.
  void conclude_columns(double* partial) const {
    const int64_t each = call.length, count = call.groups * call.runs;
    const int64_t parts = wide ? 1 : blocks;
    parallel((count + 255) / 256, parts * columns, [=, this](int64_t first, int64_t last) {
      const int64_t end = last * 256 < count ? last * 256 : count;
      for (int64_t k = 1; k < parts; ++k) {
        for (int row = 0; row < 2; ++row) {
          double* to = partial + row * columns;
          const double* from = to + k * 2 * columns;
          for (int64_t i = first * 256 * each; i < end * each; ++i) to[i] += from[i];
        }
      }
      for (int64_t c = first * 256; c < end; ++c) {
        double w = 0, b = 0;
        for (int64_t i = c * each; i < (c + 1) * each; ++i) w += partial[i], b += partial[columns + i];
        if (call.dweight) nw::NW_ISA::write(call.dweight, call.weight.dtype, c, w);
        if (call.dbias) nw::NW_ISA::write(call.dbias, call.bias.dtype, c, b);
      }
    });
  }

  // ---- by runs ----------------------------------------------------------------------------------
  template <int Act> struct RunMaker {
    const T* x;
    Upstream<T> up;
    Constants k;
    R w, b;
    NW_INLINE P xhat(const auto& load_at, int64_t i) const { return k.xhat(load_at(x + i)); }
    NW_INLINE P dz(const auto& load_at, int64_t i, P xhat) const {
      return up.template dz<Act>(i, load_at, [=, this] {
        return multiply_add<R>(xhat, splat<P>(w), splat<P>(b));
      });
    }
  };
  template <int Act> RunMaker<Act> run_maker(int64_t run, const Constants& k) const {
    const int64_t c = run % (call.groups * runs);
    return {static_cast<const T*>(call.x), Upstream<T>(call), k, R(read(call.weight, c, 1)),
            R(read(call.bias, c, 0))};
  }
  NW_INLINE std::pair<int64_t, int64_t> piece(int64_t run, int64_t k) const {
    const int64_t begin = run * length + k * kChunk;
    return {begin, k + 1 == run_pieces ? (run + 1) * length : begin + kChunk};
  }
  template <int Act>
  NW_INLINE ShiftedSums sum_piece(const RunMaker<Act>& m, int64_t begin, int64_t end) const {
    if (end - begin < W) {
      ShiftedSums total;
      for (int64_t i = begin; i < end; ++i) {
        const P xhat = m.xhat(LoadOne{}, i), dz = m.dz(LoadOne{}, i, xhat);
        total.s += double(dz[0]);
        total.q += double(dz[0]) * double(xhat[0]);
      }
      return total;
    }
    Sums<R> sums;
    sums.clear();
    sums.run(begin, end, [=](int64_t i) NW_LAMBDA_INLINE {
      const P xhat = m.xhat(LoadVector{}, i), dz = m.dz(LoadVector{}, i, xhat);
      return Terms<R>{dz, dz, xhat};
    });
    sums.end_chunk();
    return sums.total();
  }
  template <int Act>
  NW_INLINE void write_piece(const RunMaker<Act>& m, Means means, int64_t begin, int64_t end,
                             bool streaming) const {
    const auto gradient = [=](P dz, P xhat) NW_LAMBDA_INLINE {
      const P g = multiply_add<R>(dz, splat<P>(m.w), splat<P>(-means.g));
      return multiply_add<R>(-xhat, splat<P>(means.gx), g) * m.k.rstd;
    };
    T* const dx = static_cast<T*>(call.dx);
    const T* next = m.x + this->ahead(n);
    const int64_t other = m.up.dy - m.x;
    if (Act == kNone || !call.dresidual) {
      T* const to[1] = {dx};
      this->template write<1>(to, begin, end, streaming,
                              [=](const auto& load_at, int64_t i) NW_LAMBDA_INLINE {
        const P xhat = m.xhat(load_at, i);
        __builtin_prefetch(next + i, 0, 2);
        __builtin_prefetch(next + other + i, 0, 2);
        return Results<R, 1>{{gradient(m.dz(load_at, i, xhat), xhat)}};
      });
    } else {
      T* const to[2] = {dx, static_cast<T*>(call.dresidual)};
      this->template write<2>(to, begin, end, streaming,
                              [=](const auto& load_at, int64_t i) NW_LAMBDA_INLINE {
        const P xhat = m.xhat(load_at, i), dz = m.dz(load_at, i, xhat);
        return Results<R, 2>{{gradient(dz, xhat), dz}};
      });
    }
  }
  // The sums of a set from those of its runs.
  NW_INLINE Means set_means(int64_t set, const ShiftedSums* parts) const {
    double s = 0, q = 0;
    for (int64_t run = set * runs; run < (set + 1) * runs; ++run) {
      const double w = read(call.weight, run % (call.groups * runs), 1);
      for (int64_t k = 0; k < run_pieces; ++k) {
        s += w * parts[run * run_pieces + k].s;
        q += w * parts[run * run_pieces + k].q;
      }
    }
    return means(s, q);
  }
  template <int Act> void by_runs(const Scratch& scratch) const {
    const bool streaming = streams();
    const int64_t all = runs * run_pieces;  // pieces of a set
    const auto sum = [=, this](int64_t t, const Constants& k) NW_LAMBDA_INLINE {
      const int64_t run = t / run_pieces;
      const auto [begin, end] = piece(run, t % run_pieces);
      scratch.parts[t] = sum_piece<Act>(run_maker<Act>(run, k), begin, end);
    };
    const auto write = [=, this](int64_t t, const Constants& k, Means means) NW_LAMBDA_INLINE {
      const int64_t run = t / run_pieces;
      const auto [begin, end] = piece(run, t % run_pieces);
      write_piece<Act>(run_maker<Act>(run, k), means, begin, end, streaming);
    };
    if (n >= 2 * kChunk && sets < 4 * threads() && threads() > 1) {
      for (int64_t set = 0; set < sets && call.moments; ++set) scratch.statistics[set] = known(set);
      if (!call.moments)
        parallel(sets, sets * n, [=, this](int64_t first, int64_t last) {
          for (int64_t set = first; set < last; ++set) scratch.statistics[set] = known(set);
        });
      parallel(sets * all, sets * n, [=, this](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) sum(t, this->constants(scratch.statistics[t / all]));
      });
      parallel(sets * all, sets * n, [=, this](int64_t first, int64_t last) {
        int64_t own = -1;
        Means m{};
        for (int64_t t = first; t < last; ++t) {
          if (t / all != own) m = set_means(own = t / all, scratch.parts);
          write(t, this->constants(scratch.statistics[own]), m);
        }
        stream_end();
      });
      return;
    }
    parallel(sets, sets * n, [=, this](int64_t first, int64_t last) {
      for (int64_t set = first; set < last; ++set) {
        const Constants k = this->constants(known(set));
        for (int64_t t = set * all; t < (set + 1) * all; ++t) sum(t, k);
        const Means m = set_means(set, scratch.parts);
        for (int64_t t = (set + 1) * all; t-- > set * all;) write(t, k, m);  // what is still in cache
      }
      stream_end();
    });
  }
  void conclude_runs(const ShiftedSums* parts) const {
    const int64_t count = call.groups * runs;
    for (int64_t c = 0; c < count; ++c) {
      double w = 0, b = 0;
      for (int64_t sample = 0; sample < call.samples; ++sample)
        for (int64_t k = 0; k < run_pieces; ++k) {
          const ShiftedSums& t = parts[(sample * count + c) * run_pieces + k];
          w += t.q;
          b += t.s;
        }
      if (call.dweight) nw::NW_ISA::write(call.dweight, call.weight.dtype, c, w);
      if (call.dbias) nw::NW_ISA::write(call.dbias, call.bias.dtype, c, b);
    }
  }

  template <int Act> void backward() const {
    const Scratch scratch = lay_out(static_cast<char*>(call.scratch)).first;
    if (!by_column) {
      by_runs<Act>(scratch);
      if (gradients) conclude_runs(scratch.parts);
      return;
    }
    const R* w = this->column_values(call.weight, 1, scratch.weight);
    const R* b = this->column_values(call.bias, 0, scratch.bias);
    if (wide)
      by_tiles<Act>(scratch, w, b);
    else
      by_blocks<Act>(scratch, w, b);
    if (gradients) conclude_columns(scratch.partial);
  }
};

}  // namespace nw::NW_ISA
