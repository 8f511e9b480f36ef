// Batch norm with the statistics of the batch: the moments of each unit's values, and their normalisation.
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

}  // namespace
}  // namespace modeconn
