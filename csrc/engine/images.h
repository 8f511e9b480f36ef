// The steps on one panel of images, kept as [height][width][channels][panel]: the channels of neighbouring pixels follow
// each other, so a kernel's row is one span of the product's micro-kernel, cut off at the border instead of padded.
// Everything up to the flattened values is done for one panel before the next, as images soon fill L2.
#pragma once
#include "packed.h"
#include "pointwise.h"

namespace modeconn {

constexpr int64_t combined_bytes = 2 << 20;  // of the points that are combined at once: they should stay near

// A step, and the pooling of its value, if any, on the way.
template <class T> struct Stage {
  const Step<T>* step;
  const PackedLayer<T>* packed;  // of a convolution
  const Step<T>* pool;
  Image made, out;               // by the step; after the pooling
  std::vector<int> inputs;       // earlier stages
  int64_t at = 0;                // of its value in the scratch
};

// The first gap of a size between what is used, [begin, end) each.
inline int64_t first_gap(std::vector<std::pair<int64_t, int64_t>> used, int64_t size) {
  std::sort(used.begin(), used.end());
  int64_t at = 0;
  for (const auto& [begin, end] : used) {
    if (at + size <= begin) break;
    at = std::max(at, end);
  }
  return at;
}

// Listens to the rows of a convolution as they are made, and does nothing with them.
struct Unseen {
  template <class... A> void operator()(A&&...) const {}
};

template <class T> class PanelSteps;

// All of the steps, one after the other.
template <class T> class Images {
 public:
  Images(const StepGraph<T>& chain, const Kernels<T>& kernels, const Packing<T>& packing) : k_(kernels), steps_(kernels) {
    if (!chain.images.empty()) make_stages(chain, packing), place();
  }

  // The number of points that are combined at once: one reading and transposition of the terms serves them all.
  int64_t share() const { return stages_.empty() ? 1 : std::clamp<int64_t>(combined_bytes / (first() * int64_t(sizeof(T))), 1, 8); }

  int64_t scratch(int64_t points) const { return stages_.empty() ? 0 : points * first() + values_ + strip_; }

  // Combines the first terms of the samples from `row` at the points point .. point + points, and pools them if that is next.
  void combine(int64_t point, int64_t points, int64_t row, int samples, T* scratch) const {
    steps_.combine(stages_[0], point, points, row, samples, scratch + values_, scratch + values_ + strip_);
  }

  // The i-th of the combined points to flattened values [channels][height][width][panel]; false: stopped.
  template <class Stop>
  bool run(int64_t i, int64_t point, int64_t row, int samples, const T* packed, T* scratch, T* out, Stop&& stop) const {
    auto value = [&](int stage) { return stage ? scratch + stages_[stage].at : scratch + values_ + strip_ + i * first(); };
    T* strip = scratch + values_;
    for (size_t index = 1; index < stages_.size(); ++index) {
      if (stop()) return false;
      const Stage<T>& s = stages_[index];
      std::vector<const T*> x;
      for (int j : s.inputs) x.push_back(value(j));
      T* y = value(int(index));
      if (s.packed) steps_.convolve(s, point + i, x[0], x.size() > 1 ? x[1] : nullptr, packed, strip, y, Unseen{});
      else if (s.step->op == Op::terms) steps_.combine(s, point + i, 1, row, samples, strip, y);
      else if (pointwise(s.step->op)) run_pointwise(k_, *s.step, point + i, x, y);
      else steps_.pool(*s.step, x[0], 0, 0, s.step->in.channels, 0, s.out.height, y);
    }
    steps_.flatten(stages_[result_].out, value(result_), out);
    return true;
  }

 private:
  // A pooling whose windows do not overlap takes the rows of terms or a convolution as they are made.
  void make_stages(const StepGraph<T>& chain, const Packing<T>& packing) {
    const std::vector<Step<T>>& steps = chain.images;
    std::vector<int> last = last_uses(steps, chain.flat), readers(steps.size()), stage(steps.size(), -1);
    for (const Step<T>& s : steps)
      for (int i : s.inputs) ++readers[i];
    auto conv = packing.convs.begin();
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step<T>& s = steps[i];
      const PackedLayer<T>* packed = s.op == Op::conv ? &*conv++ : nullptr;
      if (stage[i] >= 0 || (i && last[i] < 0)) continue;  // a pooling that is done, a value that no step reads
      const Step<T>* pool = nullptr;
      if ((s.op == Op::terms || s.op == Op::conv) && readers[i] == 1 && last[i] < int(steps.size())) pool = &steps[last[i]];
      if (pool && !steps_.pools(*pool, packed)) pool = nullptr;
      if (pool) stage[last[i]] = int(stages_.size());
      stage[i] = int(stages_.size());
      Stage<T> made{&s, packed, pool, s.out, pool ? pool->out : s.out, {}};
      for (int input : s.inputs) made.inputs.push_back(stage[input]);
      stages_.push_back(made);
      strip_ = std::max(strip_, steps_.strip(made));
    }
    result_ = stage[chain.flat];
  }

