// Fills one table: lanes of S, NV vectors of samples in a panel, `units` in a tile.
#pragma once
#include "depthwise.h"
#include "head.h"
#include "move.h"
#include "norm.h"
#include "product.h"
#include "winograd.h"

namespace modeconn {
namespace {

#ifdef MODECONN_MOST_UNITS  // of a tile, in tests: the compiler takes its time for each number of units
constexpr int most_units(int units) { return units < MODECONN_MOST_UNITS ? units : MODECONN_MOST_UNITS; }
#else
constexpr int most_units(int units) { return units; }
#endif

template <class S, int NV, int units> void fill(Kernels<typename S::T>& k, const char* name) {
  constexpr int MR = most_units(units);
  k.name = name;
  k.panel = NV * S::L;
  k.units = MR;
  k.depth = 32 * 1024 / (k.panel * int(sizeof(typename S::T)));
  k.pack = pack<S, MR>;
  k.combine_rows = combine_rows<S, NV>;
  k.combine = combine<S>;
  k.product = product<S, NV, MR>;
  k.depthwise = depthwise<S, NV, MR>;
  k.winograd_weights = winograd_weights<S>;
  k.winograd_input = winograd_input<S, NV>;
  k.winograd = winograd<S, NV, MR>;
  k.multiply = multiply<S>;
  k.pool = pool<S>;
  k.activate = activate<S>;
  k.moments = moments<S, NV>;
  k.normalise = normalise<S, NV>;
  k.group_norm = group_norm<S, NV>;
  k.write_rows = write_rows<S, NV>;
  k.cross_entropy = cross_entropy<S, NV>;
  k.mse = mse<S, NV>;
  k.bce = bce<S, NV>;
}

}  // namespace
}  // namespace modeconn
