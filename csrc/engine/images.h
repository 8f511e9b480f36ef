// Convolutions and pooling of one panel of images, kept as [height][width][channels][panel]: the channels of neighbouring
// pixels follow each other, so a kernel's row is one span of the product's micro-kernel, cut off at the border instead
// of padded. Everything up to the flattened values is done for one panel before the next, as images soon fill L2.
#pragma once
#include "packed.h"

namespace modeconn {

constexpr int64_t combined_bytes = 2 << 20;  // of the points that are combined at once: they should stay near

template <class T> class Images {
 public:
  Images(const Chain<T>& chain, const Kernels<T>& kernels, const Packing<T>& packing) : chain_(chain), k_(kernels) {
    if (chain.steps.empty()) return;
    auto conv = packing.convs.begin();
    const ImageStep<T>* end = chain.steps.data() + chain.steps.size();
    // A pooling whose windows do not overlap takes the rows before it as they are made.
    auto pooling = [&](const ImageStep<T>* s) { return s != end && s->op != Op::conv && s->window.apart() ? s : nullptr; };
    const ImageStep<T>* step = chain.steps.data();
    const ImageStep<T>* pool = pooling(step);
    add({nullptr, nullptr, pool, step->in, step->in, pool ? pool->out : step->in});
    for (step += pool != nullptr; step != end; step += 1 + (pool != nullptr)) {
      pool = step->op == Op::conv ? pooling(step + 1) : nullptr;
      add({step, step->op == Op::conv ? &*conv++ : nullptr, pool, step->in, step->out, pool ? pool->out : step->out});
    }
  }

  // How many points are combined at once: one reading and transposition of the terms serves them all.
  int64_t share() const { return stages_.empty() ? 1 : std::clamp<int64_t>(combined_bytes / (first() * int64_t(sizeof(T))), 1, 8); }

  int64_t scratch(int64_t points) const { return stages_.empty() ? 0 : points * first() + 2 * value_ + strip_; }

  // Combines the terms of the samples from `row` at the points point .. point + points, and pools them if that is next.
  void combine(int64_t point, int64_t points, int64_t row, int samples, T* scratch) const {
    const Stage& s = stages_[0];
    int64_t terms = int64_t(chain_.terms.size()), height = s.pool ? s.pool->window.kernel[0] : 1, size = height * s.in.width * k_.panel;
    T *mixed = scratch + 2 * value_, *staged = mixed + size;
    const T one = 1;
    std::vector<const T*> at;
    for (int64_t j = 0; j < terms; ++j) at.push_back(staged + j * size);
    std::vector<Active<T, const T*>> active;
    for (int64_t i = 0; i < points; ++i) active.emplace_back(at, chain_.coefficients + (point + i) * terms);
    for (int64_t c = 0; c < s.in.channels; ++c)
      for (int64_t h = 0; h < s.out.height; ++h) {
        int64_t top = s.pool ? h * s.pool->window.stride[0] : h;
        for (int64_t j = 0; j < terms; ++j) {
          Rows<T> rows = chain_.terms[j];
          rows.data += row * rows.stride + c * s.in.pixels() + top * s.in.width;
          for (int i = 0; i < samples; ++i)  // what comes next: no hardware follows so many rows
            for (int64_t k = 0; k < height * s.in.width; k += cache_line / int64_t(sizeof(T)))
              __builtin_prefetch(rows.data + i * rows.stride + height * s.in.width + k, 0, 2);
          k_.combine_rows(1, &rows, &one, samples, height * s.in.width, Activation{}, staged + j * size);
        }
        T* y = scratch + 2 * value_ + strip_;
        for (const auto& a : active) {
          k_.combine(a.count(), a.items.data(), a.coefficients.data(), size, chain_.act, mixed);
          if (s.pool) pool(*s.pool, mixed, top, c, 1, h, h + 1, y);
          for (int64_t w = 0; w < s.in.width && !s.pool; ++w)
            std::copy_n(mixed + w * k_.panel, k_.panel, y + ((h * s.in.width + w) * s.in.channels + c) * k_.panel);
          y += first();
        }
      }
  }

  // The i-th of the combined points to flattened values [channels][height][width][panel]; false: stopped.
  template <class Stop> bool run(int64_t i, const T* packed, T* scratch, T* out, Stop&& stop) const {
    const T* x = scratch + 2 * value_ + strip_ + i * first();
    T* y = scratch;
    T* spare = y + value_;
    T* strip = spare + value_;
    for (auto s = stages_.begin() + 1; s != stages_.end(); ++s) {
      if (stop()) return false;
      if (s->packed) convolve(*s, x, packed, strip, y);
      else pool(*s->step, x, 0, 0, s->in.channels, 0, s->out.height, y);
      x = y;
      std::swap(y, spare);
    }
    flatten(stages_.back().out, x, out);
    return true;
  }

 private:
  // What is made (combined terms, a convolution, a pooling of its own), and the pooling of it, if any, on the way.
  struct Stage {
    const ImageStep<T>* step;  // null: the terms
    const PackedLayer<T>* packed;
    const ImageStep<T>* pool;
    Image in, made, out;
  };

  void add(const Stage& s) {
    stages_.push_back(s);
    if (s.step) value_ = std::max(value_, s.out.count() * k_.panel);
    int64_t rows = (s.pool ? s.pool->window.kernel[0] : 1) * s.made.width * k_.panel;
    strip_ = std::max(strip_, rows * (s.step ? std::min<int64_t>(k_.units, s.made.channels) : int64_t(chain_.terms.size()) + 1));
  }

  // `make(row, end, to)` writes the rows of `channels` channels, in a strip if they are pooled; else it is told where.
  template <class Make>
  void rows(const Stage& s, int64_t u0, int64_t channels, int64_t begin, int64_t end, T* strip, T* y, Make&& make) const {
    if (!s.pool) return make(begin, end, y + (begin * s.out.width * s.out.channels + u0) * k_.panel, s.out.channels * k_.panel);
    for (int64_t row = begin; row < end; ++row) {
      int64_t first = row * s.pool->window.stride[0];
      make(first, first + s.pool->window.kernel[0], strip, channels * k_.panel);
      pool(*s.pool, strip, first, u0, channels, row, row + 1, y);
    }
  }

  // In chunks of output rows whose input stays in L2, and for each, tile by tile: a tile's weights pass over all pixels.
  void convolve(const Stage& s, const T* x, const T* packed, T* strip, T* y) const {
    const PackedLayer<T>& at = *s.packed;
    const Layer<T>& layer = *at.layer;
    int64_t per_row = s.step->window.stride[0] * (s.pool ? s.pool->window.stride[0] : 1);
    int64_t row_bytes = per_row * s.in.width * s.in.channels * k_.panel * int64_t(sizeof(T));
    int64_t chunk = std::max<int64_t>(1, l2_bytes() / 2 / row_bytes);
    for (int64_t begin = 0; begin < s.out.height; begin += chunk)
      for (int64_t i = 0, u0 = 0; i < at.tiles.count; u0 += at.tiles.size(i++)) {
        int units = at.tiles.size(i);
        const T* weights = packed + at.weights + u0 * layer.depth;
        const T* bias = layer.biased() ? packed + at.bias + u0 : nullptr;
        Prefetch prefetch(weights + units * layer.depth, i + 1 < at.tiles.count ? at.tiles.size(i + 1) * layer.depth : 0, s.made.pixels());
        rows(s, u0, units, begin, std::min(begin + chunk, s.out.height), strip, y,
             [&](int64_t row, int64_t end, T* to, int64_t pixel) { tile(s, x, weights, bias, units, row, end, to, pixel, prefetch); });
      }
  }

  void tile(const Stage& s, const T* x, const T* weights, const T* bias, int units, int64_t row, int64_t end, T* to, int64_t pixel,
            Prefetch& prefetch) const {
    const Window& w = s.step->window;
    const Activation& act = s.step->layer.act;
    int64_t channels = s.in.channels;
    std::vector<Span<T>> spans(w.kernel[0]);
    for (; row < end; ++row)
      for (int64_t column = 0; column < s.made.width; ++column, to += pixel, prefetch()) {
        Inside v(row, s.in.height, w, 0), h(column, s.in.width, w, 1);
        int count = 0;
        for (int64_t i = v.begin; i < v.end && h.begin < h.end; ++i)
          spans[count++] = {x + ((v.at + i) * s.in.width + h.at + h.begin) * channels * k_.panel,
                            weights + (i * w.kernel[1] + h.begin) * channels * units, (h.end - h.begin) * channels};
        k_.product(count, spans.data(), units, bias, false, fused(act.kind) ? act : Activation{}, to);
        if (!fused(act.kind)) k_.activate(act, units * k_.panel, to);
      }
  }

  // Output rows [row, end) of channels [u0, u0 + channels), from pixels of `channels` channels at x, where row `top` begins.
  void pool(const ImageStep<T>& step, const T* x, int64_t top, int64_t u0, int64_t channels, int64_t row, int64_t end, T* y) const {
    const Window& w = step.window;
    std::vector<const T*> taps(w.taps());
    for (; row < end; ++row)
      for (int64_t column = 0; column < step.out.width; ++column) {
        Inside v(row, step.in.height, w, 0), h(column, step.in.width, w, 1);
        int count = 0;
        for (int64_t i = v.begin; i < v.end; ++i)
          for (int64_t j = h.begin; j < h.end; ++j)
            taps[count++] = x + ((v.at + i - top) * step.in.width + h.at + j) * channels * k_.panel;
        k_.pool(step.op == Op::max_pool, count, taps.data(), T(w.taps()), channels * k_.panel,
                y + ((row * step.out.width + column) * step.out.channels + u0) * k_.panel);
      }
  }

  // The taps [begin, end) of a window that lie inside an image; tap 0 is at `at`.
  struct Inside {
    int64_t at, begin, end;
    Inside(int64_t out, int64_t size, const Window& w, int d)
        : at(out * w.stride[d] - w.padding[d]), begin(std::max<int64_t>(0, -at)), end(std::min(w.kernel[d], size - at)) {}
  };

  void flatten(const Image& image, const T* x, T* out) const {
    for (int64_t p = 0; p < image.pixels(); ++p)
      for (int64_t c = 0; c < image.channels; ++c, x += k_.panel) std::copy_n(x, k_.panel, out + (c * image.pixels() + p) * k_.panel);
  }

  int64_t first() const { return stages_[0].out.count() * k_.panel; }  // elements of a combined point

  const Chain<T>& chain_;
  const Kernels<T>& k_;
  std::vector<Stage> stages_;
  int64_t value_ = 0, strip_ = 0;  // elements: the largest value between stages, the largest strip
};

}  // namespace modeconn
