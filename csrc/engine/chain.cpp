#include "chain.h"

#include "images.h"
#include "layers.h"

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
  Engine(const StepGraph<T>& chain, const Kernels<T>& kernels, Team& team, LossSums* sums)
      : chain_(chain), k_(kernels), team_(team), sums_(sums), packing_(chain, kernels), images_(chain, kernels, packing_),
        layers_(chain, kernels, packing_) {}

  void run() {
    if (chain_.points == 0) return;
    for (int64_t t = 0; sums_ && t < chain_.points; ++t) sums_[t] = {};
    if (chain_.rows == 0) return;
    if (chain_.images.empty() && chain_.layers.size() == 1) run_combined();
    else run_layers();
  }

 private:
  using Panels = typename Layers<T>::Panels;

  int64_t panels() const { return (chain_.rows + k_.panel - 1) / k_.panel; }
  int samples(int64_t panel) const { return int(std::min<int64_t>(k_.panel, chain_.rows - panel * k_.panel)); }

  // Points go in groups whose packed weights fit the last cache level; tasks are (block, point of the group), blocks
  // outermost, so that a block's terms are read from memory once per group.
  void run_layers() {
    int64_t panel_bytes = layers_.panel_size() * int64_t(sizeof(T)), values = layers_.panels(shared_panels) / shared_panels;
    int64_t most = std::max(shared_panels, l2_bytes() * 3 / 8 / (panel_bytes * std::max<int64_t>(1, values)));
    int64_t fewest = std::clamp<int64_t>(layers_.streamed() / l2_bytes(), 1, shared_panels);
    if (!chain_.images.empty()) {  // images are large: a block's should stay in the last cache level while the points pass
      const Step<T>& first = chain_.images[0];
      int64_t bytes = int64_t(first.terms.values.size()) * first.out.count() * k_.panel * int64_t(sizeof(T));
      most = std::clamp<int64_t>(image_bytes / bytes, 1, most);
    }
    Blocks blocks(panels(), fewest, most, chain_.points);
    int64_t group = std::max<int64_t>(1, packed_bytes / (packing_.size * int64_t(sizeof(T)) + 1));
    group = std::min(std::max<int64_t>(group, blocks.count < 8 ? team_.threads() : 1), chain_.points);

    // So many points of a block are one task: images are combined for all of them at once.
    int64_t share = std::clamp<int64_t>(group * blocks.count / (4 * team_.threads()), 1, images_.share());

    Buffer<T> packed(packing_.size * group);
    std::vector<Buffer<T>> values_of;  // per thread: the flattened images of a block for each point, and the other panels
    std::vector<Buffer<T>> pixels;     // per thread: where one panel of images goes through the steps
    int64_t flat = chain_.images.empty() ? 0 : blocks.size, others = layers_.panels(blocks.size) - flat;
    for (int i = 0; i < team_.threads(); ++i) {
      values_of.emplace_back((share * flat + others) * layers_.panel_size());
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
        int64_t b = task / shares, t = task % shares * share, begin = blocks.begin(b), size = blocks.end(b) - begin;
        T* at = values_of[thread].get();
        auto take = [&](int64_t count) {
          Panels panels;
          for (int64_t p = 0; p < count; ++p, at += layers_.panel_size()) panels.push_back(at);
          return panels;
        };
        Panels free = take(others);
        std::vector<Panels> x;
        for (int64_t i = t; i < std::min(n, t + share); ++i) x.push_back(flat ? take(size) : Panels(size));
        auto stop = [&] { return team_.stopping(thread); };
        if (flat && !images(t0 + t, begin, packed.get() + t * packing_.size, x, pixels[thread].get(), stop)) return;
        for (size_t i = 0; i < x.size(); ++i, ++t) {
          Panels rest = free;
          if (!layers_.run(t0 + t, begin, packed.get() + t * packing_.size, x[i], rest, stop)) return;
          LossSums& sums = partial[t * blocks.count + b] = {};
          for (int64_t p = 0; p < size; ++p) head(t0 + t, begin + p, x[i][p], sums);
        }
      });
      add(partial, t0, n, blocks.count);
    }
  }

  // The steps on images for the points point .. point + x.size(); false: stopped.
  template <class Stop>
  bool images(int64_t point, int64_t begin, const T* packed, std::vector<Panels>& x, T* scratch, Stop&& stop) {
    for (size_t p = 0; p < x[0].size(); ++p) {
      int64_t panel = begin + int64_t(p), row = panel * k_.panel;
      images_.combine(point, int64_t(x.size()), row, samples(panel), scratch);
      for (size_t i = 0; i < x.size(); ++i)
        if (!images_.run(int64_t(i), point, row, samples(panel), packed + i * packing_.size, scratch, x[i][p], stop)) return false;
    }
    return true;
  }

  void head(int64_t point, int64_t panel, const T* x, LossSums& sums) const {
    const Head<T>& h = chain_.head;
    int64_t width = chain_.result(), row = panel * k_.panel;
    const T* targets = h.targets.data ? h.targets.data + row * h.targets.stride : nullptr;
    LossSums s;
    switch (h.loss) {
      case Loss::none:
        k_.write_rows(x, samples(panel), width, h.outputs + point * h.point_stride + row * h.row_stride, h.row_stride);
        break;
      case Loss::cross_entropy: s = k_.cross_entropy(x, samples(panel), width, h.labels + row, h.top5); break;
      case Loss::mse: s = k_.mse(x, samples(panel), width, targets, h.targets.stride); break;
      case Loss::bce: s = k_.bce(x, samples(panel), width, targets, h.targets.stride); break;
    }
    sums.loss += s.loss, sums.errors += s.errors, sums.errors5 += s.errors5;
  }

  // No layers: a block's terms are brought into panels once, and stay in L1 while all points of a group combine them.
  void run_combined() {
    const Step<T>& step = chain_.layers[0];
    const Terms<T>& given = step.terms;
    int64_t width = step.out.count(), terms = int64_t(given.values.size()), panel_size = width * k_.panel;
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
            Rows<T> rows{given.values[j].data + p * k_.panel * given.values[j].stride, given.values[j].stride};
            k_.combine_rows(1, &rows, &one, samples(p), width, Activation{}, staged + (j * blocks.size + p - begin) * panel_size);
          }
        }
        for (int64_t t = 0; t < n && !team_.stopping(thread); ++t) {
          Active<T, const T*> active(at, given.coefficients + (t0 + t) * terms);
          LossSums sums;
          for (int64_t p = begin; p < end; ++p) {
            k_.combine(active.count(), active.items.data(), active.coefficients.data(), panel_size, step.act, x);
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

  const StepGraph<T>& chain_;
  const Kernels<T>& k_;
  Team& team_;
  LossSums* sums_;
  Packing<T> packing_;
  Images<T> images_;
  Layers<T> layers_;
};

}  // namespace

template <class T> void run(const StepGraph<T>& chain, const Kernels<T>& kernels, Team& team, LossSums* sums) {
  Engine<T>(chain, kernels, team, sums).run();
}

template void run(const StepGraph<float>&, const Kernels<float>&, Team&, LossSums*);
template void run(const StepGraph<double>&, const Kernels<double>&, Team&, LossSums*);

}  // namespace modeconn
