// Where the values of a channel lie when they lie in runs, and the sums over them.
#pragma once
#include <utility>

#include "kernels.h"
#include "parallel.h"
#include "sums.h"

namespace nw::NW_ISA {

// Where the values of a channel lie.
template <class T> struct Slices {
  const int64_t outer, channels, inner, n, stride, run, runs_a_piece, pieces;

  // A run is a row of a channel (inner values), or a part of it if it is long; a chunk is a number
  // of whole runs. 64K elements a chunk: enough tasks for one channel, few sums to add.
  static constexpr int64_t kChunk = 65536;

  explicit Slices(const Call& c)
      : outer(c.outer),
        channels(c.channels),
        inner(c.inner),
        n(c.outer * c.inner),
        stride(c.channels * c.inner),
        run(c.inner <= 2 * kChunk ? c.inner : kChunk),
        runs_a_piece(whole() && kChunk > c.inner ? kChunk / c.inner : 1),
        pieces(whole() ? (c.outer + runs_a_piece - 1) / runs_a_piece : c.outer * parts()) {}

  bool whole() const { return run == inner; }
  int64_t parts() const { return inner / run; }

  // Calls f(offset, length) for each run of chunk k of channel c.
  template <class F> NW_INLINE void runs(int64_t c, int64_t k, const F& f) const {
    if (whole()) {
      const int64_t first = k * runs_a_piece;
      const int64_t last = first + runs_a_piece < outer ? first + runs_a_piece : outer;
      for (int64_t o = first; o < last; ++o) f(o * stride + c * inner, run);
    } else {
      const int64_t o = k / parts(), part = k % parts();
      // The last part of a row takes the remainder, so no part is shorter than a vector.
      const int64_t length = part + 1 == parts() ? inner - part * run : run;
      f(o * stride + c * inner + part * run, length);
    }
  }
};

// What is summed:
//   Setting setting(c)          what the terms of channel c need
//   terms(setting)              -> (place) -> Terms
//   void conclude(c, setting, ShiftedSums)
//   read, read2                 the tensors that are read
template <class T, class Summand> struct Summation {
  using R = Compute<T>;
  using Setting = decltype(std::declval<Summand>().setting(0));
  static constexpr int64_t kBlock = 32;  // channels at once
  // Rows of a channel at once: its sums stay in registers for them (1.05 times the speed of one row
  // on 7 x 7 and 14 x 14; more of them read no faster).
  static constexpr int64_t kRows = 4;

  const Summand& summand;
  const Slices<T>& at;

  int64_t slice_bytes() const { return at.n * int64_t(sizeof(T)) * (summand.read2 ? 2 : 1); }

  // Channels at once: as many as fit in half the cache, make 8 KB of memory, and leave every thread
  // some blocks.
  int64_t block() const {
    int64_t b = 1;
    while (b < kBlock && at.whole() && b * at.inner * int64_t(sizeof(T)) < 8192 &&
           2 * b * slice_bytes() <= caches.second / 2 &&
           2 * b * 4 * threads() <= at.channels)
      b *= 2;
    return b;
  }
  int64_t count(int64_t k, int64_t b) const {  // channels in block k
    return (k + 1) * b <= at.channels ? b : at.channels - k * b;
  }
  bool split() const {  // too few channels to keep the threads busy one channel each
    return at.pieces > 1 && at.channels < 4 * threads() && threads() > 1;
  }

  void add_chunk(int64_t c, int64_t k, const Setting& setting, Sums<R>& sums) const {
    const auto terms = summand.terms(setting);
    at.runs(c, k, [&](int64_t i, int64_t length) NW_LAMBDA_INLINE {
      sums.run(i, i + length, terms);
    });
    sums.end_chunk();
  }
  // `count` channels from c on: sums and what follows from them.
  void sum_block(int64_t c, int64_t count) const {
    Setting settings[kBlock];
    Sums<R> sums[kBlock];
    for (int64_t j = 0; j < count; ++j) {
      settings[j] = summand.setting(c + j);
      sums[j].clear();
    }
    if (count == 1) {
      for (int64_t k = 0; k < at.pieces; ++k) add_chunk(c, k, settings[0], sums[0]);
    } else {
      for (int64_t k = 0; k < at.pieces; ++k) {
        const int64_t first = k * at.runs_a_piece;
        const int64_t last = first + at.runs_a_piece < at.outer ? first + at.runs_a_piece : at.outer;
        for (int64_t o = first; o < last; o += kRows) {
          const int64_t stop = o + kRows < last ? o + kRows : last;
          for (int64_t j = 0; j < count; ++j) {
            const auto terms = summand.terms(settings[j]);
            auto lanes = sums[j].lanes;
            for (int64_t p = o; p < stop; ++p) {
              const int64_t i = p * at.stride + (c + j) * at.inner;
              sums[j].run(lanes, i, i, i + at.inner, terms);
            }
            sums[j].lanes = lanes;
          }
        }
        for (int64_t j = 0; j < count; ++j) sums[j].end_chunk();
      }
    }
    for (int64_t j = 0; j < count; ++j) summand.conclude(c + j, settings[j], sums[j].total());
  }
  void sum_split(void* scratch) const {
    ShiftedSums* parts = static_cast<ShiftedSums*>(scratch);
    parallel(at.channels * at.pieces, at.n * at.channels, [=, this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Sums<R> sums;
        sums.clear();
        const int64_t c = i / at.pieces;
        add_chunk(c, i % at.pieces, summand.setting(c), sums);
        parts[i] = sums.total();
      }
    });
    for (int64_t c = 0; c < at.channels; ++c) {
      ShiftedSums total;
      for (int64_t k = 0; k < at.pieces; ++k) {
        total.s += parts[c * at.pieces + k].s;
        total.q += parts[c * at.pieces + k].q;
      }
      summand.conclude(c, summand.setting(c), total);
    }
  }
  void sum_all(void* scratch) const {
    if (split()) return sum_split(scratch);
    const int64_t b = block(), blocks = (at.channels + b - 1) / b;
    parallel(blocks, at.n * at.channels, [=, this](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) sum_block(k * b, count(k, b));
    });
  }
};

}  // namespace nw::NW_ISA
