#include "chain.h"

#include <memory>

#include "images.h"
#include "packed.h"

namespace modeconn {
namespace {

constexpr int64_t shared_panels = 16;            // of a block share one pass over weights that do not fit L2
constexpr int64_t wanted_tasks = 64;             // enough for any team to share evenly
constexpr int64_t packed_bytes = 12 << 20;       // packed weights in flight: they should stay in the last cache level
constexpr int64_t image_bytes = 8 << 20;         // of a block's terms, if they are images
constexpr int64_t staged_bytes = 24 * 1024;      // a block's terms without layers: in L1 while all points go over them

// Blocks of panels. Their size depends on the problem alone, never on the threads: the sums' order is fixed.
struct Blocks {
  int64_t panels, size, count;
  Blocks(int64_t panels, int64_t fewest, int64_t most, int64_t points)
      : panels(panels), size(std::min(panels, std::max(fewest, std::min(most, panels * points / wanted_tasks)))),
        count((panels + size - 1) / size) {}
  int64_t begin(int64_t b) const { return b * size; }
  int64_t end(int64_t b) const { return std::min(panels, (b + 1) * size); }
};

template <class T> class Engine {
 public:
  Engine(const Chain<T>& chain, const Kernels<T>& kernels, Team& team, LossSums* sums)
      : chain_(chain), k_(kernels), team_(team), sums_(sums), packing_(chain, kernels),
        images_(chain, kernels, packing_) {}

  void run() {
    if (chain_.points == 0) return;
    for (int64_t t = 0; sums_ && t < chain_.points; ++t) sums_[t] = {};
    if (chain_.rows == 0) return;
    if (chain_.layers.empty() && chain_.steps.empty()) run_combined();
    else run_layers();
  }

 private:
  int64_t panels() const { return (chain_.rows + k_.panel - 1) / k_.panel; }
  int samples(int64_t panel) const { return int(std::min<int64_t>(k_.panel, chain_.rows - panel * k_.panel)); }

  // Points go in groups whose packed weights fit the last cache level; tasks are (block, point of the group), blocks
  // outermost, so that a block's terms are read from memory once per group.
  void run_layers() {
    int64_t widest = chain_.flat(), streamed = 0;
    bool split = false;
    for (const Layer<T>& l : chain_.layers)
      widest = std::max(widest, l.units), split |= !in_place(l), streamed += l.units * l.depth * int64_t(sizeof(T));
    panel_size_ = widest * k_.panel;
    int64_t most = std::max(shared_panels, l2_bytes() * 3 / 8 / (panel_size_ * int64_t(sizeof(T))));
    int64_t fewest = std::clamp<int64_t>(streamed / l2_bytes(), 1, shared_panels);
    if (!chain_.steps.empty())  // images are large: a block's should stay in the last cache level while the points pass
      most = std::clamp<int64_t>(image_bytes / (int64_t(chain_.terms.size()) * chain_.width * k_.panel * int64_t(sizeof(T))), 1, most);
    Blocks blocks(panels(), fewest, most, chain_.points);
    int64_t group = std::max<int64_t>(1, packed_bytes / (packing_.size * int64_t(sizeof(T)) + 1));
    group = std::min(std::max<int64_t>(group, blocks.count < 8 ? team_.threads() : 1), chain_.points);

    // So many points of a block are one task: images are combined for all of them at once.
    int64_t share = std::clamp<int64_t>(group * blocks.count / (4 * team_.threads()), 1, images_.share());

    Buffer<T> packed(packing_.size * group);
    std::vector<Buffer<T>> values;  // per thread: the panels of a block for each point, and where the next layer's go
    int64_t spare = split ? blocks.size : 1;
    std::vector<Buffer<T>> pixels;  // per thread: where one panel of images goes through the steps
    for (int i = 0; i < team_.threads(); ++i) {
      values.emplace_back((share * blocks.size + spare) * panel_size_);
      pixels.emplace_back(images_.scratch(share));
    }
    std::vector<LossSums> partial(group * blocks.count);

    for (int64_t t0 = 0; t0 < chain_.points; t0 += group) {
      int64_t n = std::min(group, chain_.points - t0), pieces = int64_t(packing_.pieces.size());
      team_.each(n * pieces, [&](int64_t i, int) {
        packing_.pack(k_, t0 + i / pieces, packing_.pieces[i % pieces], packed.get() + i / pieces * packing_.size);
      });
      int64_t shares = (n + share - 1) / share;
      team_.each(shares * blocks.count, [&](int64_t task, int thread) {
        int64_t b = task / shares, t = task % shares * share, begin = blocks.begin(b);
        T* at = values[thread].get();
        auto take = [&](int64_t count) {
          Panels panels;
          for (int64_t p = 0; p < count; ++p, at += panel_size_) panels.push_back(at);
          return panels;
        };
        Panels y = take(spare);
        std::vector<Panels> x;
        for (int64_t i = t; i < std::min(n, t + share); ++i) x.push_back(take(blocks.end(b) - begin));
        if (chain_.steps.empty()) combine(t0 + t, begin, x[0]);
        else if (!images(t0 + t, begin, packed.get() + t * packing_.size, x, pixels[thread].get(), thread)) return;
        for (size_t i = 0; i < x.size(); ++i, ++t)
          partial[t * blocks.count + b] = block(t0 + t, begin, packed.get() + t * packing_.size, x[i], y, thread);
      });
      add(partial, t0, n, blocks.count);
    }
  }

  using Panels = std::vector<T*>;

  void combine(int64_t point, int64_t begin, Panels& x) const {
    Active<T, Rows<T>> terms(chain_.terms, chain_.coefficients + point * int64_t(chain_.terms.size()));
    for (Rows<T>& r : terms.items) r.data += begin * k_.panel * r.stride;
    for (size_t p = 0; p < x.size(); ++p) {
      k_.combine_rows(terms.count(), terms.items.data(), terms.coefficients.data(), samples(begin + p), chain_.width, chain_.act, x[p]);
      for (Rows<T>& r : terms.items) r.data += k_.panel * r.stride;
    }
  }

  // The steps on images for the points point .. point + x.size(); false: stopped.
  bool images(int64_t point, int64_t begin, const T* packed, std::vector<Panels>& x, T* scratch, int thread) {
    for (size_t p = 0; p < x[0].size(); ++p) {
      images_.combine(point, int64_t(x.size()), (begin + p) * k_.panel, samples(begin + p), scratch);
      for (size_t i = 0; i < x.size(); ++i)
        if (!images_.run(int64_t(i), packed + i * packing_.size, scratch, x[i][p], [&] { return team_.stopping(thread); })) return false;
    }
    return true;
  }

  LossSums block(int64_t point, int64_t begin, const T* packed, Panels& x, Panels& y, int thread) {
    for (size_t l = 0; l < chain_.layers.size(); ++l) {
      if (team_.stopping(thread)) return {};
      size_t next = (l + 1) % chain_.layers.size();
      const PackedLayer<T>& at = packing_.layers[next];
      int64_t ahead = std::min(chain_.layers[next].units * chain_.layers[next].depth, l2_bytes() / 4 / int64_t(sizeof(T)));
      Prefetch prefetch(packed + at.weights, ahead, int64_t(x.size()) * packing_.layers[l].tiles.count);
      layer(chain_.layers[l], packing_.layers[l], packed, x, y, prefetch);
    }
    LossSums sums;
    for (size_t p = 0; p < x.size(); ++p) head(point, begin + p, x[p], sums);
    return sums;
  }

  // Panel by panel: all weights stay in L2 and a panel's depth in L1.
  bool in_place(const Layer<T>& l) const {
    return l.depth <= k_.depth && l.units * l.depth * int64_t(sizeof(T)) <= l2_bytes() / 2;
  }

  // The layer's outputs take the place of its inputs in x. A layer that fits the caches goes panel by panel: each
  // panel's output is written over the previous panel's input. A larger one goes in parts of k, whose slice of a panel
  // stays in L1, and for each in chunks of tiles, whose weights stay in L2 while all panels pass.
  void layer(const Layer<T>& layer, const PackedLayer<T>& at, const T* packed, Panels& x, Panels& y, Prefetch& prefetch) {
    if (in_place(layer)) {
      for (T*& panel : x) {
        product(layer, at, packed, 0, layer.depth, 0, at.tiles.count, panel, y[0], prefetch);
        std::swap(panel, y[0]);
      }
      return;
    }
    Tiles parts(layer.depth, k_.depth);
    int64_t chunk = std::max<int64_t>(1, l2_bytes() / 4 / (k_.depth * k_.units * int64_t(sizeof(T))));
    for (int64_t part = 0; part < parts.count; ++part)
      for (int64_t i = 0; i < at.tiles.count; i += chunk)
        for (size_t p = 0; p < x.size(); ++p)
          product(layer, at, packed, parts.begin(part), parts.size(part), i, std::min(i + chunk, at.tiles.count), x[p], y[p], prefetch);
    std::swap_ranges(x.begin(), x.end(), y.begin());
  }

  // Tiles [first, end) over k0 .. k0 + depth; bias and activation come with the last part of k.
  void product(const Layer<T>& layer, const PackedLayer<T>& at, const T* packed, int64_t k0, int64_t depth, int64_t first,
               int64_t end, const T* x, T* y, Prefetch& prefetch) const {
    bool last = k0 + depth == layer.depth, in_registers = fused(layer.act.kind);
    Activation act = last && in_registers ? layer.act : Activation{};
    int64_t u0 = at.tiles.begin(first), begin = u0;
    for (int64_t i = first; i < end; ++i, prefetch()) {
      int units = at.tiles.size(i);
      Span<T> span{x + k0 * k_.panel, packed + at.weights + u0 * layer.depth + k0 * units, depth};
      k_.product(1, &span, units, last && layer.biased() ? packed + at.bias + u0 : nullptr, k0 > 0, act, y + u0 * k_.panel);
      u0 += units;
    }
    if (last && !in_registers) k_.activate(layer.act, (u0 - begin) * k_.panel, y + begin * k_.panel);
  }

  void head(int64_t point, int64_t panel, const T* x, LossSums& sums) const {
    const Head<T>& h = chain_.head;
    int64_t width = chain_.result(), row = panel * k_.panel;
    LossSums s;
    if (h.loss == Loss::none)
      k_.write_rows(x, samples(panel), width, h.outputs + point * h.point_stride + row * h.row_stride, h.row_stride);
    else if (h.loss == Loss::cross_entropy)
      s = k_.cross_entropy(x, samples(panel), width, h.labels + row, h.top5);
    else
      s = k_.mse(x, samples(panel), width, h.targets.data + row * h.targets.stride, h.targets.stride);
    sums.loss += s.loss, sums.errors += s.errors, sums.errors5 += s.errors5;
  }

  // No layers: a block's terms are brought into panels once, and stay in L1 while all points of a group combine them.
  void run_combined() {
    int64_t terms = int64_t(chain_.terms.size()), panel_size = chain_.width * k_.panel;
    Blocks blocks(panels(), 1, std::max<int64_t>(1, staged_bytes / (terms * panel_size * int64_t(sizeof(T)))), chain_.points);
    int64_t group = std::min<int64_t>(chain_.points, 128);
    std::vector<Buffer<T>> values;  // per thread: the terms of a block and one combined panel
    for (int i = 0; i < team_.threads(); ++i) values.emplace_back((terms * blocks.size + 1) * panel_size);
    std::vector<LossSums> partial(group * blocks.count);
    const T one = 1;

    for (int64_t t0 = 0; t0 < chain_.points; t0 += group) {
      int64_t n = std::min(group, chain_.points - t0);
      team_.each(blocks.count, [&](int64_t b, int thread) {
        T* staged = values[thread].get();
        T* x = staged + terms * blocks.size * panel_size;
        int64_t begin = blocks.begin(b), end = blocks.end(b);
        std::vector<const T*> at(terms);
        for (int64_t j = 0; j < terms; ++j) {
          at[j] = staged + j * blocks.size * panel_size;
          for (int64_t p = begin; p < end; ++p) {
            Rows<T> rows{chain_.terms[j].data + p * k_.panel * chain_.terms[j].stride, chain_.terms[j].stride};
            k_.combine_rows(1, &rows, &one, samples(p), chain_.width, Activation{}, staged + (j * blocks.size + p - begin) * panel_size);
          }
        }
        for (int64_t t = 0; t < n && !team_.stopping(thread); ++t) {
          Active<T, const T*> active(at, chain_.coefficients + (t0 + t) * terms);
          LossSums sums;
          for (int64_t p = begin; p < end; ++p) {
            k_.combine(active.count(), active.items.data(), active.coefficients.data(), panel_size, chain_.act, x);
            head(t0 + t, p, x, sums);
            for (const T*& v : active.items) v += panel_size;
          }
          partial[t * blocks.count + b] = sums;
        }
      });
      add(partial, t0, n, blocks.count);
    }
  }

  void add(const std::vector<LossSums>& partial, int64_t t0, int64_t n, int64_t blocks) {
    for (int64_t i = 0; sums_ && i < n * blocks; ++i) {
      LossSums& s = sums_[t0 + i / blocks];
      s.loss += partial[i].loss, s.errors += partial[i].errors, s.errors5 += partial[i].errors5;
    }
  }

  const Chain<T>& chain_;
  const Kernels<T>& k_;
  Team& team_;
  LossSums* sums_;
  Packing<T> packing_;
  Images<T> images_;
  int64_t panel_size_ = 0;
};

}  // namespace

template <class T> void run(const Chain<T>& chain, const Kernels<T>& kernels, Team& team, LossSums* sums) {
  Engine<T>(chain, kernels, team, sums).run();
}

template void run(const Chain<float>&, const Kernels<float>&, Team&, LossSums*);
template void run(const Chain<double>&, const Kernels<double>&, Team&, LossSums*);

}  // namespace modeconn
