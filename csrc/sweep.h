// The order in which a block with its channels in runs (NCHW, NCL, 5-D) goes through memory.
//
// A pass takes two sums over each channel, then writes results that need them. A channel's slice is
// read from memory once: its results are made while it is in cache. Which way depends on its size:
// - small slices (short runs): several channels at once, whose runs lie side by side and are read
//   and written as one stretch; while they are written, the next ones are fetched;
// - slices past the second level cache: one channel at a time, and in the very loop that writes it
//   the next one is summed, so that memory reads while it writes (backward of (32, 256, 56, 56), two
//   threads: 1.19 times a copy's speed, 1.01 one after the other);
// - few channels: chunks of slices, all sums first, then all results.
// The sums of a slice are those of its chunks added in order, so they have the same bits every way.
#pragma once
#include "channel.h"
#include "kernels.h"
#include "parallel.h"
#include "slices.h"
#include "write.h"

namespace nw::NW_ISA {

// Fetches what the sums will read next.
template <class T> struct Fetch {
  const T *a = nullptr, *b = nullptr;  // shifted to what is next; null: nothing
  static constexpr int W = kWidth<T>;
  NW_INLINE void step(int64_t i) const { some(i, 2 * W); }
  NW_INLINE void vector(int64_t i) const { some(i, W); }
  NW_INLINE void some(int64_t i, int64_t count) const {
    if (a) prefetch(a + i, count);
    if (b) prefetch(b + i, count);
  }
};

// Sums the next run, step by step.
template <class R, class At> struct Summing {
  Sums<R>& sums;
  const At& at;
  const int64_t first, last;
  int64_t i = first;
  typename Sums<R>::Lanes lanes = sums.lanes;
  NW_INLINE void step(int64_t) {
    sums.step(lanes, i, at);
    i += Sums<R>::kStep;
  }
  NW_INLINE void vector(int64_t) {}
  NW_INLINE void finish() {
    sums.run(lanes, first, i, last, at);
    sums.lanes = lanes;
  }
};

// Pass:
//   kOuts, kFuse                how many tensors are written; whether loops may be fused
//   Summand summand             what is summed (slices.h)
//   Constants constants(c)      what the results need, once channel c is concluded
//   map(constants)              -> (place) -> Results
//   writer(row, channels)       where results go
template <class T, class Pass> struct Sweep {
  using R = Compute<T>;
  using Constants = decltype(std::declval<Pass>().constants(0));
  using Output = Writer<T, Pass::kOuts>;
  using Sum = Summation<T, typename Pass::Summand>;

  const Pass& pass;
  const Slices<T> at;
  const Sum sum;

  Sweep(const Pass& p, const Call& c) : pass(p), at(c), sum{p.summand, at} {}

  // A pair of doubles for each (channel, chunk), or the constants of the channels.
  static int64_t scratch_bytes(const Call& c) {
    const Slices<T> at(c);
    const int64_t sums = at.pieces * int64_t(sizeof(ShiftedSums)), maps = int64_t(sizeof(Constants));
    return c.channels * (sums > maps ? sums : maps);
  }

  // The results of [begin, end): rows of the channels whose constants these are.
  __attribute__((noinline)) static void write(const Pass& pass, const Output& out,
                                              const Constants* constants, int64_t begin,
                                              int64_t end, typename Output::Cursor at,
                                              Fetch<T> next) {
    out.write(begin, end, at,
              [&](int64_t c) NW_LAMBDA_INLINE { return pass.map(constants[c]); }, next);
  }
  // By constants that are known: straight through memory, in the order in which it lies.
  void write_all(void* scratch) const {
    Constants* constants = static_cast<Constants*>(scratch);
    for (int64_t c = 0; c < at.channels; ++c) constants[c] = pass.constants(c);
    const Output out = pass.writer(at.inner, at.channels);
    constexpr int64_t kUnit = 1024;
    const int64_t size = at.n * at.channels, units = size > kUnit ? size / kUnit : 1;
    parallel(units, size, [=, this](int64_t first, int64_t last) {
      // The last unit takes the remainder, so no stretch is shorter than a vector.
      const int64_t begin = first * kUnit, end = last == units ? size : last * kUnit;
      const int64_t row = begin / at.inner;
      write(pass, out, constants, begin, end, {row % at.channels, (row + 1) * at.inner}, {});
      stream_end();
    });
  }
  void write_chunk(const Output& out, int64_t c, int64_t k, const Constants& constants) const {
    at.runs(c, k, [&](int64_t i, int64_t length) {
      write(pass, out, &constants, i, i + length, {0, i + length}, {});
    });
  }
  // `count` channels from c on, backwards: what was summed last is still in cache.
  void write_block(int64_t c, int64_t count, bool fetch) const {
    Constants constants[Sum::kBlock];
    for (int64_t j = 0; j < count; ++j) constants[j] = pass.constants(c + j);
    const Output out = pass.writer(at.inner, count);
    if (!at.whole()) {
      for (int64_t k = at.pieces; k-- > 0;) write_chunk(out, c, k, constants[0]);
      return;
    }
    const int64_t length = count * at.inner;
    const Fetch<T> next{fetch ? pass.summand.read + length : nullptr,
                        fetch && pass.summand.read2 ? pass.summand.read2 + length : nullptr};
    for (int64_t o = at.outer; o-- > 0;) {
      const int64_t i = o * at.stride + c * at.inner;
      write(pass, out, constants, i, i + length, {0, i + at.inner}, next);
    }
  }
  // Channel by channel; while one is written the next is summed.
  void pipeline(int64_t begin, int64_t end) const {
    const Output out = pass.writer(at.inner, 1);
    sum.sum_block(begin, 1);
    for (int64_t c = begin; c + 1 < end; ++c) {
      const Constants constants = pass.constants(c);
      const auto map = [&](int64_t) NW_LAMBDA_INLINE { return pass.map(constants); };
      const auto setting = pass.summand.setting(c + 1);
      const auto terms = pass.summand.terms(setting);
      Sums<R> sums;
      sums.clear();
      for (int64_t k = 0; k < at.pieces; ++k) {
        at.runs(c, k, [&](int64_t i, int64_t length) NW_LAMBDA_INLINE {
          const int64_t next = i + at.inner;
          Summing<R, decltype(terms)> summing{sums, terms, next, next + length};
          out.write(i, i + length, {0, i + length}, map, summing);
          summing.finish();
        });
        sums.end_chunk();
      }
      pass.summand.conclude(c + 1, setting, sums.total());
    }
    write_block(end - 1, 1, false);
  }
  void sum_and_write(void* scratch) const {
    if (sum.split()) {
      sum.sum_split(scratch);
      const Output out = pass.writer(at.inner, 1);
      parallel(at.channels * at.pieces, at.n * at.channels, [=, this](int64_t begin, int64_t end) {
        for (int64_t i = end; i-- > begin;)  // backwards: what was read last is still in cache
          write_chunk(out, i / at.pieces, i % at.pieces, pass.constants(i / at.pieces));
        stream_end();
      });
      return;
    }
    const int64_t b = sum.block(), blocks = (at.channels + b - 1) / b;
    const int64_t cache = caches.second, slice = sum.slice_bytes();
    parallel(blocks, at.n * at.channels, [=, this](int64_t begin, int64_t end) {
      if constexpr (Pass::kFuse) {
        if (2 * slice > cache) {
          pipeline(begin, end);
          return stream_end();
        }
      }
      for (int64_t k = begin; k < end; ++k) {
        sum.sum_block(k * b, sum.count(k, b));
        write_block(k * b, sum.count(k, b), slice * at.channels > cache && k + 1 < end);
      }
      stream_end();
    });
  }
};

}  // namespace nw::NW_ISA
