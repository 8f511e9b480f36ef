// The layout of one point's packed weights, and their packing: per layer its tiles one after the other, each
// [depth][units of the tile], then the bias. The depth of a convolution is [taps][channels], or [16][channels] by Winograd.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "winograd.h"

namespace modeconn {

// Uninitialised memory on a cache line's boundary, in large pages if it is large: packed weights are read once per block
// and would miss the address cache on every page.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), align(count))), Free{align(count)}) {
#if defined(__linux__)
    if (align(count) == std::align_val_t(large_page)) madvise(data_.get(), size_t(count) * sizeof(T), MADV_HUGEPAGE);
#endif
  }
  T* get() const { return data_.get(); }

 private:
  static constexpr size_t large_page = 2 << 20;
  static std::align_val_t align(int64_t count) {
    return std::align_val_t(size_t(count) * sizeof(T) >= large_page ? large_page : size_t(cache_line));
  }
  struct Free {
    std::align_val_t align;
    void operator()(T* p) const { ::operator delete(p, align); }
  };
  std::unique_ptr<T, Free> data_;
};

// Brings the next weights from the last cache level into L2, a few lines per product: without it the first product with
// them waits.
class Prefetch {
 public:
  template <class T> Prefetch(const T* begin, int64_t count, int64_t calls)
      : at_(reinterpret_cast<const char*>(begin)), end_(reinterpret_cast<const char*>(begin + count)),
        step_((end_ - at_) / std::max<int64_t>(1, calls) + cache_line) {}
  void operator()() {
    for (const char* stop = std::min(end_, at_ + step_); at_ < stop; at_ += cache_line) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t step_;
};

// Splits each of `groups` equal parts of `units` into the fewest tiles of at most `most`, of sizes that differ by at most one.
struct Tiles {
  int64_t units, each, count;  // units and tiles of a group; tiles of all
  Tiles(int64_t units, int64_t most, int64_t groups = 1)
      : units(units / groups), each((this->units + most - 1) / most), count(each * groups) {}
  int64_t group(int64_t i) const { return i / each; }
  int64_t begin(int64_t i) const { return group(i) * units + i % each * (units / each) + std::min(i % each, units % each); }
  int size(int64_t i) const { return int(units / each + (i % each < units % each)); }
};

// The terms whose coefficient is not zero, with their coefficients in the element type.
template <class T, class Item> struct Active {
  std::vector<Item> items;
  std::vector<T> coefficients;
  Active(const std::vector<Item>& all, const double* c) {
    for (size_t j = 0; j < all.size(); ++j)
      if (c[j] != 0) items.push_back(all[j]), coefficients.push_back(T(c[j]));
  }
  int count() const { return int(items.size()); }
};

template <class T> struct PackedLayer {
  const Layer<T>* layer;
  Tiles tiles;
  int64_t weights, bias;  // offsets in the point's buffer
  int64_t depth;          // packed weights of a unit
  bool winograd;          // they are transformed, 16 in place of 9 taps
};

template <class T> struct Packing {
  std::vector<PackedLayer<T>> convs, linears;  // in the order of the steps
  struct Piece { PackedLayer<T> at; int64_t begin, end; };  // of tiles: the unit of work
  std::vector<Piece> pieces;
  int64_t size = 0;  // elements per point

  Packing(const StepGraph<T>& chain, const Kernels<T>& kernels) {
    auto reserve = [&](int64_t n) {
      int64_t at = size;
      size += (n + cache_line - 1) / cache_line * cache_line;
      return at;
    };
    auto place = [&](const Step<T>& s) {
      const Layer<T>& layer = s.layer;
      bool winograd = chain.winograd && winograd_pays(s);
      int64_t depth = winograd ? layer.depth / layer.taps * winograd_products : layer.depth;
      Tiles tiles(layer.units, kernels.units, layer.depthwise() ? 1 : layer.groups);
      int64_t step = std::max<int64_t>(1, (1 << 15) / (layer.depth * kernels.units + 1));
      int64_t weights = reserve(layer.units * depth), bias = reserve(layer.units);
      PackedLayer<T> at{&layer, tiles, weights, bias, depth, winograd};
      for (int64_t i = 0; i < tiles.count; i += step) pieces.push_back({at, i, std::min(i + step, tiles.count)});
      return at;
    };
    for (const Step<T>& step : chain.images)
      if (step.op == Op::conv) convs.push_back(place(step));
    for (const Step<T>& step : chain.layers)
      if (step.op == Op::linear) linears.push_back(place(step));
  }

  void pack(const Kernels<T>& kernels, int64_t point, const Piece& piece, T* out) const {
    const PackedLayer<T>& at = piece.at;
    const Layer<T>& layer = *at.layer;
    Active<T, const T*> biases(layer.biases, layer.bias_coefficients + point * int64_t(layer.biases.size()));
    Buffer<T> taps(at.winograd ? layer.depth * kernels.units : 0);
    for (int64_t i = piece.begin; i < piece.end; ++i) {
      int64_t u0 = at.tiles.begin(i);
      int units = at.tiles.size(i);
      T* tile = out + at.weights + u0 * at.depth;
      pack_tile(kernels, point, at, i, at.winograd ? taps.get() : tile);
      if (at.winograd) {
        // Beside a large weight the rounding of a square's sums is more than its neighbours are: NaN has it done by `product`.
        T* w = taps.get();
        if (std::any_of(w, w + layer.depth * units, [](T v) { return !(std::abs(v) < T(1e6)); })) w[0] = std::numeric_limits<T>::quiet_NaN();
        kernels.winograd_weights(w, layer.depth / layer.taps * units, tile);
      }
      const double* scale = layer.scale ? layer.scale + point * layer.units + u0 : nullptr;
      for (int u = 0; u < units && layer.biased(); ++u) {
        T sum = biases.count() ? biases.coefficients[0] * biases.items[0][u0 + u] : T(0);
        for (int g = 1; g < biases.count(); ++g) sum += biases.coefficients[g] * biases.items[g][u0 + u];
        out[at.bias + u0 + u] = scale ? T(scale[u] * sum + layer.shift[point * layer.units + u0 + u]) : sum;
      }
    }
  }

  // The weights of tile i as `product` takes them, with the norm's scale.
  static void pack_tile(const Kernels<T>& kernels, int64_t point, const PackedLayer<T>& at, int64_t i, T* tile) {
    const Layer<T>& layer = *at.layer;
    Buffer<T> rows_of_taps(layer.taps > 1 ? layer.depth * kernels.units : 0);
    Active<T, Rows<T>> weights(layer.weights, layer.coefficients + point * int64_t(layer.weights.size()));
    int64_t u0 = at.tiles.begin(i), channels = layer.depth / layer.taps;
    int units = at.tiles.size(i);
    for (Rows<T>& r : weights.items) r.data += u0 * r.stride;
    T* packed = layer.taps > 1 ? rows_of_taps.get() : tile;
    kernels.pack(weights.count(), weights.items.data(), weights.coefficients.data(), units, layer.depth, packed);
    for (int64_t tap = 0; tap < layer.taps && layer.taps > 1; ++tap)
      for (int64_t c = 0; c < channels; ++c)
        std::copy_n(packed + (c * layer.taps + tap) * units, units, tile + (tap * channels + c) * units);
    const double* scale = layer.scale ? layer.scale + point * layer.units + u0 : nullptr;
    for (int64_t k = 0; k < layer.depth && scale; ++k)
      for (int u = 0; u < units; ++u) tile[k * units + u] = T(tile[k * units + u] * scale[u]);
  }
};

}  // namespace modeconn
