// Two sums over runs of values, kept so that rounding stays below that of the values: at most
// kTerms terms a lane in R, then on in double. The order of the additions depends on the lengths of
// the runs alone, so it is the same however the runs are visited and by how many threads.
#pragma once
#include <new>

#include "channel.h"
#include "simd.h"

namespace nw::NW_ISA {

// What each place adds to the two sums.
template <class R> struct Terms {
  Pack<R> s, q;
};

template <class R> struct Sums {
  using P = Pack<R>;
  static constexpr int W = kLanes<R>;
  static constexpr int64_t kStep = 2 * W;
  static constexpr int kTerms = 64;

  // The sums in R: in registers while a run is added.
  struct Lanes {
    P s0{}, s1{}, q0{}, q1{};
  };
  Lanes lanes;
  int terms = 0;
  WideSum<R> s{}, q{};
  ShiftedSums total;

  NW_INLINE void flush(Lanes& a) {
    s.add(a.s0 + a.s1);
    q.add(a.q0 + a.q1);
    a.s0 = a.s1 = a.q0 = a.q1 = P{};
    terms = 0;
  }
  NW_INLINE void count(Lanes& a) {
    if (++terms == kTerms) flush(a);
  }
  // at(i): the terms of the vector at i.
  template <class At> NW_INLINE void step(Lanes& l, int64_t i, const At& at) {
    const Terms<R> a = at(i), b = at(i + W);
    l.s0 += a.s;
    l.q0 += a.q;
    l.s1 += b.s;
    l.q1 += b.q;
    count(l);
  }
  // Values [i, last) of a run that began at `first`, i - first a number of whole steps.
  template <class At>
  NW_INLINE void run(Lanes& l, int64_t first, int64_t i, int64_t last, const At& at) {
    for (; i + kStep <= last; i += kStep) step(l, i, at);
    if ((last - first) % kStep != 0) {
      if (i + W <= last) {
        const Terms<R> t = at(i);
        l.s0 += t.s;
        l.q0 += t.q;
        i += W;
      }
      if (i < last) {  // the last vector of the run, without the lanes already counted
        const Terms<R> t = at(last - W);
        const auto fresh = lane_numbers<R>() >= R(W - (last - i));
        l.s1 += fresh ? t.s : P{};
        l.q1 += fresh ? t.q : P{};
      }
      count(l);
    }
  }
  template <class At> NW_INLINE void run(int64_t first, int64_t last, const At& at) {
    Lanes l = {lanes.s0, lanes.s1, lanes.q0, lanes.q1};
    run(l, first, first, last, at);
    lanes.s0 = l.s0;
    lanes.s1 = l.s1;
    lanes.q0 = l.q0;
    lanes.q1 = l.q1;
  }
  // Chunks are summed apart and added in order.
  NW_INLINE void end_chunk() {
    flush(lanes);
    total.s += s.value();
    total.q += q.value();
    s = q = WideSum<R>{};
  }
};

// Sums of a few channels. Only those that are used are set to 0: 32 of them are 10 KB.
template <class R, int64_t Most> class SumsOf {
 public:
  explicit SumsOf(int64_t count) {
    for (int64_t j = 0; j < count; ++j) new (memory_ + j * sizeof(Sums<R>)) Sums<R>();
  }
  NW_INLINE Sums<R>& operator[](int64_t j) {
    return *std::launder(reinterpret_cast<Sums<R>*>(memory_) + j);
  }

 private:
  alignas(Sums<R>) unsigned char memory_[Most * sizeof(Sums<R>)];
};

}  // namespace nw::NW_ISA