  // Where the values lie: each in the first gap between those that are still to be read.
  void place() {
    std::vector<int> last(stages_.size(), 0);
    for (size_t s = 0; s < stages_.size(); ++s)
      for (int i : stages_[s].inputs) last[i] = int(s);
    last[result_] = int(stages_.size());
    for (size_t s = 1; s < stages_.size(); ++s) {
      std::vector<std::pair<int64_t, int64_t>> used;
      for (size_t j = 1; j < s; ++j)
        if (last[j] >= int(s)) used.emplace_back(stages_[j].at, stages_[j].at + stages_[j].out.count() * k_.panel);
      int64_t size = stages_[s].out.count() * k_.panel, at = stages_[s].at = first_gap(used, size);
      values_ = std::max(values_, at + size);
    }
  }

  int64_t first() const { return stages_[0].out.count() * k_.panel; }  // elements of a combined point

  const Kernels<T>& k_;
  PanelSteps<T> steps_;
  std::vector<Stage<T>> stages_;
  int result_ = 0;                 // the stage that is flattened
  int64_t values_ = 0, strip_ = 0; // elements: of the values between stages together; the largest strip
};

// The steps themselves. Each takes its inputs and writes its value, [pixels][channels][panel] of the stage.
template <class T> class PanelSteps {
 public:
  explicit PanelSteps(const Kernels<T>& kernels) : k_(kernels) {}

  // Whether a pooling can take the rows of a value as they are made: a convolution's by Winograd come in pairs.
  bool pools(const Step<T>& pool, const PackedLayer<T>* packed) const {
    const Window& w = pool.window;
    bool whole = (pool.out.height - 1) * w.stride[0] + w.kernel[0] <= pool.in.height;  // the last window, too
    bool pools = (pool.op == Op::max_pool || pool.op == Op::avg_pool) && w.apart() && whole;
    return pools && !(packed && packed->winograd && pool.window.kernel[0] != 2);
  }

  // Elements of the strip that a stage works in.
  int64_t strip(const Stage<T>& s) const {
    if (!s.packed || !s.packed->winograd) return strip_of_rows(s);
    const Squares<T> squares(*s.step, k_.panel);
    return strip_of_rows(s) + rows_of_squares(squares) * squares.row() + squares.values();
  }

  // Terms at some points, into values one after the other, and their pooling, if that is next.
  void combine(const Stage<T>& s, int64_t point, int64_t points, int64_t row, int samples, T* strip, T* out) const {
    const Terms<T>& given = s.step->terms;
    const Image& in = s.made;
    int64_t terms = int64_t(given.values.size()), height = s.pool ? s.pool->window.kernel[0] : 1, size = height * in.width * k_.panel;
    T *mixed = strip, *staged = mixed + size;
    const T one = 1;
    std::vector<const T*> at;
    for (int64_t j = 0; j < terms; ++j) at.push_back(staged + j * size);
    std::vector<Active<T, const T*>> active;
    for (int64_t i = 0; i < points; ++i) active.emplace_back(at, given.coefficients + (point + i) * terms);
    for (int64_t c = 0; c < in.channels; ++c)
      for (int64_t h = 0; h < s.out.height; ++h) {
        int64_t top = s.pool ? h * s.pool->window.stride[0] : h;
        for (int64_t j = 0; j < terms; ++j) {
          Rows<T> rows = given.values[j];
          rows.data += row * rows.stride + c * in.pixels() + top * in.width;
          for (int i = 0; i < samples; ++i)  // what comes next: no hardware follows so many rows
            for (int64_t k = 0; k < height * in.width; k += cache_line / int64_t(sizeof(T)))
              __builtin_prefetch(rows.data + i * rows.stride + height * in.width + k, 0, 2);
          k_.combine_rows(1, &rows, &one, samples, height * in.width, Activation{}, staged + j * size);
        }
        T* y = out;
        for (const auto& a : active) {
          k_.combine(a.count(), a.items.data(), a.coefficients.data(), size, s.step->act, mixed);
          if (s.pool) pool(*s.pool, mixed, top, c, 1, h, h + 1, y);
          for (int64_t w = 0; w < in.width && !s.pool; ++w)
            std::copy_n(mixed + w * k_.panel, k_.panel, y + ((h * in.width + w) * in.channels + c) * k_.panel);
          y += s.out.count() * k_.panel;
        }
      }
  }

  // The convolution. `seen(u0, units, pixels, pitch, values)`: called with a tile's rows before they are pooled, in rising order.
  template <class Seen>
  void convolve(const Stage<T>& s, int64_t point, const T* x, const T* more, const T* packed, T* strip, T* y, Seen&& seen) const {
    if (s.packed->winograd) winograd(s, point, x, more, packed, strip, y, seen);
    else direct(s, x, more, packed, strip, y, seen);
  }

  // Output rows [row, end) of channels [u0, u0 + channels), from pixels of `channels` channels at x, where row `top` begins.
  void pool(const Step<T>& step, const T* x, int64_t top, int64_t u0, int64_t channels, int64_t row, int64_t end, T* y) const {
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

  void flatten(const Image& image, const T* x, T* out) const {
    for (int64_t p = 0; p < image.pixels(); ++p)
      for (int64_t c = 0; c < image.channels; ++c, x += k_.panel) std::copy_n(x, k_.panel, out + (c * image.pixels() + p) * k_.panel);
  }

 private:
  // The elements of the strip that the rows take as they are made.
  int64_t strip_of_rows(const Stage<T>& s) const {
    int64_t rows = (s.pool ? s.pool->window.kernel[0] : 1) * s.made.width * k_.panel;
    return rows * (s.packed ? std::min<int64_t>(k_.units, s.made.channels) : int64_t(s.step->terms.values.size()) + 1);
  }

  // `make(row, end, to, pixel)` writes rows of `channels` channels, in the strip if they are pooled; else it is told where.
  // at_once: output rows of a call, of those that are not pooled.
  template <class Seen, class Make>
  void rows(const Stage<T>& s, int64_t u0, int64_t channels, int64_t begin, int64_t end, int64_t at_once, T* strip, T* y, Seen&& seen,
            Make&& make) const {
    int64_t stride = s.pool ? s.pool->window.stride[0] : 1, pixel = (s.pool ? channels : s.out.channels) * k_.panel;
    if (s.pool) at_once = 1;
    for (int64_t row = begin; row < end; row += at_once) {
      int64_t first = row * stride, height = s.pool ? s.pool->window.kernel[0] : std::min(at_once, end - row);
      T* to = s.pool ? strip : y + (row * s.out.width * s.out.channels + u0) * k_.panel;
      make(first, first + height, to, pixel);
      seen(u0, channels, height * s.made.width, pixel, to);
      if (s.pool) pool(*s.pool, strip, first, u0, channels, row, row + 1, y);
    }
  }

  // So many units of a convolution: their weights, the input at their group's channels, and what is added at theirs.
  struct Tile {
    const T *weights, *bias;
    int units;
    const T *x, *more;
  };

  Tile tile_of(const Stage<T>& s, int64_t i, const T* x, const T* more, const T* packed) const {
    const PackedLayer<T>& at = *s.packed;
    int64_t u0 = at.tiles.begin(i), channels = s.step->in.channels / at.layer->groups;
    int64_t first = at.layer->depthwise() ? u0 : at.tiles.group(i) * channels;
    return {packed + at.weights + u0 * at.depth, at.layer->biased() ? packed + at.bias + u0 : nullptr, at.tiles.size(i),
            x + first * k_.panel, more ? more + u0 * k_.panel : nullptr};
  }

  // Prefetches the weights behind tile i, while that one is called so often.
  Prefetch next_tile(const PackedLayer<T>& at, int64_t i, const T* packed, int64_t calls) const {
    int64_t next = i + 1 < at.tiles.count ? at.tiles.size(i + 1) : 0;
    return Prefetch(packed + at.weights + (at.tiles.begin(i) + at.tiles.size(i)) * at.depth, next * at.depth, calls);
  }

  // In chunks of output rows whose input stays in L2, and for each, tile by tile: a tile's weights pass over all pixels.
  template <class Seen> void direct(const Stage<T>& s, const T* x, const T* more, const T* packed, T* strip, T* y, Seen&& seen) const {
    const PackedLayer<T>& at = *s.packed;
    const Image& in = s.step->in;
    int64_t per_row = s.step->window.stride[0] * (s.pool ? s.pool->window.stride[0] : 1);
    int64_t row_bytes = per_row * in.width * in.channels * k_.panel * int64_t(sizeof(T));
    int64_t chunk = std::max<int64_t>(1, l2_bytes() / 2 / row_bytes);
    for (int64_t begin = 0; begin < s.out.height; begin += chunk)
      for (int64_t i = 0; i < at.tiles.count; ++i) {
        Tile tile = tile_of(s, i, x, more, packed);
        Prefetch prefetch = next_tile(at, i, packed, s.made.pixels());
        rows(s, at.tiles.begin(i), tile.units, begin, std::min(begin + chunk, s.out.height), 1, strip, y, seen,
             [&](int64_t row, int64_t end, T* to, int64_t pixel) {
               if (at.layer->depthwise()) depthwise_rows(s, tile, row, end, to, pixel);
               else direct_rows(s, tile, row, end, to, pixel, prefetch);
             });
      }
  }

  // By Winograd: in chunks of rows of squares whose transformed inputs stay in L2, and for each, tile by tile.
  template <class Seen>
  void winograd(const Stage<T>& s, int64_t point, const T* x, const T* more, const T* packed, T* strip, T* y, Seen&& seen) const {
    const PackedLayer<T>& at = *s.packed;
    const Squares<T> squares(*s.step, k_.panel);
    T *transformed = strip + strip_of_rows(s), *zeros = transformed + rows_of_squares(squares) * squares.row();
    std::fill_n(zeros, squares.values(), T(0));
    int64_t lines = s.pool ? 1 : 2, apart = s.pool ? s.pool->window.stride[0] : 2;  // from a row of squares to the next: out, made
    int64_t chunk = lines * rows_of_squares(squares);
    for (int64_t begin = 0; begin < s.out.height; begin += chunk) {
      int64_t end = std::min(begin + chunk, s.out.height), top = begin / lines * apart, count = (end - begin + lines - 1) / lines;
      for (int64_t i = 0; i < count; ++i) squares.transform(k_, x, top + i * apart, zeros, transformed + i * squares.row());
      bool finite = true;
      for (int64_t i = 0; i < at.tiles.count; ++i) {
        Tile tile = tile_of(s, i, x, more, packed);
        Prefetch prefetch = next_tile(at, i, packed, count * squares.across());
        rows(s, at.tiles.begin(i), tile.units, begin, end, 2, strip, y, seen, [&](int64_t row, int64_t stop, T* to, int64_t pixel) {
          const T* from = transformed + (row - top) / apart * squares.row();
          if (finite) finite = winograd_rows(s, squares, tile, from, row, stop, to, pixel, prefetch);
          if (finite) return;
          // A transform makes NaN of an infinity, and an infinity of large values: again, and all that follows, by `product`.
          Buffer<T> taps(tile.units * at.layer->depth);
          Packing<T>::pack_tile(k_, point, at, i, taps.get());
          Prefetch nothing(taps.get(), 0, 0);
          direct_rows(s, {taps.get(), tile.bias, tile.units, x, tile.more}, row, stop, to, pixel, nothing);
        });
      }
    }
  }

  int64_t rows_of_squares(const Squares<T>& squares) const {
    return std::clamp<int64_t>(l2_bytes() / 2 / (squares.row() * int64_t(sizeof(T))), 1, squares.down());
  }

  // Rows of squares from transformed inputs at `from`; false: some value is not finite.
  bool winograd_rows(const Stage<T>& s, const Squares<T>& squares, const Tile& tile, const T* from, int64_t row, int64_t end, T* to,
                     int64_t pixel, Prefetch& prefetch) const {
    const Activation& act = s.step->act;
    int64_t width = s.made.width, values = s.made.channels * k_.panel;
    bool finite = true;
    for (; row < end; row += 2, to += 2 * width * pixel)
      for (int64_t column = 0; column < width; column += 2, from += squares.size(), prefetch()) {
        int down = int(std::min<int64_t>(2, end - row)), across = int(std::min<int64_t>(2, width - column));
        Pixels<const T> add{tile.more ? tile.more + (row * width + column) * values : nullptr, width * values, values};
        Pixels<T> out{to + column * pixel, width * pixel, pixel};
        finite &= k_.winograd(from, squares.apart(), s.step->in.channels, tile.weights, tile.units, tile.bias, add,
                              fused(act.kind) ? act : Activation{}, down, across, out);
        for (int i = 0; i < down * across && !fused(act.kind); ++i)
          k_.activate(act, tile.units * k_.panel, out.at + i / across * out.row + i % across * out.column);
      }
    return finite;
  }

  void direct_rows(const Stage<T>& s, const Tile& tile, int64_t row, int64_t end, T* to, int64_t pixel, Prefetch& prefetch) const {
    const Window& w = s.step->window;
    const Activation& act = s.step->act;
    const Image& in = s.step->in;
    int64_t channels = in.channels / s.step->layer.groups;
    bool joined = channels == in.channels && w.dilation[1] == 1;  // a row's taps follow each other
    std::vector<Span<T>> spans(joined ? w.kernel[0] : w.taps());
    for (; row < end; ++row)
      for (int64_t column = 0; column < s.made.width; ++column, to += pixel, prefetch()) {
        Inside v(row, in.height, w, 0), h(column, in.width, w, 1);
        int count = 0;
        for (int64_t i = v.begin; i < v.end; ++i)
          for (int64_t j = h.begin; j < h.end; j = joined ? h.end : j + 1)
            spans[count++] = {tile.x + ((v.at + i * w.dilation[0]) * in.width + h.at + j * w.dilation[1]) * in.channels * k_.panel,
                              tile.weights + (i * w.kernel[1] + j) * channels * tile.units, (joined ? h.end - j : 1) * channels};
        const T* add = tile.more ? tile.more + (row * s.made.width + column) * s.made.channels * k_.panel : nullptr;
        k_.product(count, spans.data(), tile.units, tile.bias, add, fused(act.kind) ? act : Activation{}, to);
        if (!fused(act.kind)) k_.activate(act, tile.units * k_.panel, to);
      }
  }

  // Each unit reads its own channel. The weights of taps that lie outside are passed over, row by row of the kernel.
  void depthwise_rows(const Stage<T>& s, const Tile& tile, int64_t row, int64_t end, T* to, int64_t pixel) const {
    const Window& w = s.step->window;
    const Activation& act = s.step->act;
    const Image& in = s.step->in;
    std::vector<const T*> taps(w.taps());
    Buffer<T> inside(w.taps() * tile.units);
    for (; row < end; ++row) {
      Inside v(row, in.height, w, 0);
      for (int64_t column = 0; column < s.made.width; ++column, to += pixel) {
        Inside h(column, in.width, w, 1);
        bool whole = (v.end - v.begin) * (h.end - h.begin) == w.taps();
        int count = 0;
        for (int64_t i = v.begin; i < v.end; ++i)
          for (int64_t j = h.begin; j < h.end; ++j) {
            int64_t at = ((v.at + i * w.dilation[0]) * in.width + h.at + j * w.dilation[1]) * in.channels * k_.panel;
            if (!whole) std::copy_n(tile.weights + (i * w.kernel[1] + j) * tile.units, tile.units, inside.get() + count * tile.units);
            taps[count++] = tile.x + at;
          }
        const T* add = tile.more ? tile.more + (row * s.made.width + column) * s.made.channels * k_.panel : nullptr;
        k_.depthwise(count, taps.data(), whole ? tile.weights : inside.get(), tile.units, tile.bias, add,
                     fused(act.kind) ? act : Activation{}, to);
        if (!fused(act.kind)) k_.activate(act, tile.units * k_.panel, to);
      }
    }
  }

  // The taps [begin, end) of a window that lie inside an image; tap 0 is at `at`.
  struct Inside {
    int64_t at, begin, end;
    Inside(int64_t out, int64_t size, const Window& w, int d)
        : at(out * w.stride[d] - w.padding[d]), begin(at < 0 ? up(-at, w.dilation[d]) : 0),
          end(std::min(w.kernel[d], at < size ? up(size - at, w.dilation[d]) : 0)) {}
    static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
  };

  const Kernels<T>& k_;
};

}  // namespace modeconn
