// Data in and out of the panel layout, the combinations of control points on the way, and what goes value by value.
#pragma once
#include "../context.h"
#include "math.h"
#include "vector.h"

namespace modeconn {
namespace {

// sum_j c_j p_j; the first term is a plain product, so that a lone coefficient 1 keeps every bit (-0.0 too).
template <class S, class Load>
MODECONN_INLINE typename S::V weighted(int terms, const typename S::T* c, Load&& term) {
  if (!terms) return typename S::V{};
  typename S::V sum = c[0] * term(0);
  for (int j = 1; j < terms; ++j) sum += c[j] * term(j);
  return sum;
}

// [units][depth] rows -> [depth][units], combined.
template <class S, int MR>
void pack(int terms, const Rows<typename S::T>* w, const typename S::T* c, int units, int64_t depth, typename S::T* out) {
  using T = typename S::T;
  constexpr int L = S::L, groups = (MR + L - 1) / L;
  for (int64_t k0 = 0; k0 < depth; k0 += L) {
    int n = depth - k0 < L ? int(depth - k0) : L;
    alignas(64) T square[L][groups * L];
    for (int g = 0; g * L < units; ++g) {
      typename S::V r[L];
      for (int i = 0; i < L; ++i)
        r[i] = g * L + i < units
                   ? weighted<S>(terms, c, [&](int j) {
                       const T* p = w[j].data + (g * L + i) * w[j].stride + k0;
                       __builtin_prefetch(p + units * w[j].stride, 0, 2);  // the same columns of the next tile
                       return load_first<S>(p, n);
                     }) : typename S::V{};
      transpose<S>(r);
      for (int i = 0; i < L; ++i) store<S>(&square[i][g * L], r[i]);
    }
    for (int k = 0; k < n; ++k, out += units) {
      if ((depth - k0 - k) * units >= MR)  // a fixed length is fast; what it writes too much, the next k overwrites
        for (int u = 0; u < MR; ++u) out[u] = square[k][u];
      else
        for (int u = 0; u < MR && u < units; ++u) out[u] = square[k][u];
    }
  }
}

// Rows of samples -> panel [width][panel], combined and activated; samples that do not exist are zeros.
template <class S, int NV>
void combine_rows(int terms, const Rows<typename S::T>* rows, const typename S::T* c, int samples, int64_t width,
                  Activation act, typename S::T* panel) {
  constexpr int L = S::L, P = NV * L;
  for (int g = 0; g < NV; ++g)
    for (int64_t k0 = 0; k0 < width; k0 += L) {
      int n = width - k0 < L ? int(width - k0) : L;
      typename S::V r[L];
      for (int i = 0; i < L; ++i) {
        int s = g * L + i;
        r[i] = s < samples ? weighted<S>(terms, c, [&](int j) {
          const typename S::T* p = rows[j].data + s * rows[j].stride + k0;
          __builtin_prefetch(p + L * rows[j].stride, 0, 2);  // the same columns of the next L samples
          return load_first<S>(p, n);
        }) : typename S::V{};
      }
      transpose<S>(r);
      for (int i = 0; i < n; ++i) store<S>(panel + (k0 + i) * P + g * L, r[i]);
    }
  if (act.kind != Act::identity) activate<S>(act, width * P, panel);
}

template <class S>
void combine(int terms, const typename S::T* const* values, const typename S::T* c, int64_t count, Activation act,
             typename S::T* out) {
  for (int64_t i = 0; i < count; i += S::L)
    store<S>(out + i, weighted<S>(terms, c, [&](int j) { return load<S>(values[j] + i); }));
  if (act.kind != Act::identity) activate<S>(act, count, out);
}

// For each pixel its values times its factors, which are `apart` elements from those of the pixel before.
template <class S>
void multiply(int64_t pixels, int64_t count, const typename S::T* x, const typename S::T* factor, int64_t apart, typename S::T* out) {
  for (int64_t p = 0; p < pixels; ++p, x += count, factor += apart, out += count)
    for (int64_t i = 0; i < count; i += S::L) store<S>(out + i, load<S>(x + i) * load<S>(factor + i));
}

// NaN counts as the maximum, as in PyTorch.
template <class S>
void pool(bool max, int taps, const typename S::T* const* values, typename S::T divisor, int64_t count, typename S::T* out) {
  for (int64_t i = 0; i < count; i += S::L) {
    typename S::V y = load<S>(values[0] + i);
    for (int j = 1; j < taps; ++j) {
      typename S::V x = load<S>(values[j] + i);
      y = max ? ((x > y) | (x != x) ? x : y) : y + x;
    }
    store<S>(out + i, max ? y : y / divisor);
  }
}

template <class S, int NV>
void write_rows(const typename S::T* panel, int samples, int64_t width, typename S::T* out, ptrdiff_t stride) {
  constexpr int L = S::L, P = NV * L;
  for (int g = 0; g * L < samples; ++g)
    for (int64_t k0 = 0; k0 < width; k0 += L) {
      int n = width - k0 < L ? int(width - k0) : L;
      typename S::V r[L];
      for (int i = 0; i < L; ++i) r[i] = i < n ? load<S>(panel + (k0 + i) * P + g * L) : typename S::V{};
      transpose<S>(r);
      for (int i = 0; i < L && g * L + i < samples; ++i) store_first<S>(out + (g * L + i) * stride + k0, r[i], n);
    }
}

}  // namespace
}  // namespace modeconn
