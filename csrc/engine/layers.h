// The steps on rows, for a block of panels at one point. All panels have one size; a value's are given back as soon as the
// last step that reads it has, so that a layer's outputs are written over inputs that are still in the cache.
#pragma once
#include "packed.h"
#include "pointwise.h"

namespace modeconn {

template <class T> class Layers {
 public:
  using Panels = std::vector<T*>;

  Layers(const StepGraph<T>& chain, const Kernels<T>& kernels, const Packing<T>& packing)
      : steps_(chain.layers), rows_(chain.rows), k_(kernels), linears_(packing.linears),
        last_(last_uses(steps_, int(steps_.size()) - 1)) {
    for (const Step<T>& s : steps_) widest_ = std::max(widest_, s.out.count());
    for (const PackedLayer<T>& at : linears_) streamed_ += at.layer->units * at.layer->depth * int64_t(sizeof(T));
  }

  int64_t panel_size() const { return widest_ * k_.panel; }  // elements
  int64_t streamed() const { return streamed_; }             // bytes of weights that pass for a block

  // The most panels in use at any time, for a block of so many.
  int64_t panels(int64_t block) const {
    int64_t most = 0;
    for (size_t s = 0; s < steps_.size(); ++s) most = std::max(most, live(s) * block + (rotates(s) ? 1 : block));
    return most;
  }

  // `x`: the flattened images, if the steps begin with them; after it, what the head gets. `free`: the other panels of
  // `panels(x.size())`. False: stopped.
  template <class Stop> bool run(int64_t point, int64_t begin, const T* packed, Panels& x, Panels& free, Stop&& stop) const {
    int64_t n = int64_t(x.size());
    std::vector<Panels> values(steps_.size(), Panels(n));
    auto linear = linears_.begin();
    auto take = [&] {
      T* panel = free.back();
      free.pop_back();
      return panel;
    };
    auto release = [&](size_t s, int64_t p) {
      const std::vector<int>& inputs = steps_[s].inputs;
      for (auto i = inputs.begin(); i != inputs.end(); ++i)  // once, however often the step reads it
        if (last_[*i] == int(s) && std::find(inputs.begin(), i, *i) == i) free.push_back(values[*i][p]);
      if (last_[s] < 0) free.push_back(values[s][p]);
    };
    for (size_t s = 0; s < steps_.size(); ++s) {
      if (stop()) return false;
      const Step<T>& step = steps_[s];
      Panels& y = values[s];
      if (step.op == Op::flat || step.op == Op::terms) {
        if (step.op == Op::flat) y = x;
        else for (T*& panel : y) panel = take();
        if (step.op == Op::terms) combine(step, point, begin, y);
        for (int64_t p = 0; p < n; ++p) release(s, p);  // values that no step reads
      } else if (pointwise(step.op)) {
        for (int64_t p = 0; p < n; release(s, p++)) {
          y[p] = take();
          std::vector<const T*> inputs;
          for (int i : step.inputs) inputs.push_back(values[i][p]);
          run_pointwise(k_, step, point, inputs, y[p]);
        }
      } else {
        const PackedLayer<T>& at = *linear++;
        const Panels* more = step.inputs.size() > 1 ? &values[step.inputs[1]] : nullptr;
        Prefetch prefetch = next(linear, packed, n * at.tiles.count);
        if (in_place(*at.layer)) {
          for (int64_t p = 0; p < n; release(s, p++)) {
            y[p] = take();
            product(step, at, packed, 0, step.layer.depth, 0, at.tiles.count, values[step.inputs[0]][p], more ? (*more)[p] : nullptr, y[p], prefetch);
          }
        } else {
          for (T*& panel : y) panel = take();
          in_parts(step, at, packed, values[step.inputs[0]], more, y, prefetch);
          for (int64_t p = 0; p < n; ++p) release(s, p);
        }
      }
    }
    x = values.back();
    return true;
  }

 private:
  // Values that are still read at step s or later.
  int64_t live(size_t s) const { return std::count_if(last_.begin(), last_.begin() + s, [&](int last) { return last >= int(s); }); }

  // Whether each panel that is made sets one free.
  bool rotates(size_t s) const {
    const Step<T>& step = steps_[s];
    if (!pointwise(step.op) && !(step.op == Op::linear && in_place(step.layer))) return false;
    return std::any_of(step.inputs.begin(), step.inputs.end(), [&](int i) { return last_[i] == int(s); });
  }

  // Panel by panel: all weights stay in L2 and a panel's depth in L1.
  bool in_place(const Layer<T>& l) const {
    return l.depth <= k_.depth && l.units * l.depth * int64_t(sizeof(T)) <= l2_bytes() / 2;
  }

  // The weights that come next: the next layer's, or the first's, for the next block.
  Prefetch next(typename std::vector<PackedLayer<T>>::const_iterator linear, const T* packed, int64_t calls) const {
    const PackedLayer<T>& at = linear == linears_.end() ? linears_.front() : *linear;
    int64_t ahead = std::min(at.layer->units * at.layer->depth, l2_bytes() / 4 / int64_t(sizeof(T)));
    return Prefetch(packed + at.weights, ahead, calls);
  }

  void combine(const Step<T>& step, int64_t point, int64_t begin, const Panels& y) const {
    Active<T, Rows<T>> terms(step.terms.values, step.terms.coefficients + point * int64_t(step.terms.values.size()));
    for (Rows<T>& r : terms.items) r.data += begin * k_.panel * r.stride;
    for (size_t p = 0; p < y.size(); ++p) {
      int samples = int(std::min<int64_t>(k_.panel, rows_ - (begin + int64_t(p)) * k_.panel));
      k_.combine_rows(terms.count(), terms.items.data(), terms.coefficients.data(), samples, step.out.count(), step.act, y[p]);
      for (Rows<T>& r : terms.items) r.data += k_.panel * r.stride;
    }
  }

  // In parts of k, whose slice of a panel stays in L1, and for each in chunks of tiles, whose weights stay in L2 while all
  // panels pass.
  void in_parts(const Step<T>& step, const PackedLayer<T>& at, const T* packed, const Panels& x, const Panels* more, const Panels& y,
                Prefetch& prefetch) const {
    Tiles parts(step.layer.depth, k_.depth);
    int64_t chunk = std::max<int64_t>(1, l2_bytes() / 4 / (k_.depth * k_.units * int64_t(sizeof(T))));
    for (int64_t part = 0; part < parts.count; ++part)
      for (int64_t i = 0; i < at.tiles.count; i += chunk)
        for (size_t p = 0; p < x.size(); ++p)
          product(step, at, packed, parts.begin(part), parts.size(part), i, std::min(i + chunk, at.tiles.count), x[p],
                  more ? (*more)[p] : nullptr, y[p], prefetch);
  }

  // Tiles [first, end) over k0 .. k0 + depth; `more` comes with the first part of k, bias and activation with the last.
  void product(const Step<T>& step, const PackedLayer<T>& at, const T* packed, int64_t k0, int64_t depth, int64_t first, int64_t end,
               const T* x, const T* more, T* y, Prefetch& prefetch) const {
    const Layer<T>& layer = step.layer;
    bool last = k0 + depth == layer.depth, in_registers = fused(step.act.kind);
    Activation act = last && in_registers ? step.act : Activation{};
    int64_t u0 = at.tiles.begin(first), begin = u0;
    for (int64_t i = first; i < end; ++i, prefetch()) {
      int units = at.tiles.size(i);
      Span<T> span{x + k0 * k_.panel, packed + at.weights + u0 * layer.depth + k0 * units, depth};
      T* out = y + u0 * k_.panel;
      const T* add = k0 > 0 ? out : more ? more + u0 * k_.panel : nullptr;
      k_.product(1, &span, units, last && layer.biased() ? packed + at.bias + u0 : nullptr, add, act, out);
      u0 += units;
    }
    if (last && !in_registers) k_.activate(step.act, (u0 - begin) * k_.panel, y + begin * k_.panel);
  }

  const std::vector<Step<T>>& steps_;
  int64_t rows_;
  const Kernels<T>& k_;
  const std::vector<PackedLayer<T>>& linears_;
  std::vector<int> last_;
  int64_t widest_ = 0, streamed_ = 0;
};

}  // namespace modeconn
