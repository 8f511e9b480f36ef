// The kernels under a sanitizer: chains of odd widths in arrays that end where they must, against a plain loop in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../launch.h"

using namespace modeconn::cuda;

static std::mt19937 generator(0);

static std::vector<float> normal(int64_t count, double scale) {
  std::normal_distribution<float> draw(0.f, float(scale));
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = draw(generator);
  return values;
}

// Returns the relative error of the loss.
static double error_of(int rows, int points, const std::vector<int>& widths, Precision precision, Variant variant) {
  const int terms = 2, layers = int(widths.size()) - 1;
  std::vector<std::vector<float>> values, weights, biases;
  std::vector<double> c(size_t(points * terms));
  for (double& v : c) v = normal(1, 1)[0];
  std::vector<int64_t> labels(size_t(rows), widths.back() / 2);
  Chain chain;
  chain.rows = rows, chain.points = points, chain.width = widths[0], chain.term_count = terms, chain.layer_count = layers;
  chain.coefficients = c.data(), chain.labels = labels.data(), chain.act = modeconn::Act::relu, chain.precision = precision, chain.variant = variant;
  for (int j = 0; j < terms; ++j) values.push_back(normal(int64_t(rows) * widths[0], 1));
  for (int j = 0; j < terms; ++j) chain.terms[j] = values[size_t(j)].data();
  for (size_t l = 0; l < size_t(layers); ++l) {
    weights.push_back(normal(int64_t(terms) * widths[l] * widths[l + 1], 1 / std::sqrt(widths[l])));
    biases.push_back(normal(terms * widths[l + 1], 1));
  }
  for (size_t l = 0; l < size_t(layers); ++l)
    chain.layers[l] = {{weights[l].data(), c.data(), terms}, {biases[l].data(), c.data(), terms}, nullptr, nullptr, widths[l + 1], widths[l],
                       l + 1 < size_t(layers) ? modeconn::Act::tanh : modeconn::Act::identity, 0};

  char* workspace = static_cast<char*>(std::aligned_alloc(128, size_t(plan(chain).bytes)));
  std::vector<double> sums(size_t(points) * 3);
  run(chain, 0, workspace, sums.data(), nullptr);
  std::free(workspace);

  double error = 0, total = 0;
  for (int t = 0; t < points; ++t) {
    const double c0 = c[size_t(t * 2)], c1 = c[size_t(t * 2 + 1)];
    double loss = 0;
    for (int r = 0; r < rows; ++r) {
      std::vector<double> x;
      for (int k = 0; k < widths[0]; ++k) {
        const size_t at = size_t(r) * size_t(widths[0]) + size_t(k);
        x.push_back(std::max(0.0, c0 * values[0][at] + c1 * values[1][at]));
      }
      for (size_t l = 0; l < size_t(layers); ++l) {
        const auto units = size_t(widths[l + 1]), depth = size_t(widths[l]);
        std::vector<double> y(units);
        for (size_t u = 0; u < units; ++u) {
          y[u] = c0 * biases[l][u] + c1 * biases[l][units + u];
          for (size_t k = 0; k < depth; ++k) y[u] += (c0 * weights[l][u * depth + k] + c1 * weights[l][(units + u) * depth + k]) * x[k];
          if (l + 1 < size_t(layers)) y[u] = std::tanh(y[u]);
        }
        x = y;
      }
      double max = -INFINITY, sum = 0;
      for (double v : x) max = std::max(max, v);
      for (double v : x) sum += std::exp(v - max);
      loss += std::log(sum) + max - x[size_t(labels[size_t(r)])];
    }
    error += std::fabs(sums[size_t(t) * 3] - loss), total += loss;
  }
  return error / total;
}

int main() {
  bool good = true;
  for (Variant variant : {Variant::mma, Variant::wgmma})
    for (const auto& [rows, widths] : {std::pair<int, std::vector<int>>{1, {1, 2}}, {129, {7, 63, 3}}, {3, {245, 129, 11}}}) {
      const double error = error_of(rows, 2, widths, Precision::tf32, variant);
      const bool fine = error < 1e-2;
      good &= fine;
      std::printf("%s rows %d, width %d: error %.2g %s\n", variant == Variant::mma ? "mma" : "wgmma", rows, widths[0], error, fine ? "" : "TOO LARGE");
    }
  std::puts(good ? "PASS" : "FAIL");
  return !good;
}
