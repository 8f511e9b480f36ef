// A network at many points of a path, as data. chain.cpp, images.h and layers.h compute it; nothing here knows a CPU.
#pragma once
#include <cstdint>
#include <vector>

#include "../cpu/context.h"
#include "team.h"

namespace modeconn {

// sum_j c[t, j] V_j of values that are given.
template <class T> struct Terms {
  std::vector<Rows<T>> values;            // V_j: [rows][width]; of images each row is one, [channels][height][width]
  const double* coefficients = nullptr;   // [points][values.size()]
};

// W(t) = sum_g c[t, g] W_g and b(t) likewise: scale(t) (W(t) x + b(t)) + shift(t).
template <class T> struct Layer {
  int64_t units, depth;
  int64_t taps = 1;                // of a convolution's kernel: depth is channels * taps, packed as taps * channels
  int64_t groups = 1;              // of a convolution: so many equal parts of the units read as many parts of the channels
  std::vector<Rows<T>> weights;    // one per control point, [units][depth]
  std::vector<const T*> biases;    // one per control point, or none
  const double* coefficients;      // [points][weights.size()]
  const double* bias_coefficients; // [points][biases.size()]
  const double *scale = nullptr, *shift = nullptr;  // both or none: [points][units], a norm folded into the weights
  bool biased() const { return !biases.empty() || shift; }
  bool depthwise() const { return groups > 1 && groups == units && depth == taps; }  // each unit reads its own channel
};

struct Image {
  int64_t channels = 1, height = 1, width = 1;
  int64_t pixels() const { return height * width; }
  int64_t count() const { return channels * pixels(); }
};

// The window of a convolution or a pooling: {vertical, horizontal}; the padding is on both sides.
struct Window {
  int64_t kernel[2], stride[2], padding[2], dilation[2] = {1, 1};
  int64_t taps() const { return kernel[0] * kernel[1]; }
  bool apart() const { return stride[0] >= kernel[0] && stride[1] >= kernel[1] && !padding[0] && !padding[1]; }
};

// A scale and shift of each channel, in a batch norm behind the normalisation by the statistics of the batch. Those are of
// another value: of its input, before a pooling if there is one.
struct Norm {
  const double *scale = nullptr, *shift = nullptr;  // [points][channels]
  double eps = 0;
  int of = 0;  // the step that the statistics are of
  int64_t groups = 1;  // of a group norm
};

// flat: the last of the images, as rows. sum: of several values. multiply: of two values, of which the second, `in`, may have
// one pixel. affine: a scale and shift. group_norm: the same behind a normalisation by each sample's own statistics. take: some
// channels. concat: the channels of several values. norm: only for `statistics`.
enum class Op { terms, flat, conv, linear, max_pool, avg_pool, sum, multiply, affine, group_norm, take, concat, norm };

// One value, act(op(inputs)). A second input of a convolution, linear layer, affine or norm is added before the activation.
template <class T> struct Step {
  Op op;
  std::vector<int> inputs;  // earlier steps of the same list
  Image in, out;            // rows are images of one pixel
  Activation act;
  Window window;            // conv and poolings
  Layer<T> layer;           // conv and linear
  Terms<T> terms;           // terms
  Norm norm = {};           // affine, group_norm and norm
  std::vector<int64_t> channels = {};  // take: which, -1 for zeros; concat: how many of each input
};

enum class Loss { none, cross_entropy, mse, bce };

template <class T> struct Head {
  Loss loss = Loss::none;
  bool top5 = false;
  const int64_t* labels = nullptr;   // cross_entropy: [rows], each in [0, width)
  Rows<T> targets;                   // mse, bce: [rows][width]
  T* outputs = nullptr;              // none: [points][rows][width], with strides
  ptrdiff_t point_stride = 0, row_stride = 0;
};

// The steps on images, then those on rows, then the head. Each list begins with terms, or, behind images, with flat.
template <class T> struct StepGraph {
  int64_t rows, points;
  std::vector<Step<T>> images, layers;
  int flat = 0;  // the step on images that is flattened
  bool winograd = true;  // where it pays; off: never, for tests
  Head<T> head;

  int64_t result() const { return layers.back().out.count(); }  // what the head gets
};

// For each step the last one that reads its value, or -1; for the one that is kept, the number of steps.
template <class T> std::vector<int> last_uses(const std::vector<Step<T>>& steps, int kept) {
  std::vector<int> last(steps.size(), -1);
  for (size_t s = 0; s < steps.size(); ++s)
    for (int i : steps[s].inputs) last[i] = int(s);
  if (!steps.empty()) last[kept] = int(steps.size());
  return last;
}

// sums: [points], unless the head writes outputs. The result does not depend on the number of threads.
template <class T> void run(const StepGraph<T>& chain, const Kernels<T>& kernels, Team& team, LossSums* sums);

}  // namespace modeconn
