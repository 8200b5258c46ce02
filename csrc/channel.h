// What a channel's moments become: the constants of the loops, computed in double, rounded once.
#pragma once
#include <cmath>
#include <limits>

#include "activate.h"
#include "kernels.h"
#include "simd.h"

namespace nw::NW_ISA {

// A channel's statistics as the maps use them.
struct Statistics {
  double mean, rstd;
};
NW_INLINE Statistics from_moments(const Call& call, int64_t c) {
  const double *count = call.moments, *mean = count + call.channels, *m2 = mean + call.channels;
  const double var = m2[c] / (count[c] > 1 ? count[c] : 1);
  return {mean[c], 1 / std::sqrt(var + call.eps)};
}
NW_INLINE Statistics from_vectors(const Call& call, int64_t c) {
  return {read(call.mean, c, 0), 1 / std::sqrt(read(call.var, c, 1) + call.eps)};
}

// A constant in R. Of NaN only that it is one is kept: see interleave() in simd.h.
template <class R> NW_INLINE R constant(double v) {
  return v != v ? std::numeric_limits<R>::quiet_NaN() : R(v);
}

// y = (x - centre) * scale + offset. Subtracting first, and carrying what rounding the mean to R
// lost in the offset, keeps float32 data around 1e6 exact to rounding; x * scale + offset does not.
template <class R> struct Affine {
  R centre, scale, offset;
};
template <class R> NW_INLINE Affine<R> affine(const Call& call, int64_t c, Statistics s) {
  const double scale = s.rstd * read(call.weight, c, 1);
  const R centre = constant<R>(s.mean);
  return {centre, constant<R>(scale),
          constant<R>(read(call.bias, c, 0) - (s.mean - double(centre)) * scale)};
}
template <class R> NW_INLINE Pack<R> apply(const Affine<R>& f, Pack<R> x) {
  return multiply_add<R>(x - f.centre, splat<Pack<R>>(f.scale), splat<Pack<R>>(f.offset));
}
template <class R> NW_INLINE Pack<R> apply(Pack<R> centre, Pack<R> scale, Pack<R> offset, Pack<R> x) {
  return (x - centre) * scale + offset;
}

// dx = (dz - (x - centre) * slope - offset) * scale, the gradient of batch norm in x:
// weight * rstd * (dz - sums[0] / n - (x - mean) * rstd^2 * sums[1] / n). The scale stays outside:
// scale * slope goes with rstd^3, which is nothing in float32 for values around 1e20.
template <class R> struct Gradient {
  R slope, offset;
};
template <class R> NW_INLINE Gradient<R> gradient(const Call& call, int64_t c, Statistics s) {
  if (!call.sums || call.constant) return {R(0), R(0)};
  const double n = call.moments ? call.moments[c] : call.count;
  const double slope = s.rstd * s.rstd * call.sums[call.channels + c] / n;
  const double lost = s.mean - double(R(s.mean));
  return {constant<R>(slope), constant<R>(call.sums[c] / n - lost * slope)};
}

// Cases of the backward loops beside an Activation: the activation's code is read at run time, or
// it is relu and its output was kept.
constexpr int kAny = -1, kReLUOfOutput = -2;

// What the derivative of the activation is taken from, in locals: through `call` the compiler would
// load every pointer again after each store, which may alias it (1.9 times the time on (128, 256)).
template <class T> struct Upstream {
  using R = Compute<T>;
  const T *dy, *output, *residual;
  int activation;
  R slope;

  template <class AnyCall>
  explicit Upstream(const AnyCall& call)
      : dy(static_cast<const T*>(call.dy)),
        output(static_cast<const T*>(call.output)),
        residual(static_cast<const T*>(call.residual)),
        activation(call.activation),
        slope(R(call.slope)) {}

  // dz = dy * activation'(z) at offset i. Act: kNone, kReLU (z rebuilt from x), kReLUOfOutput, or
  // kAny: z from the output where that is given, else from x and the residual.
  // `tensor` loads from a tensor: a vector, or one value in all lanes. z0() is the norm's own output.
  template <int Act, class Place, class Load, class Z>
  NW_INLINE Pack<R> dz(Place i, const Load& tensor, const Z& z0) const {
    const Pack<R> g = tensor(dy + i);
    if constexpr (Act == kNone) return g;
    if constexpr (Act == kReLU) return z0() > 0 ? g : Pack<R>{};
    if constexpr (Act == kReLUOfOutput) return tensor(output + i) > 0 ? g : Pack<R>{};
    Pack<R> z;
    if (output) {
      z = tensor(output + i);
    } else {
      z = z0();
      if (residual) z += tensor(residual + i);
    }
    return g * activation_slope<R>(activation, slope, z);
  }
};
struct LoadVector {
  template <class T> NW_INLINE Pack<Compute<T>> operator()(const T* p) const { return load<T>(p); }
  template <class T> NW_INLINE Pack<Compute<T>> operator()(FirstOf<T> p) const { return load<T>(p); }
  template <class T> NW_INLINE Pack<Compute<T>> operator()(SecondOf<T> p) const { return load<T>(p); }
};
struct LoadOne {
  template <class T> NW_INLINE Pack<Compute<T>> operator()(const T* p) const {
    return splat<Pack<Compute<T>>>(to_compute(*p));
  }
};

// The sums of a channel, q taken against the rounded mean, as they are kept; and what follows from
// them for the parameters: dbias = sum dz, dweight = sum dz * (x - mean) * rstd.
template <class R>
NW_INLINE void write_sums(const Call& call, int64_t c, double s, double q, Statistics statistics) {
  q -= (statistics.mean - double(R(statistics.mean))) * s;
  call.sums[c] = s;
  call.sums[call.channels + c] = q;
  if (call.dbias) write(call.dbias, call.bias.dtype, c, s);
  if (call.dweight) write(call.dweight, call.weight.dtype, c, q * statistics.rstd);
}

// Shifted sums over a set: s = sum(x - shift), q = sum((x - shift)^2).
struct ShiftedSums {
  double s = 0, q = 0;
};
struct MeanM2 {
  double mean, m2;
  bool trusted;
};
// With the shift d standard deviations off the mean, m2 = q - s^2/n loses a factor 1 + d^2 of its
// digits; past 8 the caller takes the careful way, so at most 3 bits go. So it does when squares
// overflow (q not finite) or vanish (below float's normal range) in R.
NW_INLINE MeanM2 finish(ShiftedSums t, double shift, double n) {
  const double offset = t.s / n;
  const double m2 = t.q - t.s * offset;
  const bool fits = t.q <= 8 * m2 && t.q < 1e300 && (t.q > 1e-30 * n || t.s == 0);
  return {shift + offset, m2 > 0 ? m2 : 0, fits || (t.q == 0 && t.s == 0)};
}

// The careful way: three passes in double over a channel, `outer` runs of `inner` values `stride`
// apart, without those that a mask (outer, inner) leaves out, so that `n` are left. Also what inf and
// NaN go through, which come out as they should: not finite.
template <class T>
inline MeanM2 careful_moments(const T* x, int64_t outer, int64_t stride, int64_t inner, double n,
                              const uint8_t* mask = nullptr) {
  const auto sum = [&](const auto& term) {
    double total = 0;
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; ++i)
        if (!mask || mask[o * inner + i]) total += term(double(to_compute(x[o * stride + i])));
    return total;
  };
  double mean = sum([](double v) { return v; }) / n;
  if (std::isfinite(mean)) mean += sum([=](double v) { return v - mean; }) / n;
  return {mean, sum([=](double v) { return (v - mean) * (v - mean); }), true};
}

// How many values the shift is averaged from: enough to land within the spread of the values, few
// enough to cost little beside the n that are summed.
NW_INLINE int64_t sample_count(int64_t n) {
  const int64_t wanted = n / 16 < 4 ? 4 : (n / 16 > 16 ? 16 : n / 16);
  return wanted < n ? wanted : n;
}

NW_INLINE void write_moments(const Call& call, int64_t c, double n, MeanM2 m) {
  call.moments[c] = n;
  call.moments[call.channels + c] = m.mean;
  call.moments[2 * call.channels + c] = m.m2;
}

}  // namespace nw::NW_ISA
