// Batch norm with the statistics of the batch: the moments of each unit's values, and their normalisation. Group norm, whose
// statistics are each sample's own.
#pragma once
#include "../context.h"
#include "product.h"
#include "vector.h"

namespace modeconn {
namespace {

template <class S, int NV> MODECONN_INLINE double sum_of(const typename S::V (&v)[NV], int samples) {
  alignas(64) typename S::T lanes[NV * S::L];
  for (int i = 0; i < NV; ++i) store<S>(lanes + i * S::L, v[i]);
  double sum = 0;
  for (int s = 0; s < samples; ++s) sum += double(lanes[s]);
  return sum;
}

// R units at once: about a mean that is rounded, then corrected by the deviations' own sum, so that no digit is lost however
// large the mean is.
template <class S, int NV, int R>
void moments_of(int64_t pixels, int64_t pitch, int samples, const typename S::T* x, double* mean, double* squares) {
  using T = typename S::T;
  using V = typename S::V;
  constexpr int L = S::L, panel = NV * L;
  V sum[R][NV] = {}, off[R][NV] = {}, square[R][NV] = {};
  double n = double(pixels) * samples;
  for (int64_t p = 0; p < pixels; ++p)
    for (int u = 0; u < R; ++u)
      for (int v = 0; v < NV; ++v) sum[u][v] += load<S>(x + p * pitch + u * panel + v * L);
  V about[R];
  for (int u = 0; u < R; ++u) about[u] = splat<S>(T(sum_of<S, NV>(sum[u], samples) / n));
  for (int64_t p = 0; p < pixels; ++p)
    for (int u = 0; u < R; ++u)
      for (int v = 0; v < NV; ++v) {
        V d = load<S>(x + p * pitch + u * panel + v * L) - about[u];
        off[u][v] += d;
        square[u][v] += d * d;
      }
  for (int u = 0; u < R; ++u) {
    double shift = sum_of<S, NV>(off[u], samples) / n;
    mean[u] = double(about[u][0]) + shift;
    double sum = sum_of<S, NV>(square[u], samples) - n * shift * shift;
    squares[u] = sum < 0 ? 0 : sum;
  }
}

template <class S, int NV>
void moments(int64_t pixels, int64_t pitch, int units, int samples, const typename S::T* x, double* mean, double* squares) {
  constexpr int panel = NV * S::L;
  int u = 0;
  for (; u + 2 <= units; u += 2) moments_of<S, NV, 2>(pixels, pitch, samples, x + u * panel, mean + u, squares + u);
  if (u < units) moments_of<S, NV, 1>(pixels, pitch, samples, x + u * panel, mean + u, squares + u);
}

template <class S, int NV>
void normalise(int64_t pixels, int64_t units, const typename S::T* x, const typename S::T* scale, const typename S::T* shift,
               const typename S::T* add, Activation act, typename S::T* out) {
  using V = typename S::V;
  constexpr int L = S::L, panel = NV * L;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t u = 0; u < units; ++u) {
      V a = splat<S>(scale[u]), b = splat<S>(shift[u]);
      for (int64_t v = (p * units + u) * panel, end = v + panel; v < end; v += L) {
        V y = a * load<S>(x + v) + b;
        if (add) y += load<S>(add + v);
        store<S>(out + v, fused<S>(act, y));
      }
    }
}

// Not std::sqrt: a compiler that does not inline it makes a symbol that instruction sets would share.
MODECONN_INLINE float root(float x) { return __builtin_sqrtf(x); }
MODECONN_INLINE double root(double x) { return __builtin_sqrt(x); }

// The sum over a group's values of f(value), added up in parts so that rounding errors stay small.
template <class S, int NV, class F>
MODECONN_INLINE void add_up(int64_t pixels, int64_t pitch, int64_t units, const typename S::T* x, typename S::V (&sum)[NV], F&& f) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t u = 0; u < units; u += 64) {
      typename S::V part[NV] = {};
      for (int64_t i = u; i < units && i < u + 64; ++i)
        for (int v = 0; v < NV; ++v) part[v] += f(load<S>(x + p * pitch + (i * NV + v) * S::L), v);
      for (int v = 0; v < NV; ++v) sum[v] += part[v];
    }
}

template <class S, int NV>
void group_norm(int64_t pixels, int64_t units, int64_t groups, const typename S::T* x, double eps, const typename S::T* scale,
                const typename S::T* shift, Activation act, typename S::T* out) {
  using T = typename S::T;
  using V = typename S::V;
  constexpr int L = S::L, panel = NV * L;
  int64_t count = units / groups, pitch = units * panel;
  T share = T(1 / double(pixels * count));
  for (int64_t u0 = 0; u0 < units; u0 += count) {
    const T* from = x + u0 * panel;
    // About a mean that is rounded, then corrected, as in `moments`.
    V mean[NV] = {}, off[NV] = {}, square[NV] = {}, factor[NV];
    add_up<S, NV>(pixels, pitch, count, from, mean, [](V y, int) { return y; });
    for (int v = 0; v < NV; ++v) mean[v] *= share;
    add_up<S, NV>(pixels, pitch, count, from, off, [&](V y, int v) { return y - mean[v]; });
    for (int v = 0; v < NV; ++v) off[v] *= share;
    add_up<S, NV>(pixels, pitch, count, from, square, [&](V y, int v) { V d = y - mean[v] - off[v]; return d * d; });
    for (int v = 0; v < NV; ++v)
      for (int i = 0; i < L; ++i) factor[v][i] = 1 / root(square[v][i] * share + T(eps));
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t u = 0; u < count; ++u)
        for (int v = 0; v < NV; ++v) {
          int64_t at = p * pitch + u * panel + v * L;
          V y = (load<S>(from + at) - mean[v] - off[v]) * (factor[v] * scale[u0 + u]) + shift[u0 + u];
          store<S>(out + u0 * panel + at, fused<S>(act, y));
        }
  }
}

}  // namespace
}  // namespace modeconn
