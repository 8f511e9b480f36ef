// exp, expm1, log1p and the activations on vectors, to about 1-2 units in the last place. No table: after range reduction
// the Taylor series themselves are short enough, and only the normal distribution takes a fitted polynomial.
#pragma once
#include "../context.h"
#include "vector.h"

namespace modeconn {
namespace {

template <class T> struct Real;
template <> struct Real<float> {
  static constexpr int mantissa = 23, bias = 127, exp_terms = 7, log_terms = 5;
  static constexpr float magic = 12582912.f;                        // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860677e-06f;  // high * n is exact
  static constexpr float exp_low = -87.3f;                          // below it exp counts as zero (< 1.2e-38)
  static constexpr float root_half = 0.70710678f;
};
template <> struct Real<double> {
  static constexpr int mantissa = 52, bias = 1023, exp_terms = 13, log_terms = 12;
  static constexpr double magic = 6755399441055744.0;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double exp_low = -708.0;
  static constexpr double root_half = 0.70710678118654752;
};

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

template <class S, int N, int I> MODECONN_INLINE typename S::V exp_series(typename S::V r) {
  constexpr auto c = typename S::T(inverse_factorial(I));
  if constexpr (I == N) return splat<S>(c);
  else return exp_series<S, N, I + 1>(r) * r + c;
}

// For exp_low <= x <= 0 or NaN: scale = 2^n and q with exp(x) = scale + scale * q. Below exp_low the callers mask.
template <class S> MODECONN_INLINE void exp_parts(typename S::V x, typename S::V& scale, typename S::V& q) {
  using R = Real<typename S::T>;
  using U = typename S::U;
  typename S::V shifted = x * typename S::T(1.4426950408889634) + R::magic;
  typename S::V n = shifted - R::magic;
  typename S::V r = (x - n * R::ln2_high) - n * R::ln2_low;
  q = exp_series<S, R::exp_terms, 1>(r) * r;
  scale = (typename S::V)(((U)shifted << R::mantissa) + (typename S::Bits(R::bias) << R::mantissa));
}

template <class S> MODECONN_INLINE typename S::V exp_negative(typename S::V x) {
  typename S::V scale, q;
  exp_parts<S>(x, scale, q);
  return x < Real<typename S::T>::exp_low ? typename S::V{} : scale * q + scale;
}

template <class S> MODECONN_INLINE typename S::V expm1_negative(typename S::V x) {
  typename S::V scale, q;
  exp_parts<S>(x, scale, q);
  return x < Real<typename S::T>::exp_low ? splat<S>(-1) : scale * q + (scale - 1);
}

template <class S, int N, int I> MODECONN_INLINE typename S::V atanh_series(typename S::V z) {
  constexpr auto c = typename S::T(2.0 / (2 * I + 1));
  if constexpr (I + 1 == N) return splat<S>(c);
  else return atanh_series<S, N, I + 1>(z) * z + c;
}

// For y >= 0: 1 + y = 2^e (1 + f), log(1 + f) = 2 atanh(f / (2 + f)); for small y, f is y itself and nothing is lost.
template <class S> MODECONN_INLINE typename S::V log1p_positive(typename S::V y) {
  using R = Real<typename S::T>;
  using M = typename S::M;
  using U = typename S::U;
  using V = typename S::V;
  V u = 1 + y;
  M e = (M)((U)u - (U)splat<S>(R::root_half)) >> R::mantissa;
  V f = (V)((U)u - ((U)e << R::mantissa)) - 1;
  f = e == 0 ? y : f;
  V n = __builtin_convertvector(e, V);
  V s = f / (2 + f);
  V log = atanh_series<S, R::log_terms, 0>(s * s) * s;
  log = n * R::ln2_high + (n * R::ln2_low + log);
  return y - y == 0 ? log : y;  // NaN and infinity stay
}

template <class S> MODECONN_INLINE typename S::V absolute(typename S::V x) { return x < 0 ? -x : x; }

template <class S> MODECONN_INLINE typename S::V sigmoid(typename S::V x) {
  typename S::V e = exp_negative<S>(-absolute<S>(x));
  return (x < 0 ? e : splat<S>(1)) / (1 + e);
}

template <class S> MODECONN_INLINE typename S::V tanh(typename S::V x) {
  typename S::V m = expm1_negative<S>(-2 * absolute<S>(x));
  typename S::V y = -m / (2 + m);
  return x < 0 ? -y : y;
}

// exp(z^2) erfc(z) / 2t with t = 1 / (1 + z / 2), for z >= 0, as a polynomial in 2t - 1: its Chebyshev series, computed to
// 60 digits and cut off where the terms fall below the precision.
template <class T> struct Tail;
template <> struct Tail<float> {
  static constexpr int degree = 10;
  static constexpr double c[] = {
      0.2553956785, 0.1717901594, 0.06986786676, 0.009110834714, -0.005375813093, -0.001621725959,
      0.0007645785804, 0.0002153352442, -0.000149691356, -1.830093847e-5, 2.10805986e-5};
};
template <> struct Tail<double> {
  static constexpr int degree = 25;
  static constexpr double c[] = {
      0.255395676310505763, 0.171790171103452568, 0.0698680231390073757, 0.00911055787672951995, -0.00537766547201826569,
      -0.00161979626729103373, 0.000772653007050664343, 0.000209324021639555565, -0.000165768288345073062, -8.59291593744487575e-6,
      0.000036117094147524034, -8.5368905669094572e-6, -5.42149266498220508e-6, 4.0289379335736702e-6, -2.88821180575571338e-7,
      -9.07517754027083282e-7, 5.15284960764555269e-7, -6.87725411659297257e-9, -1.631230467648336e-7, 8.93361473958426727e-8,
      1.80004226460399672e-8, -3.48292147170456915e-8, 3.26021730720076979e-9, 6.60816275881632432e-9, -9.55586864303946971e-10,
      -5.29516657178589932e-10};
};

template <class S, int I = 0> MODECONN_INLINE typename S::V tail_polynomial(typename S::V y) {
  constexpr auto c = typename S::T(Tail<typename S::T>::c[I]);
  if constexpr (I == Tail<typename S::T>::degree) return splat<S>(c);
  else return tail_polynomial<S, I + 1>(y) * y + c;
}

// x times the normal distribution of x; the probability beyond |x| is erfc(|x| / sqrt(2)) / 2.
template <class S> MODECONN_INLINE typename S::V gelu(typename S::V x) {
  using T = typename S::T;
  typename S::V t = 1 / (1 + absolute<S>(x) * T(0.35355339059327376));
  typename S::V beyond = exp_negative<S>(x * x * T(-0.5)) * t * tail_polynomial<S>(2 * t - 1);
  return x * (x < 0 ? beyond : 1 - beyond);
}

// log(1 + exp(x)); beyond 20 it is x, as in PyTorch.
template <class S> MODECONN_INLINE typename S::V softplus(typename S::V x) {
  typename S::V rest = log1p_positive<S>(exp_negative<S>(-absolute<S>(x)));
  return x > 20 ? x : (x < 0 ? rest : x + rest);
}

// log(1 / (1 + exp(-x))): the smaller of x and 0, less what is left of the logarithm.
template <class S> MODECONN_INLINE typename S::V log_sigmoid(typename S::V x) {
  typename S::V rest = log1p_positive<S>(exp_negative<S>(-absolute<S>(x)));
  return (x < 0 ? x : typename S::V{}) - rest;
}

// x tanh(softplus(x)), and tanh(log(w)) is (w^2 - 1) / (w^2 + 1): divided by exp(2x) where x is positive.
template <class S> MODECONN_INLINE typename S::V mish(typename S::V x) {
  typename S::V e = exp_negative<S>(-absolute<S>(x));
  typename S::V part = x < 0 ? e * (2 + e) : 1 + 2 * e;
  return x * part / (part + (x < 0 ? splat<S>(2) : 2 * e * e));
}

template <class S> MODECONN_INLINE typename S::V clamp6(typename S::V x) { return x < 0 ? typename S::V{} : (x > 6 ? splat<S>(6) : x); }

template <class S, Act act> MODECONN_INLINE typename S::V apply(typename S::V x, typename S::T slope) {
  using T = typename S::T;
  if constexpr (act == Act::relu) return x < 0 ? typename S::V{} : x;  // NaN stays NaN
  else if constexpr (act == Act::leaky_relu) return x > 0 ? x : x * slope;
  else if constexpr (act == Act::tanh) return tanh<S>(x);
  else if constexpr (act == Act::gelu) return gelu<S>(x);
  else if constexpr (act == Act::gelu_tanh)  // (1 + tanh(u)) / 2 = sigmoid(2u)
    return x * sigmoid<S>(T(1.5957691216057308) * (x + T(0.044715) * x * x * x));
  else if constexpr (act == Act::silu) return x * sigmoid<S>(x);
  else if constexpr (act == Act::sigmoid) return sigmoid<S>(x);
  else if constexpr (act == Act::relu6) return clamp6<S>(x);
  else if constexpr (act == Act::hardsigmoid) return clamp6<S>(x + 3) / 6;
  else if constexpr (act == Act::hardswish) return x * clamp6<S>(x + 3) / 6;
  else if constexpr (act == Act::elu) return x > 0 ? x : slope * expm1_negative<S>(-absolute<S>(x));
  else if constexpr (act == Act::selu)
    return T(1.0507009873554804934) * (x > 0 ? x : T(1.6732632423543772848) * expm1_negative<S>(-absolute<S>(x)));
  else if constexpr (act == Act::softplus) return softplus<S>(x);
  else if constexpr (act == Act::mish) return mish<S>(x);
  else if constexpr (act == Act::log_sigmoid) return log_sigmoid<S>(x);
  else return x;
}

template <Act a> struct ActTag { static constexpr Act value = a; };

// Calls f with the activation as a compile-time constant.
template <class F> MODECONN_INLINE void with_activation(Act act, F&& f) {
  switch (act) {
#define MODECONN_ROW(name, in_registers, cuda) \
  case Act::name: return f(ActTag<Act::name>{});
    MODECONN_ACTIVATIONS(MODECONN_ROW)
#undef MODECONN_ROW
  }
}

template <class S> void activate(Activation act, int64_t count, typename S::T* values) {
  with_activation(act.kind, [&](auto tag) {
    for (int64_t i = 0; i < count; i += S::L)
      store<S>(values + i, apply<S, decltype(tag)::value>(load<S>(values + i), typename S::T(act.slope)));
  });
}

}  // namespace
}  // namespace modeconn
