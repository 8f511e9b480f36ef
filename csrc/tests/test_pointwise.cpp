// The steps without weights under the sanitizers, against plain loops in double precision, on images and on rows: a scale and
// shift, a group norm, a product, zeros among some channels, values side by side, a maximum whose last windows are cut off.
#include <cmath>
#include <cstdio>

#include "../engine/chain.h"
#include "draw.h"

namespace modeconn {
namespace {

using Values = std::vector<double>;  // of one sample, [channels][pixels]

// The value of a step at point t from those of the steps before it.
template <class T> Values plain(const Step<T>& s, int64_t t, const std::vector<Values>& values) {
  int64_t pixels = s.out.pixels(), channels = s.out.channels;
  const Values& x = values[s.inputs[0]];
  Values y(s.out.count());
  auto normed = [&](int64_t c, double v) { return v * s.norm.scale[t * channels + c] + s.norm.shift[t * channels + c]; };
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = 0; p < pixels; ++p) {
      double& v = y[c * pixels + p];
      if (s.op == Op::affine) v = normed(c, x[c * pixels + p]) + (s.inputs.size() > 1 ? values[s.inputs[1]][c * pixels + p] : 0);
      if (s.op == Op::multiply) v = x[c * pixels + p] * values[s.inputs[1]][s.in.pixels() == pixels ? c * pixels + p : c];
      if (s.op == Op::take) v = s.channels[c] < 0 ? 0 : x[s.channels[c] * pixels + p];
      if (s.op == Op::concat) {
        int64_t i = 0, at = c;
        while (at >= s.channels[i]) at -= s.channels[i++];
        v = values[s.inputs[i]][at * pixels + p];
      }
      if (s.op == Op::group_norm) {
        int64_t size = channels / s.norm.groups * pixels, from = c * pixels / size * size;
        double mean = 0, square = 0;
        for (int64_t i = from; i < from + size; ++i) mean += x[i] / double(size);
        for (int64_t i = from; i < from + size; ++i) square += (x[i] - mean) * (x[i] - mean) / double(size);
        v = normed(c, (x[c * pixels + p] - mean) / std::sqrt(square + s.norm.eps));
      }
      if (s.op == Op::max_pool) {
        int64_t row = p / s.out.width * 2, column = p % s.out.width * 2;
        v = -INFINITY;
        for (int64_t i = row; i < std::min(row + 2, s.in.height); ++i)
          for (int64_t j = column; j < std::min(column + 2, s.in.width); ++j) v = std::max(v, x[c * s.in.pixels() + i * s.in.width + j]);
      }
      if (s.act.kind == Act::relu) v = std::max(v, 0.0);
    }
  return y;
}

template <class T> double check(const Context& context, int64_t rows, const Image& image, int64_t points, int threads) {
  bool flat = image.pixels() == 1;
  std::vector<T> given = draw<T>(rows * image.count());
  std::vector<std::vector<double>> store;
  store.reserve(8);
  auto factors = [&](int64_t n) { return (store.push_back(draw<double>(points * n)), store.back().data()); };
  const std::vector<double> ones(points, 1);
  StepGraph<T> chain{rows, points, {}, {}, 0, {}};
  std::vector<Step<T>>& steps = flat ? chain.layers : chain.images;
  steps.push_back({Op::terms, {}, image, image, {}, {}, {}, Terms<T>{{{given.data(), image.count()}}, ones.data()}});
  int64_t c = image.channels;
  Image wide{2 * c + 2, image.height, image.width}, some{c + 2, image.height, image.width};
  steps.push_back({Op::affine, {0, 0}, image, image, {Act::relu, 0}, {}, {}, {}, {factors(c), factors(c)}});
  std::vector<int64_t> kept{-1};
  for (int64_t i = c; i-- > 0;) kept.push_back(i);
  kept.push_back(-1);
  steps.push_back({Op::take, {1}, image, some, {}, {}, {}, {}, {}, kept});
  steps.push_back({Op::concat, {0, 2}, image, wide, {Act::relu, 0}, {}, {}, {}, {}, {c, c + 2}});
  steps.push_back({Op::group_norm, {3}, wide, wide, {Act::relu, 0}, {}, {}, {}, {factors(2 * c + 2), factors(2 * c + 2), 0.1, 0, 2}});
  steps.push_back({Op::multiply, {4, 3}, wide, wide, {Act::relu, 0}, {}, {}, {}});
  Image last = wide;
  if (!flat) {
    last.height = (wide.height + 1) / 2, last.width = (wide.width + 1) / 2;
    steps.push_back({Op::max_pool, {5}, wide, last, {}, {{2, 2}, {2, 2}, {0, 0}}, {}, {}});
    chain.flat = int(steps.size()) - 1;
    chain.layers.push_back({Op::flat, {}, {last.count()}, {last.count()}, {}, {}, {}, {}});
  }
  std::vector<T> out(points * rows * last.count(), T(NAN));
  chain.head.outputs = out.data(), chain.head.row_stride = last.count(), chain.head.point_stride = rows * last.count();
  Team team(threads, nullptr);
  run(chain, context.kernels<T>(), team, nullptr);
  double worst = 0;
  for (int64_t t = 0; t < points; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<Values> values{{given.begin() + r * image.count(), given.begin() + (r + 1) * image.count()}};
      for (size_t s = 1; s < steps.size(); ++s) values.push_back(plain(steps[s], t, values));
      for (int64_t k = 0; k < last.count(); ++k) {
        double want = values.back()[k], error = std::abs(out[(t * rows + r) * last.count() + k] - want) / (1 + std::abs(want));
        worst = std::isnan(error) ? INFINITY : std::max(worst, error);
      }
    }
  return worst;
}

}  // namespace

int check_pointwise(const Context& context) {
  int bad = 0;
  for (int64_t rows : {0, 1, 33})
    for (const Image& image : {Image{1, 1, 1}, Image{7, 1, 1}, Image{130, 1, 1}, Image{1, 3, 5}, Image{17, 4, 3}}) {
      double f32 = check<float>(context, rows, image, 3, 2), f64 = check<double>(context, rows, image, 2, 1);
      if (f32 <= 1e-4 && f64 <= 1e-12) continue;
      std::printf("FAIL %s pointwise: rows %d channels %d: errors %.2e %.2e\n", context.isa, int(rows), int(image.channels), f32, f64);
      ++bad;
    }
  return bad;
}

}  // namespace modeconn
