#include "statistics.h"

#include <cmath>

#include "images.h"

namespace modeconn {
namespace {

constexpr int64_t value_bytes = 16 << 20;  // of the points in flight: their values should stay in the last cache level

// The moments of so many values of one channel: their mean, and the sum of their squared distances from it.
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void add(const Moments& more) {  // Chan, Golub and LeVeque 1979
    double all = count + more.count, share = all > 0 ? more.count / all : 0, off = more.mean - mean;
    mean += off * share;
    squares += more.squares + off * off * count * share;
    count = all;
  }
};

// One list of all steps, rows being images of one pixel.
template <class T> std::vector<Step<T>> joined(const StepGraph<T>& chain) {
  std::vector<Step<T>> steps = chain.images;
  int first = int(steps.size());
  for (Step<T> s : chain.layers) {
    for (int& i : s.inputs) i += first;
    s.norm.of += first;
    if (s.op == Op::flat) s.inputs = {chain.flat}, s.in = steps[chain.flat].out;
    if (s.op == Op::linear) s.op = Op::conv, s.window = {{1, 1}, {1, 1}, {0, 0}};
    steps.push_back(s);
  }
  return steps;
}

// A norm needs its batch's statistics, so all panels must have come that far: steps go in phases, and a norm is in the phase
// after the value that its statistics are of. Within a phase a panel goes through all steps; the values that a later phase
// reads stay, for all panels of a point, the others are the thread's.
template <class T> class Statistics {
 public:
  Statistics(const StepGraph<T>& chain, const Kernels<T>& kernels, Team& team, double* out)
      : chain_(alone(chain)), k_(kernels), team_(team), out_(out), packing_(chain_, kernels), steps_(kernels),
        channels_(norm_channels(chain_)) {
    make_stages(), place();
  }

  void run() {
    int64_t panels = (chain_.rows + k_.panel - 1) / k_.panel;
    int64_t bytes = (panels * kept_ + packing_.size) * int64_t(sizeof(T)) + 1;
    int64_t group = std::max((team_.threads() + panels - 1) / panels, value_bytes / bytes);
    group = std::min(group, chain_.points);
    if (group == 0) return;
    Buffer<T> packed(group * packing_.size), kept(group * panels * kept_), factors(group * 2 * channels_);
    std::vector<Buffer<T>> scratch;
    for (int i = 0; i < team_.threads(); ++i) scratch.emplace_back(scratch_ + strip_);
    std::vector<Moments> moments(group * panels * channels_);
    for (int64_t t0 = 0; t0 < chain_.points; t0 += group) {
      int64_t n = std::min(group, chain_.points - t0), pieces = int64_t(packing_.pieces.size());
      team_.each(n * pieces, [&](int64_t i, int) {
        packing_.pack(k_, t0 + i / pieces, packing_.pieces[i % pieces], packed.get() + i / pieces * packing_.size);
      });
      for (int phase = 0; phase < phases_; ++phase) {
        team_.each(n * panels, [&](int64_t i, int thread) {
          int64_t t = i / panels, panel = i % panels;
          Panel at{t0 + t, panel * k_.panel, int(std::min<int64_t>(k_.panel, chain_.rows - panel * k_.panel)),
                   packed.get() + t * packing_.size, factors.get() + t * 2 * channels_, kept.get() + i * kept_,
                   scratch[thread].get(), moments.data() + i * channels_};
          for (const Placed& s : stages_)
            if (s.phase == phase && !team_.stopping(thread)) run(s, at);
        });
        for (int64_t t = 0; t < n; ++t)
          finish(phase, t0 + t, panels, moments.data() + t * panels * channels_, factors.get() + t * 2 * channels_);
      }
    }
  }

 private:
  struct Placed : Stage<T> {
    int phase;
    bool kept;       // for later phases
    int64_t norm;    // the place of a norm's channels among all
    int64_t counts;  // the same of the first norm whose statistics are this step's; -1: none
  };

  // One panel at one point.
  struct Panel {
    int64_t point, row;
    int samples;
    const T *packed, *factors;
    T *kept, *scratch;
    Moments* moments;
  };

  struct Counted {
    int step;  // that the statistics are of
    int64_t at, channels;
    const Norm* norm;
  };

  static StepGraph<T> alone(const StepGraph<T>& chain) { return {chain.rows, chain.points, joined(chain), {}, 0, {}}; }

  void make_stages() {
    const std::vector<Step<T>>& steps = chain_.images;
    size_t count = steps.size();
    std::vector<int> phase(count), readers(count), last(count, -1), stage(count, -1);
    std::vector<int64_t> norm(count), counts(count, -1);
    int64_t channels = 0;
    for (size_t i = 0; i < count; ++i) {
      const Step<T>& s = steps[i];
      for (int j : s.inputs) phase[i] = std::max(phase[i], phase[j]);
      if (s.op != Op::norm) continue;
      phase[i] = std::max(phase[i], phase[s.norm.of] + 1);
      phases_ = std::max(phases_, phase[i]);
      norm[i] = channels;
      if (counts[s.norm.of] < 0) counts[s.norm.of] = channels;
      counted_.push_back({s.norm.of, channels, s.in.channels, &s.norm});
      channels += s.in.channels;
    }
    for (const Counted& c : counted_) phase_of_.push_back(phase[c.step]), first_of_.push_back(counts[c.step]);
    for (size_t i = count; i-- > 0;)  // what leads to no statistics is left out
      if (counts[i] >= 0 || readers[i])
        for (int j : steps[i].inputs) ++readers[j], last[j] = std::max(last[j], int(i));
    std::vector<size_t> order;
    for (size_t i = 0; i < count; ++i)
      if (counts[i] >= 0 || readers[i]) order.push_back(i);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return phase[a] < phase[b]; });
    std::vector<const PackedLayer<T>*> packed(count);
    auto conv = packing_.convs.begin();
    for (size_t i = 0; i < count; ++i)
      if (steps[i].op == Op::conv) packed[i] = &*conv++;
    for (size_t i : order) {
      if (stage[i] >= 0) continue;  // a pooling that is done
      const Step<T>& s = steps[i];
      bool pooled = s.op == Op::conv && readers[i] == 1 && counts[last[i]] < 0 && on_the_way(steps[last[i]], packed[i]);
      const Step<T>* pool = pooled ? &steps[last[i]] : nullptr;
      stage[i] = int(stages_.size());
      if (pool) stage[last[i]] = stage[i];
      Placed placed{{&s, packed[i], pool, s.out, pool ? pool->out : s.out, {}}, phase[i], false, norm[i], counts[i]};
      for (int j : s.inputs) placed.inputs.push_back(stage[j]);
      stages_.push_back(placed);
      if (s.op == Op::conv || s.op == Op::terms) strip_ = std::max(strip_, steps_.strip(placed));
    }
  }

  // A pooling that takes each row of a convolution once, as they are made.
  bool on_the_way(const Step<T>& pool, const PackedLayer<T>* packed) const {
    const Window& w = pool.window;
    return steps_.pools(pool, packed) && w.stride[0] == w.kernel[0] && pool.in.height % w.kernel[0] == 0;
  }

  void place() {
    std::vector<int> last(stages_.size());
    for (size_t s = 0; s < stages_.size(); ++s) {
      last[s] = int(s);
      for (int i : stages_[s].inputs) last[i] = int(s);
    }
    for (size_t s = 0; s < stages_.size(); ++s) {
      stages_[s].kept = stages_[last[s]].phase > stages_[s].phase;
      std::vector<std::pair<int64_t, int64_t>> used;
      for (size_t j = 0; j < s; ++j)
        if (last[j] >= int(s) && stages_[j].kept == stages_[s].kept)
          used.emplace_back(stages_[j].at, stages_[j].at + stages_[j].out.count() * k_.panel);
      int64_t size = stages_[s].out.count() * k_.panel, at = stages_[s].at = first_gap(used, size);
      int64_t& all = stages_[s].kept ? kept_ : scratch_;
      all = std::max(all, at + size);
    }
  }

  void run(const Placed& s, const Panel& at) const {
    auto value = [&](const Placed& stage) { return (stage.kept ? at.kept : at.scratch) + stage.at; };
    std::vector<const T*> x;
    for (int j : s.inputs) x.push_back(value(stages_[j]));
    T *y = value(s), *strip = at.scratch + scratch_;
    const T *more = x.size() > 1 ? x[1] : nullptr, *factors = at.factors + 2 * s.norm;
    auto seen = [&](int64_t u0, int64_t units, int64_t pixels, int64_t pitch, const T* values) { count(s, at, u0, units, pixels, pitch, values); };
    if (s.counts >= 0) std::fill_n(at.moments + s.counts, s.made.channels, Moments{});
    switch (s.step->op) {
      case Op::conv: steps_.convolve(s, at.point, x[0], more, at.packed, strip, y, seen); break;
      case Op::norm: scale_and_shift(k_, *s.step, factors, factors + s.out.channels, x[0], more, y); break;
      case Op::terms: combine(s, at, strip, y); break;
      case Op::flat: steps_.flatten(s.step->in, x[0], y); break;
      case Op::max_pool: case Op::avg_pool: steps_.pool(*s.step, x[0], 0, 0, s.step->in.channels, 0, s.out.height, y); break;
      default: run_pointwise(k_, *s.step, at.point, x, y);
    }
    if (s.step->op != Op::conv) seen(0, s.out.channels, s.out.pixels(), s.out.channels * k_.panel, y);
  }

  void combine(const Placed& s, const Panel& at, T* strip, T* y) const {
    if (s.made.pixels() > 1) return steps_.combine(s, at.point, 1, at.row, at.samples, strip, y);
    const Terms<T>& given = s.step->terms;
    Active<T, Rows<T>> terms(given.values, given.coefficients + at.point * int64_t(given.values.size()));
    for (Rows<T>& r : terms.items) r.data += at.row * r.stride;
    k_.combine_rows(terms.count(), terms.items.data(), terms.coefficients.data(), at.samples, s.made.channels, s.step->act, y);
  }

  void count(const Placed& s, const Panel& at, int64_t u0, int64_t units, int64_t pixels, int64_t pitch, const T* values) const {
    if (s.counts < 0) return;
    double mean[16], squares[16];
    for (int64_t u = 0; u < units; u += 16) {
      int some = int(std::min<int64_t>(16, units - u));
      k_.moments(pixels, pitch, some, at.samples, values + u * k_.panel, mean, squares);
      for (int i = 0; i < some; ++i) at.moments[s.counts + u0 + u + i].add({double(pixels * at.samples), mean[i], squares[i]});
    }
  }

  // The statistics that a phase has given, from its panels' in their order, and what the next makes of them.
  void finish(int phase, int64_t point, int64_t panels, const Moments* moments, T* factors) const {
    double *means = out_ + point * 2 * channels_, *variances = means + channels_;
    for (size_t n = 0; n < counted_.size(); ++n) {
      const Counted& c = counted_[n];
      for (int64_t i = 0; i < c.channels && phase_of_[n] == phase; ++i) {
        Moments all;
        for (int64_t p = 0; p < panels; ++p) all.add(moments[p * channels_ + first_of_[n] + i]);
        means[c.at + i] = all.mean, variances[c.at + i] = all.squares / (all.count - 1);
        double scale = c.norm->scale[point * c.channels + i] / std::sqrt(all.squares / all.count + c.norm->eps);
        factors[2 * c.at + i] = T(scale);
        factors[2 * c.at + c.channels + i] = T(c.norm->shift[point * c.channels + i] - all.mean * scale);
      }
    }
  }

  const StepGraph<T> chain_;
  const Kernels<T>& k_;
  Team& team_;
  double* out_;
  Packing<T> packing_;
  PanelSteps<T> steps_;
  int64_t channels_;
  std::vector<Placed> stages_;  // phase by phase
  std::vector<Counted> counted_;
  std::vector<int> phase_of_;      // of what is counted: its phase
  std::vector<int64_t> first_of_;  // and where its moments are
  int phases_ = 0;
  int64_t kept_ = 0, scratch_ = 0, strip_ = 0;  // elements: of a panel's values, of a thread's, of its strip
};

}  // namespace

template <class T> void statistics(const StepGraph<T>& chain, const Kernels<T>& kernels, Team& team, double* out) {
  Statistics<T>(chain, kernels, team, out).run();
}

template void statistics(const StepGraph<float>&, const Kernels<float>&, Team&, double*);
template void statistics(const StepGraph<double>&, const Kernels<double>&, Team&, double*);

}  // namespace modeconn
