// Runs the engine on a reduced set of shapes under the sanitizers, against plain loops in double precision. Every
// array ends exactly where it must, so that a read or write beyond it is caught.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../engine/chain.h"
#include "draw.h"

namespace modeconn {

int check_images(const Context& context);      // test_images.cpp
int check_pointwise(const Context& context);   // test_pointwise.cpp
int check_statistics(const Context& context);  // test_statistics.cpp
int check_threads(const Context& context);     // test_threads.cpp

namespace {

template <class T> double check(const Context& context, int64_t rows, std::vector<int64_t> widths, int64_t points, Act act, int threads) {
  std::vector<std::vector<T>> store;
  auto keep = [&](int64_t n, double scale = 1) { return (store.push_back(draw<T>(n, scale)), store.back().data()); };
  store.reserve(64);
  std::vector<double> c = draw<double>(points * 2);
  for (int64_t t = 0; t < points; ++t) c[2 * t] *= t % 3 != 0;

  StepGraph<T> chain{rows, points, {}, {}, 0, {}};
  Terms<T> terms{{}, c.data()};
  for (int j = 0; j < 2; ++j) terms.values.push_back({keep(rows * widths[0]), widths[0]});
  chain.layers.push_back({Op::terms, {}, {widths[0]}, {widths[0]}, {act, 0.125}, {}, {}, terms});
  for (size_t l = 1; l < widths.size(); ++l) {
    Layer<T> layer{widths[l], widths[l - 1], 1, 1, {}, {}, c.data(), c.data()};
    for (int g = 0; g < 2; ++g) {
      layer.weights.push_back({keep(layer.units * layer.depth, 1 / std::sqrt(layer.depth)), layer.depth});
      layer.biases.push_back(keep(layer.units));
    }
    std::vector<int> inputs{int(l) - 1};  // the last layer takes the terms as well, where they are as wide
    if (l > 1 && l + 1 == widths.size() && widths[l] == widths[0]) inputs.push_back(0);
    chain.layers.push_back({Op::linear, inputs, {widths[l - 1]}, {widths[l]}, {act, 0.125}, {}, layer, {}});
  }
  if (widths.back() == widths[0])  // and what comes of it is added to the terms and to itself
    chain.layers.push_back({Op::sum, {int(widths.size()) - 1, 0, int(widths.size()) - 1}, {widths[0]}, {widths[0]}, {}, {}, {}, {}});
  int64_t width = widths.back();
  std::vector<T> out(points * rows * width, T(NAN));
  chain.head.outputs = out.data();
  chain.head.point_stride = rows * width, chain.head.row_stride = width;
  Team team(threads, nullptr);
  run(chain, context.kernels<T>(), team, nullptr);

  std::vector<int64_t> labels(rows);
  for (int64_t i = 0; i < rows; ++i) labels[i] = i % width;
  std::vector<LossSums> sums(points), squares(points);
  chain.head = {};
  chain.head.loss = Loss::cross_entropy, chain.head.labels = labels.data(), chain.head.top5 = true;
  run(chain, context.kernels<T>(), team, sums.data());
  chain.head.loss = Loss::mse, chain.head.targets = terms.values[0];
  if (width == widths[0]) run(chain, context.kernels<T>(), team, squares.data());
  chain.head.loss = Loss::bce;
  if (width == widths[0]) run(chain, context.kernels<T>(), team, squares.data());

  double worst = 0;
  auto apply = [&](double v) { return act == Act::relu ? (v > 0 ? v : 0) : v; };
  for (int64_t t = 0; t < points; ++t) {
    double loss = 0;
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<double> x(widths[0]), first;
      for (int64_t k = 0; k < widths[0]; ++k) {
        double sum = 0;
        for (int j = 0; j < 2; ++j) sum += c[2 * t + j] * terms.values[j].data[i * widths[0] + k];
        x[k] = apply(sum);
      }
      first = x;
      for (const Step<T>& step : chain.layers) {
        if (step.op != Op::linear) continue;
        const Layer<T>& l = step.layer;
        std::vector<double> y(l.units);
        for (int64_t u = 0; u < l.units; ++u) {
          for (int g = 0; g < 2; ++g) {
            double sum = l.biases[g][u];
            for (int64_t k = 0; k < l.depth; ++k) sum += l.weights[g].data[u * l.depth + k] * x[k];
            y[u] += c[2 * t + g] * sum;
          }
          y[u] = apply(y[u] + (step.inputs.size() > 1 ? first[u] : 0));
        }
        x = y;
      }
      for (int64_t u = 0; u < width && chain.layers.back().op == Op::sum; ++u) x[u] += first[u] + x[u];
      double max = x[0], scale = 1, total = 0;
      for (double v : x) max = std::max(max, v), scale = std::max(scale, std::abs(v));
      for (double v : x) total += std::exp(v - max);
      loss += std::log(total) + max - x[labels[i]];
      for (int64_t u = 0; u < width; ++u) worst = std::max(worst, std::abs(out[(t * rows + i) * width + u] - x[u]) / scale);
      worst = std::isnan(out[(t * rows + i) * width]) ? INFINITY : worst;
    }
    worst = std::max(worst, std::abs(sums[t].loss - loss) / (std::abs(loss) + 1));
  }
  return worst;
}

template <class T> int check_all(const Context& context, double allowed) {
  int bad = 0;
  std::vector<std::vector<int64_t>> shapes = {{1}, {10}, {1, 1}, {7, 3, 2}, {63, 25, 63}, {245, 13, 10}, {1025, 5, 1025, 3}};
  int turn = 0;
  for (const auto& widths : shapes)
    for (int64_t rows : {0, 1, 2, 63, 257})
      for (int64_t points : {1, 5}) {
        Act act = (turn + turn / 10) % 2 ? Act::identity : Act::relu;  // both with either number of points
        ++turn;
        double worst = check<T>(context, rows, widths, points, act, 1 + int(points > 1) * 2);
        if (worst <= allowed) continue;
        std::printf("FAIL %s %s rows %d first width %d points %d: error %.2e\n", context.isa, sizeof(T) == 4 ? "f32" : "f64",
                    int(rows), int(widths[0]), int(points), worst);
        ++bad;
      }
  return bad;
}

}  // namespace
}  // namespace modeconn

int main() {
  const char* isas[3];
  int n = modeconn::supported_isas(isas), bad = 0;
  for (int i = 0; i < n; ++i) {
    const modeconn::Context& context = modeconn::context(isas[i]);
    bad += modeconn::check_all<float>(context, 1e-4) + modeconn::check_all<double>(context, 1e-12) + modeconn::check_images(context);
    bad += modeconn::check_pointwise(context) + modeconn::check_statistics(context) + modeconn::check_threads(context);
    std::printf("%s: %s\n", isas[i], bad ? "FAIL" : "PASS");
  }
  return bad != 0;
}
