// Several callers at once, each with a team of its own, over the same weights and inputs: for the thread sanitizer. Every one
// must get what one alone gets, to the bit, and one that is told to stop must stop.
#include <cstdio>
#include <thread>

#include "../engine/chain.h"
#include "draw.h"

namespace modeconn {
namespace {

constexpr int64_t channels = 5, size = 6, rows = 70, points = 6, classes = 4;
const Image image{channels, size, size};

// A convolution with a residual sum, a pooling, a layer, and cross-entropy.
struct Problem {
  std::vector<float> input = draw<float>(rows * image.count()), kernel = draw<float>(2 * channels * channels * 9, 0.2);
  std::vector<float> weights = draw<float>(2 * classes * channels * 9, 0.1);
  std::vector<double> coefficients = draw<double>(points * 2);
  std::vector<double> ones = std::vector<double>(points, 1);
  std::vector<int64_t> labels = std::vector<int64_t>(rows, 1);

  StepGraph<float> graph() const {
    StepGraph<float> g{rows, points, {}, {}, 0, {}};
    auto layer = [&](int64_t units, int64_t depth, int64_t taps, const std::vector<float>& w) {
      Layer<float> l{units, depth, taps, 1, {}, {}, coefficients.data(), coefficients.data()};
      l.weights = {{w.data(), depth}, {w.data() + units * depth, depth}};
      return l;
    };
    const Image half{channels, 3, 3};
    const int64_t flat = half.count();
    g.images.push_back({Op::terms, {}, image, image, {}, {}, {}, {{{input.data(), image.count()}}, ones.data()}});
    g.images.push_back({Op::conv, {0, 0}, image, image, {Act::tanh, 0}, {{3, 3}, {1, 1}, {1, 1}}, layer(channels, channels * 9, 9, kernel), {}});
    g.images.push_back({Op::max_pool, {1}, image, half, {}, {{2, 2}, {2, 2}, {0, 0}}, {}, {}});
    g.flat = 2;
    g.layers.push_back({Op::flat, {}, {flat}, {flat}, {}, {}, {}, {}});
    g.layers.push_back({Op::linear, {0}, {flat}, {classes}, {}, {}, layer(classes, flat, 1, weights), {}});
    g.head.loss = Loss::cross_entropy, g.head.labels = labels.data(), g.head.top5 = true;
    return g;
  }
};

std::vector<double> sums(const Problem& problem, const Context& context, int threads) {
  const StepGraph<float> graph = problem.graph();
  std::vector<LossSums> sums(points);
  Team team(threads, nullptr);
  run(graph, context.kernels<float>(), team, sums.data());
  std::vector<double> all;
  for (const LossSums& s : sums) all.insert(all.end(), {s.loss, s.errors, s.errors5});
  return all;
}

bool stops(const Problem& problem, const Context& context) {
  const StepGraph<float> graph = problem.graph();
  std::vector<LossSums> sums(points);
  const auto begin = std::chrono::steady_clock::now();
  try {
    for (Team team(3, [] { return true; }); std::chrono::steady_clock::now() - begin < std::chrono::minutes(1);)
      run(graph, context.kernels<float>(), team, sums.data());
  } catch (const Interrupted&) {
    return true;
  }
  return false;
}

}  // namespace

int check_threads(const Context& context) {
  const Problem problem;
  const std::vector<double> want = sums(problem, context, 1);
  int bad[8] = {};
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; ++i)
    callers.emplace_back([&, i] {
      for (int turn = 0; turn < 10; ++turn) bad[i] += sums(problem, context, 1 + (i + turn) % 4) != want;
      bad[i] += !stops(problem, context);
    });
  for (std::thread& t : callers) t.join();
  int all = 0;
  for (int one : bad) all += one;
  if (all) std::printf("FAIL %s threads: %d results differ\n", context.isa, all);
  return all;
}

}  // namespace modeconn
