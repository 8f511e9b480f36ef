// Steps without weights that keep their image's size: sums, products, a scale and shift of each channel, group norms, some of the
// channels, values side by side. On one panel, [pixels][channels][panel]; rows are images of one pixel.
#pragma once
#include <algorithm>

#include "chain.h"

namespace modeconn {

inline bool pointwise(Op op) {
  return op == Op::sum || op == Op::multiply || op == Op::affine || op == Op::group_norm || op == Op::take || op == Op::concat;
}

// out = act(scale x + shift + add), with numbers for each channel; `add` may be null.
template <class T>
void scale_and_shift(const Kernels<T>& k, const Step<T>& s, const T* scale, const T* shift, const T* x, const T* add, T* y) {
  bool in_registers = fused(s.act.kind);
  k.normalise(s.out.pixels(), s.out.channels, x, scale, shift, add, in_registers ? s.act : Activation{}, y);
  if (!in_registers) k.activate(s.act, s.out.count() * k.panel, y);
}

template <class T> void run_pointwise(const Kernels<T>& k, const Step<T>& s, int64_t point, const std::vector<const T*>& x, T* y) {
  int64_t channels = s.out.channels, pixels = s.out.pixels();
  if (s.op == Op::sum) {
    const std::vector<T> ones(x.size(), T(1));
    k.combine(int(x.size()), x.data(), ones.data(), s.out.count() * k.panel, s.act, y);
  } else if (s.op == Op::multiply) {
    k.multiply(pixels, channels * k.panel, x[0], x[1], s.in.pixels() == pixels ? channels * k.panel : 0, y);
    if (s.act.kind != Act::identity) k.activate(s.act, s.out.count() * k.panel, y);
  } else if (s.op == Op::affine || s.op == Op::group_norm) {
    std::vector<T> factors(s.norm.scale + point * channels, s.norm.scale + (point + 1) * channels);
    factors.insert(factors.end(), s.norm.shift + point * channels, s.norm.shift + (point + 1) * channels);
    const T *scale = factors.data(), *shift = scale + channels;
    if (s.op == Op::affine) return scale_and_shift(k, s, scale, shift, x[0], x.size() > 1 ? x[1] : nullptr, y);
    bool in_registers = fused(s.act.kind);
    k.group_norm(pixels, channels, s.norm.groups, x[0], s.norm.eps, scale, shift, in_registers ? s.act : Activation{}, y);
    if (!in_registers) k.activate(s.act, s.out.count() * k.panel, y);
  } else {
    T* to = y;
    for (int64_t p = 0; p < pixels; ++p)
      for (size_t i = 0; i < s.channels.size(); ++i) {
        int64_t c = s.channels[i];
        if (s.op == Op::concat) to = std::copy_n(x[i] + p * c * k.panel, c * k.panel, to);
        else if (c < 0) to = std::fill_n(to, k.panel, T(0));
        else to = std::copy_n(x[0] + (p * s.in.channels + c) * k.panel, k.panel, to);
      }
    if (s.act.kind != Act::identity) k.activate(s.act, s.out.count() * k.panel, y);
  }
}

}  // namespace modeconn
