// The product of a tile: `units` units of a layer for one panel of samples. Samples are the vectors and weights are
// broadcast scalars, so any number of units and any depth fill the vectors.
#pragma once
#include "../context.h"
#include "math.h"
#include "vector.h"

namespace modeconn {
namespace {

template <class S, int NV, int R>
void tile(int spans, const Span<typename S::T>* span, const typename S::T* bias, const typename S::T* add, Activation act,
          typename S::T* out) {
  using T = typename S::T;
  using V = typename S::V;
  constexpr int panel = NV * S::L;
  V acc[R][NV];
  for (int u = 0; u < R; ++u)
    for (int v = 0; v < NV; ++v) acc[u][v] = V{};
  for (; spans > 0; --spans, ++span) {
    const T* x = span->x;
    const T* w = span->w;
    for (int64_t k = span->length; k > 0; --k, x += panel, w += R) {
      V in[NV];
      for (int v = 0; v < NV; ++v) in[v] = load<S>(x + v * S::L);
      for (int u = 0; u < R; ++u) {
        V weight = splat<S>(w[u]);
        for (int v = 0; v < NV; ++v) acc[u][v] += weight * in[v];
      }
    }
  }
  for (int u = 0; u < R; ++u)
    for (int v = 0; v < NV; ++v) {
      T* o = out + u * panel + v * S::L;
      V y = acc[u][v];
      if (add) y += load<S>(add + u * panel + v * S::L);
      if (bias) y += bias[u];
      if (act.kind == Act::relu) y = apply<S, Act::relu>(y, 0);
      if (act.kind == Act::leaky_relu) y = apply<S, Act::leaky_relu>(y, T(act.slope));
      store<S>(o, y);
    }
}

template <class S, int NV, int MR, size_t... r>
MODECONN_INLINE void tile_of(int units, int spans, const Span<typename S::T>* span, const typename S::T* bias, const typename S::T* add,
                             Activation act, typename S::T* out, std::index_sequence<r...>) {
  using F = void (*)(int, const Span<typename S::T>*, const typename S::T*, const typename S::T*, Activation, typename S::T*);
  static constexpr F tiles[MR] = {tile<S, NV, int(r) + 1>...};
  tiles[units - 1](spans, span, bias, add, act, out);
}

template <class S, int NV, int MR>
void product(int spans, const Span<typename S::T>* span, int units, const typename S::T* bias, const typename S::T* add, Activation act,
             typename S::T* out) {
  tile_of<S, NV, MR>(units, spans, span, bias, add, act, out, std::make_index_sequence<MR>{});
}

}  // namespace
}  // namespace modeconn
