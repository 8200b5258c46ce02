// Two sums over runs of values, kept so that rounding stays below that of the values: at most
// kTerms terms a lane in R, then on in double. The order of the additions depends on the lengths of
// the runs alone, so it is the same however the runs are visited and by how many threads.
#pragma once
#include <type_traits>

#include "channel.h"
#include "simd.h"

namespace nw::NW_ISA {

// What each place adds to the two sums: s and left * right.
template <class R> struct Terms {
  Pack<R> s, left, right;
};

// Begins with clear(): of many that stand ready (32 are 10 KB) only those in use are set to 0.
template <class R> struct Sums {
  using P = Pack<R>;
  static constexpr int W = kLanes<R>;
  static constexpr int64_t kStep = 2 * W;
  static constexpr int kTerms = 64;

  // The sums in R: in registers while a run is added.
  struct Lanes {
    P s0, s1, q0, q1;
    NW_INLINE void clear() { s0 = s1 = q0 = q1 = P{}; }
  };
  Lanes lanes;
  int terms;
  WideSum<R> s, q;
  double total_s, total_q;

  NW_INLINE void clear() {
    lanes.clear();
    terms = 0;
    s.clear();
    q.clear();
    total_s = total_q = 0;
  }
  ShiftedSums total() const { return {total_s, total_q}; }

  NW_INLINE void flush(Lanes& a) {
    s.add(a.s0 + a.s1);
    q.add(a.q0 + a.q1);
    a.clear();
    terms = 0;
  }
  NW_INLINE void count(Lanes& a) {
    if (++terms == kTerms) flush(a);
  }
  // at(i): the terms of the vector at i; at(First{i}), at(Second{i}), where it knows of them: of the
  // two of a step.
  template <class Which, class At>
  NW_INLINE static Terms<R> place(const At& at, int64_t i, int64_t further) {
    if constexpr (std::is_invocable_v<const At&, Which>)
      return at(Which{i});
    else
      return at(i + further);
  }
  template <class At> NW_INLINE void step(Lanes& l, int64_t i, const At& at) {
    const Terms<R> a = place<First>(at, i, 0), b = place<Second>(at, i, W);
    l.s0 += a.s;
    l.q0 = multiply_add<R>(a.left, a.right, l.q0);
    l.s1 += b.s;
    l.q1 = multiply_add<R>(b.left, b.right, l.q1);
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
        l.q0 = multiply_add<R>(t.left, t.right, l.q0);
        i += W;
      }
      if (i < last) {  // the last vector of the run, without the lanes already counted
        const Terms<R> t = at(last - W);
        const auto fresh = lane_numbers<R>() >= R(W - (last - i));
        l.s1 += fresh ? t.s : P{};
        // Chosen after the product: 0 * inf of a lane of the vector before would be NaN.
        l.q1 = fresh ? multiply_add<R>(t.left, t.right, l.q1) : l.q1;
      }
      count(l);
    }
  }
  template <class At> NW_INLINE void run(int64_t first, int64_t last, const At& at) {
    Lanes l = lanes;
    run(l, first, first, last, at);
    lanes = l;
  }
  // Chunks are summed apart and added in order.
  NW_INLINE void end_chunk() {
    flush(lanes);
    total_s += s.value();
    total_q += q.value();
    s.clear();
    q.clear();
  }
};

}  // namespace nw::NW_ISA
