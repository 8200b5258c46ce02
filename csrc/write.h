// Writing the results of a stretch of rows, whole lines of the cache at a time.
//
// Rows follow each other in memory, each with its channel's map. A vector that lies across two rows
// is made by both maps, lane by lane, so that rows of any length are written in whole lines: a line
// that is partly streamed and partly stored costs three times a whole one.
#pragma once
#include "simd.h"

namespace nw::NW_ISA {

// The vectors of results at one place: dx, and dresidual where it is wanted.
template <class R, int Outs> struct Results {
  Pack<R> v[Outs];
};

template <class T, int Outs> struct Writer {
  using R = Compute<T>;
  using P = Pack<R>;
  static constexpr int W = kLanes<R>;
  static constexpr int64_t kPerLine = kLine / int64_t(sizeof(T)) > W ? kLine / int64_t(sizeof(T)) : W;

  T* to[Outs];
  int64_t row;       // length of a row
  int64_t channels;  // after so many rows the maps begin again
  bool streaming;

  struct Cursor {
    int64_t channel, border;  // the row's map, and where it ends
  };

  // Writes [begin, end), at least one vector; `begin` lies in a row of map `at.channel` that ends at
  // `at.border`. map(c) gives the function from a place to its Results. `also` is told of every step
  // of two vectors, and of the vectors between steps.
  template <class Map, class Also>
  NW_INLINE void write(int64_t begin, int64_t end, Cursor at, const Map& map, Also& also) const {
    const Cursor start = at;
    int64_t i = begin;
    // Stored as usual up to from, streamed up to until, stored as usual up to the end.
    int64_t from = end, until = end;
    const int64_t head = to_line(to[0] + begin), odd = head % W;
    if (streaming && begin + head + 3 * kPerLine <= end) {
      // The first whole line that no ordinary store touches, and the last.
      from = begin + head + (odd ? kPerLine : 0);
      until = end - (end - from) % kPerLine;
      if (end - until > 0 && end - until < W) until -= kPerLine;
      if (odd) {
        put<false>(begin, one(begin, at, map));
        i = begin + odd;
        if (i >= at.border) advance(at);
      }
    }
    zone<false>(i, from, at, map, also);
    if (from < end) {
      zone<true>(i, until, at, map, also);
      while (i + W <= end) {
        put<false>(i, one(i, at, map));
        i += W;
        if (i >= at.border) advance(at);
      }
    }
    if (i < end) {
      i = end - W;  // overlaps what is written: the values are the same
      if (i < at.border - row) {
        const int64_t rows = (i - (start.border - row)) / row;
        at = {(start.channel + rows) % channels, start.border + rows * row};
      }
      put<false>(i, one(i, at, map));
    }
  }

 private:
  NW_INLINE void advance(Cursor& at) const {
    at.border += row;
    if (++at.channel == channels) at.channel = 0;
  }
  template <bool Stream> NW_INLINE void put(int64_t i, const Results<R, Outs>& r) const {
    for (int k = 0; k < Outs; ++k) {
      if constexpr (Stream)
        stream<T>(to[k] + i, r.v[k]);
      else
        store<T>(to[k] + i, r.v[k]);
    }
  }
  template <bool Stream>
  NW_INLINE void put(int64_t i, const Results<R, Outs>& r, const Results<R, Outs>& s) const {
    for (int k = 0; k < Outs; ++k) {
      if constexpr (Stream) {
        stream_step<T>(to[k] + i, r.v[k], s.v[k]);
      } else {
        store_step<T>(to[k] + i, r.v[k], s.v[k]);
      }
    }
  }
  template <class Map>
  NW_INLINE Results<R, Outs> one(int64_t i, const Cursor& at, const Map& map) const {
    Results<R, Outs> r = map(at.channel)(i);
    if (i + W > at.border) {
      Cursor next = at;
      advance(next);
      const Results<R, Outs> b = map(next.channel)(i);
      const auto here = lane_numbers<R>() < R(at.border - i);
      for (int k = 0; k < Outs; ++k) r.v[k] = here ? r.v[k] : b.v[k];
    }
    return r;
  }
  // From i on while whole vectors end by `stop`.
  template <bool Stream, class Map, class Also>
  NW_INLINE void zone(int64_t& from, int64_t stop, Cursor& cursor, const Map& map, Also& also) const {
    int64_t i = from;
    Cursor at = cursor;
    while (i + W <= stop) {
      const auto here = map(at.channel);
      const int64_t plain = at.border < stop ? at.border : stop;
      if (Stream && i + 2 * W <= plain && uintptr_t(to[0] + i) % (2 * W * sizeof(T)) != 0) {
        also.vector(i);
        put<Stream>(i, here(i));
        i += W;
      }
      for (; i + 2 * W <= plain; i += 2 * W) {
        also.step(i);
        put<Stream>(i, here(First{i}), here(Second{i}));
      }
      if (i + W <= plain) {
        also.vector(i);
        put<Stream>(i, here(i));
        i += W;
      }
      if (i < at.border) {
        if (i + W > stop) break;
        also.vector(i);
        put<Stream>(i, one(i, at, map));
        i += W;
      }
      if (i >= at.border) advance(at);
    }
    from = i;
    cursor = at;
  }
};

}  // namespace nw::NW_ISA
