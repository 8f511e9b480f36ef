// A tile of a depthwise convolution: each of `units` units reads its own channel at every tap.
#pragma once
#include "../context.h"
#include "product.h"

namespace modeconn {
namespace {

template <class S, int NV, int R>
void depthwise_tile(int taps, const typename S::T* const* x, const typename S::T* w, const typename S::T* bias,
                    const typename S::T* add, Activation act, typename S::T* out) {
  using V = typename S::V;
  constexpr int panel = NV * S::L;
  V acc[R][NV] = {};
  for (int tap = 0; tap < taps; ++tap, w += R)
    for (int u = 0; u < R; ++u) {
      V weight = splat<S>(w[u]);
      for (int v = 0; v < NV; ++v) acc[u][v] += weight * load<S>(x[tap] + u * panel + v * S::L);
    }
  finish<S, NV, R>(acc, bias, add, act, out);
}

template <class S, int NV, int MR, size_t... r>
MODECONN_INLINE void depthwise_of(int units, int taps, const typename S::T* const* x, const typename S::T* w, const typename S::T* bias,
                                  const typename S::T* add, Activation act, typename S::T* out, std::index_sequence<r...>) {
  using T = typename S::T;
  using F = void (*)(int, const T* const*, const T*, const T*, const T*, Activation, T*);
  static constexpr F tiles[MR] = {depthwise_tile<S, NV, int(r) + 1>...};
  tiles[units - 1](taps, x, w, bias, add, act, out);
}

template <class S, int NV, int MR>
void depthwise(int taps, const typename S::T* const* x, const typename S::T* w, int units, const typename S::T* bias,
               const typename S::T* add, Activation act, typename S::T* out) {
  depthwise_of<S, NV, MR>(units, taps, x, w, bias, add, act, out, std::make_index_sequence<MR>{});
}

}  // namespace
}  // namespace modeconn
