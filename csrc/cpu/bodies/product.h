// The product of a tile: `units` units of a layer for one panel of samples. Samples are the vectors and weights are
// broadcast scalars, so any number of units and any depth fill the vectors.
#pragma once
#include "../context.h"
#include "math.h"
#include "vector.h"

namespace modeconn {
namespace {

// sums += w x over `length` rows of the panel.
template <class S, int NV, int R>
MODECONN_INLINE void accumulate(typename S::V (&sums)[R][NV], const typename S::T* x, const typename S::T* w, int64_t length) {
  using V = typename S::V;
  for (int64_t k = length; k > 0; --k, x += NV * S::L, w += R) {
    V in[NV];
    for (int v = 0; v < NV; ++v) in[v] = load<S>(x + v * S::L);
    for (int u = 0; u < R; ++u) {
      V weight = splat<S>(w[u]);
      for (int v = 0; v < NV; ++v) sums[u][v] += weight * in[v];
    }
  }
}

// The activations that a product applies in registers.
template <class S> MODECONN_INLINE typename S::V fused(Activation act, typename S::V y) {
#define MODECONN_ROW(name, in_registers, cuda) \
  if constexpr (in_registers && Act::name != Act::identity) \
    if (act.kind == Act::name) y = apply<S, Act::name>(y, typename S::T(act.slope));
  MODECONN_ACTIVATIONS(MODECONN_ROW)
#undef MODECONN_ROW
  return y;
}

// out = act(sums + add + bias), for the units of a tile.
template <class S, int NV, int R>
MODECONN_INLINE void finish(const typename S::V (&sums)[R][NV], const typename S::T* bias, const typename S::T* add, Activation act,
                            typename S::T* out) {
  using V = typename S::V;
  constexpr int panel = NV * S::L;
  for (int u = 0; u < R; ++u)
    for (int v = 0; v < NV; ++v) {
      V y = sums[u][v];
      if (add) y += load<S>(add + u * panel + v * S::L);
      if (bias) y += bias[u];
      store<S>(out + u * panel + v * S::L, fused<S>(act, y));
    }
}

template <class S, int NV, int R>
void tile(int spans, const Span<typename S::T>* span, const typename S::T* bias, const typename S::T* add, Activation act,
          typename S::T* out) {
  using V = typename S::V;
  V acc[R][NV] = {};
  for (; spans > 0; --spans, ++span) accumulate<S, NV, R>(acc, span->x, span->w, span->length);
  finish<S, NV, R>(acc, bias, add, act, out);
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
