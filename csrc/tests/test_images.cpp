// Convolutions and pooling under the sanitizers, against plain loops in double precision, on a reduced set of shapes.
#include <cmath>
#include <cstdio>
#include <limits>

#include "../engine/chain.h"
#include "draw.h"

namespace modeconn {
namespace {

using Values = std::vector<double>;

template <class T> Values plain(const Step<T>& s, const Values& x, const Values* more) {
  Values y;
  const Window& w = s.window;
  int64_t parts = s.op == Op::conv ? s.layer.groups : 1, channels = s.in.channels / parts;
  for (int64_t u = 0; u < s.out.channels; ++u)
    for (int64_t h = 0; h < s.out.height; ++h)
      for (int64_t v = 0; v < s.out.width; ++v) {
        double sum = s.op == Op::conv ? s.layer.biases[0][u] : 0, max = -INFINITY;
        for (int64_t c = 0; c < s.in.channels; ++c)
          for (int64_t i = 0; i < w.kernel[0]; ++i)
            for (int64_t j = 0; j < w.kernel[1]; ++j) {
              int64_t row = h * w.stride[0] - w.padding[0] + i * w.dilation[0], column = v * w.stride[1] - w.padding[1] + j * w.dilation[1];
              if ((s.op != Op::conv && c != u) || c / channels != u / (s.out.channels / parts) || row < 0 || column < 0 || row >= s.in.height || column >= s.in.width) continue;
              double value = x[(c * s.in.height + row) * s.in.width + column];
              if (s.op == Op::conv) value *= s.layer.weights[0].data[u * s.layer.depth + c % channels * s.layer.taps + i * w.kernel[1] + j];
              sum += value, max = std::max(max, value);
            }
        if (more) sum += (*more)[y.size()];
        y.push_back(s.op == Op::conv ? std::max(sum, 0.0) : s.op == Op::max_pool ? max : sum / double(w.taps()));
      }
  return y;
}

// A convolution in a chain that keeps its image's size takes its own input's value, too, if `residual`, and `groups` of channels.
// `large`: inputs of which few can be added.
struct Case {
  std::vector<std::pair<Op, Window>> steps;
  int64_t groups = 1;
  bool residual = false, large = false;
};

template <class T> double check(const Context& context, int64_t rows, const Image& image, const Case& c, int threads) {
  std::vector<std::vector<T>> store;
  store.reserve(32);
  auto keep = [&](int64_t n) { return (store.push_back(draw<T>(n)), store.back().data()); };
  const double ones[2] = {1, 1};
  const int64_t points = 2;  // equal ones
  StepGraph<T> chain{rows, points, {}, {}, 0, {}};
  T* values = keep(rows * image.count());
  for (int64_t i = 0; i < rows * image.count() && c.large; ++i) values[i] *= std::numeric_limits<T>::max() / 6;
  Terms<T> terms{{{values, image.count()}}, ones};
  chain.images.push_back({Op::terms, {}, image, image, {}, {}, {}, terms});
  Image in = image;
  for (auto [op, window] : c.steps) {
    Step<T> s{op, {int(chain.images.size()) - 1}, in, in, {}, window, {}, {}};
    s.out.height = (in.height + 2 * window.padding[0] - window.dilation[0] * (window.kernel[0] - 1) - 1) / window.stride[0] + 1;
    s.out.width = (in.width + 2 * window.padding[1] - window.dilation[1] * (window.kernel[1] - 1) - 1) / window.stride[1] + 1;
    if (op == Op::conv) {
      s.act = {Act::relu, 0};
      bool more = c.residual && s.out.height == in.height && s.out.width == in.width;
      if (more) s.inputs.push_back(s.inputs[0]);
      else s.out.channels = in.channels * (c.groups > 1 ? 2 : 1) + (c.groups > 1 ? 0 : 6);
      int64_t groups = in.channels % c.groups ? 1 : c.groups, depth = in.channels / groups * window.taps();
      s.layer = Layer<T>{s.out.channels, depth, window.taps(), groups, {}, {}, ones, ones};
      T* weights = keep(s.layer.units * s.layer.depth);
      for (int64_t i = 0; i < s.layer.units * s.layer.depth && c.large; ++i) weights[i] *= T(1e-3);
      s.layer.weights.push_back({weights, s.layer.depth});
      s.layer.biases.push_back(keep(s.layer.units));
    }
    chain.images.push_back(s);
    in = s.out;
  }
  chain.flat = int(chain.images.size()) - 1;
  chain.layers.push_back({Op::flat, {}, {in.count()}, {in.count()}, {}, {}, {}, {}});
  std::vector<T> out(points * rows * in.count(), T(NAN));
  chain.head.outputs = out.data(), chain.head.row_stride = in.count(), chain.head.point_stride = rows * in.count();
  Team team(threads, nullptr);
  run(chain, context.kernels<T>(), team, nullptr);
  double worst = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T* first = terms.values[0].data + r * image.count();
    Values x(first, first + image.count());
    for (const Step<T>& s : chain.images)
      if (s.op != Op::terms) x = plain(s, x, s.inputs.size() > 1 ? &x : nullptr);
    double scale = 1;
    for (double v : x) scale = std::max(scale, std::abs(v));
    for (int64_t i = 0; i < points * in.count(); ++i) {
      int64_t t = i / in.count(), k = i % in.count();
      double error = std::abs(out[(t * rows + r) * in.count() + k] - x[k]) / scale;
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  return worst;
}

}  // namespace

int check_images(const Context& context) {
  const Window same{{3, 3}, {1, 1}, {1, 1}}, half{{2, 2}, {2, 2}, {0, 0}}, wide{{5, 2}, {2, 1}, {2, 1}}, lapped{{3, 3}, {2, 2}, {1, 1}};
  const Window inner{{3, 3}, {1, 1}, {0, 0}}, slices{{2, 1}, {3, 1}, {0, 0}};
  const Window spread{{3, 2}, {1, 1}, {2, 1}, {2, 3}};
  const std::vector<Case> chains = {
      {{{Op::conv, same}}}, {{{Op::conv, same}, {Op::max_pool, half}, {Op::conv, wide}}}, {{{Op::conv, wide}, {Op::max_pool, lapped}}},
      {{{Op::max_pool, half}, {Op::conv, same}, {Op::avg_pool, half}}}, {{{Op::avg_pool, lapped}, {Op::avg_pool, half}}},
      {{{Op::conv, same}, {Op::conv, same}, {Op::avg_pool, half}}, 1, true}, {{{Op::conv, same}, {Op::conv, spread}}, 17},
      {{{Op::conv, spread}}}, {{{Op::conv, same}, {Op::conv, same}, {Op::max_pool, half}}, 17, true}};
  const std::vector<Case> by_winograd = {
      {{{Op::conv, same}, {Op::max_pool, half}}}, {{{Op::conv, same}, {Op::avg_pool, lapped}}, 1, true}, {{{Op::conv, inner}, {Op::max_pool, slices}}},
      {{{Op::conv, same}}, 1, false, true}};
  int bad = 0;
  auto try_all = [&](const std::vector<Case>& chains, std::initializer_list<Image> images) {
    for (size_t i = 0; i < chains.size(); ++i)
      for (int64_t rows : {0, 1, 33})
        for (const Image& image : images) {
          double f32 = check<float>(context, rows, image, chains[i], 2), f64 = check<double>(context, rows, image, chains[i], 1);
          if (f32 <= 1e-4 && f64 <= 1e-12) continue;
          std::printf("FAIL %s images: chain %d rows %d channels %d: errors %.2e %.2e\n", context.isa, int(i), int(rows), int(image.channels), f32, f64);
          ++bad;
        }
  };
  try_all(chains, {{1, 4, 4}, {3, 5, 7}, {17, 8, 4}});
  try_all(by_winograd, {{31, 8, 7}});
  return bad;
}

}  // namespace modeconn
