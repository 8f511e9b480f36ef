// Steps without weights that take values of one size pixel by pixel: sums, a scale and shift of each channel, some of the
// channels, values side by side. On one panel, [pixels][channels][panel]; rows are images of one pixel.
#pragma once
#include <algorithm>

#include "chain.h"

namespace modeconn {

inline bool pointwise(Op op) { return op == Op::sum || op == Op::affine || op == Op::take || op == Op::concat; }

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
  } else if (s.op == Op::affine) {
    std::vector<T> factors(s.norm.scale + point * channels, s.norm.scale + (point + 1) * channels);
    factors.insert(factors.end(), s.norm.shift + point * channels, s.norm.shift + (point + 1) * channels);
    scale_and_shift(k, s, factors.data(), factors.data() + channels, x[0], x.size() > 1 ? x[1] : nullptr, y);
  } else {
    T* to = y;
    for (int64_t p = 0; p < pixels; ++p)
      for (size_t i = 0; i < s.channels.size(); ++i) {
        bool take = s.op == Op::take;
        int64_t count = take ? 1 : s.channels[i];
        const T* from = take ? x[0] + (p * s.in.channels + s.channels[i]) * k.panel : x[i] + p * count * k.panel;
        to = std::copy_n(from, count * k.panel, to);
      }
    if (s.act.kind != Act::identity) k.activate(s.act, s.out.count() * k.panel, y);
  }
}

}  // namespace modeconn
