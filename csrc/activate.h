// Activations on vectors, their derivatives, and the exponential and error function they need.
#pragma once
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace nw::NW_ISA {

template <class P> NW_INLINE P maximum(P a, P b) { return a > b ? a : b; }
template <class P> NW_INLINE P minimum(P a, P b) { return a < b ? a : b; }

// exp by x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of degree 7: within 2 ulp of float.
NW_INLINE Pack<float> exponential(Pack<float> x) {
  typedef Pack<float> P;
  const P bounded = minimum(maximum(x, splat<P>(-87.3f)), splat<P>(88.7f));
  const P magic = splat<P>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const P shifted = bounded * 1.44269504f + magic;
  const P n = shifted - magic;
  const P r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  P p = splat<P>(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits<float> power = (__builtin_convertvector(n, Bits<float>) + 127) << 23;
  const P value = p * bit_cast<P>(power);
  return x != x ? x : value;
}
NW_INLINE Pack<double> exponential(Pack<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// erf as x P(x^2) / Q(x^2) on [-4, 4] (the coefficients of Eigen and XLA): within 4 ulp of float.
NW_INLINE Pack<float> error_function(Pack<float> v) {
  typedef Pack<float> P;
  const P x = minimum(maximum(v, splat<P>(-4.0f)), splat<P>(4.0f));
  const P s = x * x;
  P p = splat<P>(-2.72614225801306e-10f);
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  P q = splat<P>(-1.45660718464996e-05f);
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return v != v ? v : x * p / q;
}
NW_INLINE Pack<double> error_function(Pack<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::erf(x[i]);
  return x;
}

template <class P> NW_INLINE P sigmoid(P z) { return 1 / (1 + exponential(-z)); }

// (1 - e) / (1 + e) cancels near 0; there a polynomial in z^2 (Cephes tanhf) serves.
NW_INLINE Pack<float> hyperbolic_tangent(Pack<float> z) {
  typedef Pack<float> P;
  const P s = z * z;
  P p = splat<P>(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const P near = z + z * s * p;
  const P far = 1 - 2 / (exponential(z + z) + 1);
  return s < 0.390625f ? near : far;
}
NW_INLINE Pack<double> hyperbolic_tangent(Pack<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// relu as torch has it: NaN stays NaN (z < 0 is false for it).
template <class P> NW_INLINE P relu(P z) { return z < 0 ? P{} : z; }

// The fast cases (none, relu) are template arguments of the loops and do not come here. The others
// are a call, not inlined: a dozen copies in each loop took two thirds of the compile time. The
// switch is the same for every vector of a call, so it predicts.
template <class R> __attribute__((noinline)) Pack<R> activate(int code, R slope, Pack<R> z) {
  typedef Pack<R> P;
  switch (code) {
    case kReLU: return relu(z);
    case kReLU6: return z < 0 ? P{} : (z > 6 ? splat<P>(R(6)) : z);
    case kLeakyReLU: return z > 0 ? z : z * slope;
    case kHardswish: {
      const P inner = z + 3;
      return z * (inner < 0 ? P{} : (inner > 6 ? splat<P>(R(6)) : inner)) / 6;
    }
    case kSiLU: return z / (1 + exponential(-z));
    case kGELU: return z * (R(0.5) * (1 + error_function(z * R(0.70710678118654752440))));
    case kSigmoid: return sigmoid(z);
    case kTanh: return hyperbolic_tangent(z);
    default: return z;
  }
}

// d activate(z) / dz. For relu, relu6 and leaky_relu z may be the output: its range tells the same.
template <class R> __attribute__((noinline)) Pack<R> activation_slope(int code, R slope, Pack<R> z) {
  typedef Pack<R> P;
  const P zero = P{}, one = splat<P>(R(1));
  switch (code) {
    case kReLU: return z > 0 ? one : zero;
    case kReLU6: return z > 0 ? (z < 6 ? one : zero) : zero;
    case kLeakyReLU: return z > 0 ? one : splat<P>(slope);
    case kHardswish: return z < -3 ? zero : (z <= 3 ? z / 3 + R(0.5) : one);
    case kSiLU: {
      const P s = sigmoid(z);
      return s * (1 + z * (1 - s));
    }
    case kGELU: {
      const P cdf = R(0.5) * (1 + error_function(z * R(0.70710678118654752440)));
      return cdf + z * (exponential(z * z * R(-0.5)) * R(0.39894228040143267794));
    }
    case kSigmoid: {
      const P s = sigmoid(z);
      return s * (1 - s);
    }
    case kTanh: {
      const P t = hyperbolic_tangent(z);
      return 1 - t * t;
    }
    default: return one;
  }
}

}  // namespace nw::NW_ISA
