// A chain of layers at many points of a path: what to compute. How is in chain.cpp and images.h; nothing here knows a CPU.
#pragma once
#include <cstdint>
#include <vector>

#include "../cpu/context.h"
#include "team.h"

namespace modeconn {

// W(t) = sum_g c[t, g] W_g and b(t) likewise; y = act(scale(t) (W(t) x + b(t)) + shift(t)).
template <class T> struct Layer {
  int64_t units, depth;
  int64_t taps = 1;                // of a convolution's kernel: depth is channels * taps, packed as taps * channels
  std::vector<Rows<T>> weights;    // one per control point, [units][depth]
  std::vector<const T*> biases;    // one per control point, or none
  const double* coefficients;      // [points][weights.size()]
  const double* bias_coefficients; // [points][biases.size()]
  Activation act;
  const double *scale = nullptr, *shift = nullptr;  // both or none: [points][units], a norm folded into the weights
  bool biased() const { return !biases.empty() || shift; }
};

struct Image {
  int64_t channels, height, width;
  int64_t pixels() const { return height * width; }
  int64_t count() const { return channels * pixels(); }
};

// Of a convolution or a pooling: {vertical, horizontal}; the padding is on both sides.
struct Window {
  int64_t kernel[2], stride[2], padding[2];
  int64_t taps() const { return kernel[0] * kernel[1]; }
  bool apart() const { return stride[0] >= kernel[0] && stride[1] >= kernel[1] && !padding[0] && !padding[1]; }
};

enum class Op { conv, max_pool, avg_pool };

template <class T> struct ImageStep {
  Op op;
  Window window;
  Image in, out;
  Layer<T> layer;  // of a convolution
};

enum class Loss { none, cross_entropy, mse };

template <class T> struct Head {
  Loss loss = Loss::none;
  bool top5 = false;
  const int64_t* labels = nullptr;   // cross_entropy: [rows], each in [0, width)
  Rows<T> targets;                   // mse: [rows][width]
  T* outputs = nullptr;              // none: [points][rows][width], with strides
  ptrdiff_t point_stride = 0, row_stride = 0;
};

// x(t) = act(sum_j c[t, j] V_j), then the steps on images, if any, then the layers, then the head.
template <class T> struct Chain {
  int64_t rows, points, width;
  std::vector<Rows<T>> terms;      // V_j: [rows][width]; with steps each row is an image [channels][height][width]
  const double* coefficients;      // [points][terms.size()]
  Activation act;
  std::vector<ImageStep<T>> steps;
  std::vector<Layer<T>> layers;
  Head<T> head;

  int64_t flat() const { return steps.empty() ? width : steps.back().out.count(); }  // what the layers get
  int64_t result() const { return layers.empty() ? flat() : layers.back().units; }   // what the head gets
};

// sums: [points], unless the head writes outputs. The result does not depend on the number of threads.
template <class T> void run(const Chain<T>& chain, const Kernels<T>& kernels, Team& team, LossSums* sums);

}  // namespace modeconn
