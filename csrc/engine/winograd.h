// Winograd's F(2x2, 3x3): a square of 2 x 2 output pixels of a 3 x 3 convolution takes 16 products instead of 36. Where that
// pays, and the squares' transformed inputs.
#pragma once
#include "chain.h"

namespace modeconn {

constexpr int64_t winograd_products = 16;

// By the number of multiply-adds, as the kernels take time for them (csrc/README.md): never by a clock, so that the results
// depend on the problem alone.
template <class T> bool winograd_pays(const Step<T>& s) {
  const Window& w = s.window;
  if (s.op != Op::conv || s.layer.groups != 1) return false;
  int64_t squares = 1, taps = 1;  // of an image; the direct product's taps lie inside
  const int64_t out[2] = {s.out.height, s.out.width};
  for (int d : {0, 1}) {
    if (w.kernel[d] != 3 || w.stride[d] != 1 || w.dilation[d] != 1 || w.padding[d] > 1) return false;
    squares *= (out[d] + 1) / 2, taps *= 3 * out[d] - 2 * w.padding[d];
  }
  int64_t channels = s.in.channels, units = s.layer.units;
  return taps * channels * units > squares * (18 * channels * units + 96 * (channels + units));
}

// The transformed inputs of a convolution's squares: row by row of squares, each [16][channels][panel]. A cache line is left
// free behind each of the 16, as they often lie 4 KiB apart otherwise and would share a set of the first cache level.
template <class T> class Squares {
 public:
  Squares(const Step<T>& step, int panel)
      : in_(step.in), padding_{step.window.padding[0], step.window.padding[1]}, down_((step.out.height + 1) / 2),
        across_((step.out.width + 1) / 2), values_(in_.channels * panel) {}

  int64_t down() const { return down_; }
  int64_t across() const { return across_; }
  int64_t values() const { return values_; }                                    // of a pixel
  int64_t apart() const { return values_ + cache_line / int64_t(sizeof(T)); }   // elements from one of the 16 to the next
  int64_t size() const { return winograd_products * apart(); }                  // elements of a square
  int64_t row() const { return across_ * size(); }                              // elements of a row of squares

  // The squares whose first output row is `top`. zeros: as many as a pixel's values.
  void transform(const Kernels<T>& kernels, const T* x, int64_t top, const T* zeros, T* out) const {
    for (int64_t square = 0; square < across_; ++square, out += size()) {
      const T* pixels[16];
      for (int64_t i = 0; i < 16; ++i) {
        int64_t row = top + i / 4 - padding_[0], column = 2 * square + i % 4 - padding_[1];
        bool inside = row >= 0 && row < in_.height && column >= 0 && column < in_.width;
        pixels[i] = inside ? x + (row * in_.width + column) * values_ : zeros;
      }
      kernels.winograd_input(pixels, values_, apart(), out);
    }
  }

 private:
  Image in_;
  int64_t padding_[2], down_, across_, values_;
};

}  // namespace modeconn
