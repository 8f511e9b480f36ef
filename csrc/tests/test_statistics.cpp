// The statistics of batches under the sanitizers, against plain loops in double precision: norms of images and of rows, one
// behind a pooling that is taken first, one of a sum, and one whose value no step reads.
#include <cmath>
#include <cstdio>

#include "../engine/statistics.h"
#include "draw.h"

namespace modeconn {
namespace {

using Values = std::vector<double>;  // [rows][channels][pixels]

// The mean and the unbiased variance of a channel.
std::pair<double, double> moments(const Values& x, const Image& image, int64_t c) {
  int64_t rows = int64_t(x.size()) / image.count();
  double mean = 0, squares = 0, n = double(rows * image.pixels());
  auto each = [&](auto&& f) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < image.pixels(); ++p) f(x[(r * image.channels + c) * image.pixels() + p]);
  };
  each([&](double v) { mean += v / n; });
  each([&](double v) { squares += (v - mean) * (v - mean); });
  return {mean, squares / (n - 1)};
}

template <class T> Values plain(const Step<T>& s, const std::vector<Values>& values, const std::vector<Step<T>>& steps, int64_t rows) {
  Values y(rows * s.out.count());
  const Values& x = values[s.inputs[0]];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t u = 0; u < s.out.channels; ++u)
      for (int64_t p = 0; p < s.out.pixels(); ++p) {
        auto at = [&](const Values& v, const Image& image, int64_t c, int64_t q) { return v[(r * image.channels + c) * image.pixels() + q]; };
        double value = 0;
        if (s.op == Op::conv || s.op == Op::linear)
          for (int64_t c = 0; c < s.in.channels; ++c) value += s.layer.weights[0].data[u * s.in.channels + c] * at(x, s.in, c, p);
        if (s.op == Op::sum)
          for (int i : s.inputs) value += at(values[i], s.in, u, p);
        if (s.op == Op::max_pool) value = std::max(at(x, s.in, u, 2 * p), at(x, s.in, u, 2 * p + 1));
        if (s.op == Op::norm) {
          auto [mean, variance] = moments(values[s.norm.of], steps[s.norm.of].out, u);
          double n = double(rows * steps[s.norm.of].out.pixels());
          value = s.norm.scale[u] * (at(x, s.in, u, p) - mean) / std::sqrt(variance * (n - 1) / n + s.norm.eps) + s.norm.shift[u];
        }
        y[(r * s.out.channels + u) * s.out.pixels() + p] = s.act.kind == Act::relu ? std::max(value, 0.0) : value;
      }
  return y;
}

// Images [channels][2 * pixels][1] → conv → max pool of pairs → norm of the convolution → conv → norm → + → norm, in double.
template <class T> double check(const Context& context, int64_t rows, int64_t channels, int64_t pixels, int threads) {
  std::vector<std::vector<T>> store;
  std::vector<std::vector<double>> doubles;
  store.reserve(16), doubles.reserve(32);
  const int64_t points = 3;  // equal ones
  const double ones[3] = {1, 1, 1};
  auto keep = [&](int64_t n) { return (store.push_back(draw<T>(n)), store.back().data()); };
  auto factors = [&](int64_t n, double sign) {
    std::vector<double> one = draw<double>(n), all;
    for (double& v : one) v = sign > 0 ? std::abs(v) : v;
    for (int64_t t = 0; t < points; ++t) all.insert(all.end(), one.begin(), one.end());
    return (doubles.push_back(all), doubles.back().data());
  };
  Image image{channels, 2 * pixels, 1}, half{channels + 3, pixels, 1}, whole{channels + 3, 2 * pixels, 1};
  StepGraph<T> chain{rows, points, {}, {}, 0, {}};
  std::vector<Step<T>>& steps = pixels ? chain.images : chain.layers;
  bool flat = pixels == 0;
  if (flat) image = {channels, 1, 1}, half = whole = {channels + 3, 1, 1};
  steps.push_back({Op::terms, {}, image, image, {}, {}, {}, Terms<T>{{{keep(rows * image.count()), image.count()}}, ones}});
  auto product = [&](int input, const Image& in, const Image& out) {
    Layer<T> layer{out.channels, in.channels, 1, 1, {{keep(out.channels * in.channels), in.channels}}, {}, ones, ones};
    steps.push_back({flat ? Op::linear : Op::conv, {input}, in, out, {}, {{1, 1}, {1, 1}, {0, 0}}, layer, {}});
    return int(steps.size()) - 1;
  };
  auto norm = [&](int input, int of, Act act) {
    const Image at = steps[input].out;
    steps.push_back({Op::norm, {input}, at, at, {act, 0}, {}, {}, {}, {factors(at.channels, 1), factors(at.channels, 0), 1e-5, of}});
    return int(steps.size()) - 1;
  };
  int first = product(0, image, whole), pool = first;
  if (!flat) steps.push_back({Op::max_pool, {first}, whole, half, {}, {{2, 1}, {2, 1}, {0, 0}}, {}, {}}), pool = int(steps.size()) - 1;
  int one = norm(pool, first, Act::relu), second = product(one, half, half), two = norm(second, second, Act::identity);
  steps.push_back({Op::sum, {two, one}, half, half, {Act::relu, 0}, {}, {}, {}});
  int sum = two + 1, three = norm(sum, sum, Act::identity);
  norm(three, three, Act::relu);
  if (!flat) chain.flat = int(steps.size()) - 1, chain.layers.push_back({Op::flat, {}, {half.count()}, {half.count()}, {}, {}, {}, {}});

  int64_t all = norm_channels(chain);
  std::vector<double> out(points * 2 * all, NAN);
  Team team(threads, nullptr);
  statistics(chain, context.kernels<T>(), team, out.data());
  std::vector<Values> values;
  double worst = 0;
  int64_t c0 = 0;
  for (const Step<T>& s : steps) {
    if (s.op == Op::terms) values.emplace_back(s.terms.values[0].data, s.terms.values[0].data + rows * image.count());
    else values.push_back(plain(s, values, steps, rows));
    for (int64_t c = 0; s.op == Op::norm && c < s.in.channels; ++c, ++c0)
      for (int64_t t = 0; t < points; ++t) {
        auto [mean, variance] = moments(values[s.norm.of], steps[s.norm.of].out, c);
        double error = std::max(std::abs(out[2 * t * all + c0] - mean), std::abs(out[(2 * t + 1) * all + c0] - variance)) / (1 + variance);
        worst = std::isnan(error) ? INFINITY : std::max(worst, error);
      }
  }
  return worst;
}

}  // namespace

int check_statistics(const Context& context) {
  int bad = 0;
  for (int64_t rows : {2, 16, 33, 129})
    for (int64_t channels : {1, 5, 17})
      for (int64_t pixels : {0, 1, 6}) {  // 0: rows
        double f32 = check<float>(context, rows, channels, pixels, 2), f64 = check<double>(context, rows, channels, pixels, 3);
        if (f32 <= 1e-4 && f64 <= 1e-11) continue;
        std::printf("FAIL %s statistics: rows %d channels %d pixels %d: errors %.2e %.2e\n", context.isa, int(rows), int(channels), int(pixels), f32, f64);
        ++bad;
      }
  return bad;
}

}  // namespace modeconn
