// Losses and errors of one panel of logits [classes][panel]; logits never leave the cache.
#pragma once
#include "../context.h"
#include "math.h"
#include "vector.h"

namespace modeconn {
namespace {

template <class S> MODECONN_INLINE typename S::M lanes(const int64_t* values, int n) {
  alignas(64) typename S::I lane[S::L] = {};
  if (n == S::L)
    for (int i = 0; i < S::L; ++i) lane[i] = typename S::I(values[i]);
  else
    for (int i = 0; i < n; ++i) lane[i] = typename S::I(values[i]);
  return *(const typename S::M*)lane;
}

// Lanes beyond n hold samples that do not exist, whatever their values.
template <class S> MODECONN_INLINE double sum_first(typename S::V v, int n) {
  alignas(64) typename S::T lane[S::L];
  store<S>(lane, v);
  for (int i = n; i < S::L; ++i) lane[i] = 0;
  double part[2] = {};
  for (int i = 0; i < S::L; ++i) part[i % 2] += lane[i];
  return part[0] + part[1];
}

// The sum of comparisons, true being -1, over the first n lanes, negated: how many are true.
template <class S> MODECONN_INLINE double count_first(typename S::M v, int n) {
  alignas(64) typename S::I lane[S::L];
  *(typename S::M*)lane = v;
  for (int i = n; i < S::L; ++i) lane[i] = 0;
  typename S::I count = 0;
  for (int i = 0; i < S::L; ++i) count -= lane[i];
  return double(count);
}

// NaN counts as the maximum and the first one wins, as in PyTorch; rare, so not part of the search for the maximum.
template <class S>
typename S::M first_nan(const typename S::T* x, int panel, int64_t classes, typename S::M best) {
  for (int64_t c = classes - 1; c >= 0; --c) {
    typename S::V v = load<S>(x + c * panel);
    best = v != v ? typename S::M{} + typename S::I(c) : best;
  }
  return best;
}

// loss = log1p(sum of exp(x_c - max) over all c but the argmax) + (max - x_label): nothing cancels, so that losses
// far below the machine epsilon of 1 keep their digits. An infinite or NaN maximum gives NaN, as in PyTorch.
template <class S, int NV>
LossSums cross_entropy(const typename S::T* x, int samples, int64_t classes, const int64_t* labels, bool top5) {
  using V = typename S::V;
  using M = typename S::M;
  using I = typename S::I;
  constexpr int L = S::L, P = NV * L;
  LossSums sums;
  for (int g = 0; g * L < samples; ++g, x += L, labels += L) {
    int n = samples - g * L < L ? samples - g * L : L;
    M lab = lanes<S>(labels, n), best = {};
    V max = load<S>(x), xl = max;
    for (int64_t c = 1; c < classes; ++c) {
      V v = load<S>(x + c * P);
      best = v > max ? M{} + I(c) : best;
      max = v > max ? v : max;
      xl = lab == I(c) ? v : xl;
    }
    V sum = {};
    for (int64_t c = 0; c < classes;) {  // short partial sums: the error does not grow with the number of classes
      V part = {};
      for (int64_t end = c + 32 < classes ? c + 32 : classes; c < end; ++c) {
        V e = exp_negative<S>(load<S>(x + c * P) - max);
        part += best == I(c) ? V{} : e;
      }
      sum += part;
    }
    double loss = sum_first<S>(log1p_positive<S>(sum) + (max - xl) + (max - max), n);
    if (loss != loss) best = first_nan<S>(x, P, classes, best);
    sums.loss += loss;
    sums.errors += count_first<S>(best != lab, n);
    if (top5) {
      M above = {};
      for (int64_t c = 0; c < classes; ++c) {
        V v = load<S>(x + c * P);
        M greater = (v > xl) | ((v != v) & (xl == xl)), equal = (v == xl) | ((v != v) & (xl != xl));
        above -= greater | (equal & (lab > I(c)));
      }
      sums.errors5 += count_first<S>(above >= 5, n);
    }
  }
  return sums;
}

// Calls f(lanes, n, x, y) with so many samples of n units, in the panel from x on and as vectors y of their targets [samples][width].
template <class S, int NV, class F>
MODECONN_INLINE void each_target(const typename S::T* x, int samples, int64_t width, const typename S::T* targets, ptrdiff_t stride, F&& f) {
  using V = typename S::V;
  constexpr int L = S::L, P = NV * L;
  for (int g = 0; g * L < samples; ++g)
    for (int64_t k0 = 0; k0 < width; k0 += L) {
      int n = width - k0 < L ? int(width - k0) : L;
      V r[L];
      for (int i = 0; i < L; ++i)
        r[i] = g * L + i < samples ? load_first<S>(targets + (g * L + i) * stride + k0, n) : V{};
      transpose<S>(r);
      f(samples - g * L < L ? samples - g * L : L, n, x + k0 * P + g * L, r);
    }
}

// Sum over samples of the mean over units of (x - y)^2.
template <class S, int NV>
LossSums mse(const typename S::T* x, int samples, int64_t width, const typename S::T* targets, ptrdiff_t stride) {
  using V = typename S::V;
  LossSums sums;
  each_target<S, NV>(x, samples, width, targets, stride, [&](int lanes, int n, const typename S::T* at, const V* y) {
    V part = {};
    for (int i = 0; i < n; ++i) {
      V d = load<S>(at + i * NV * S::L) - y[i];
      part += d * d;
    }
    sums.loss += sum_first<S>(part, lanes);
  });
  sums.loss /= double(width);
  return sums;
}

// Sums over samples of the means over units of -log sigmoid(x) for target 1, -log(1 - sigmoid(x)) for target 0, what is
// between in proportion; and of whether x > 0 differs from y > 1/2.
template <class S, int NV>
LossSums bce(const typename S::T* x, int samples, int64_t width, const typename S::T* targets, ptrdiff_t stride) {
  using T = typename S::T;
  using V = typename S::V;
  LossSums sums;
  each_target<S, NV>(x, samples, width, targets, stride, [&](int lanes, int n, const T* at, const V* y) {
    V part = {};
    typename S::M wrong = {};
    for (int i = 0; i < n; ++i) {
      V v = load<S>(at + i * NV * S::L);
      part += (1 - y[i]) * v - (v < 0 ? v : V{}) + log1p_positive<S>(exp_negative<S>(-absolute<S>(v)));
      wrong += (v > 0) ^ (y[i] > T(0.5));
    }
    sums.loss += sum_first<S>(part, lanes);
    sums.errors += count_first<S>(wrong, lanes);
  });
  sums.loss /= double(width), sums.errors /= double(width);
  return sums;
}

}  // namespace
}  // namespace modeconn
