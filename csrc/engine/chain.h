// A fully connected chain at many points of a path: what to compute. How is in chain.cpp; nothing here knows a CPU.
#pragma once
#include <cstdint>
#include <vector>

#include "../cpu/context.h"
#include "team.h"

namespace modeconn {

// W(t) = sum_g c[t, g] W_g and b(t) likewise; y = act(W(t) x + b(t)).
template <class T> struct Layer {
  int64_t units, depth;
  std::vector<Rows<T>> weights;    // one per control point, [units][depth]
  std::vector<const T*> biases;    // one per control point, or none
  const double* coefficients;      // [points][weights.size()]
  const double* bias_coefficients; // [points][biases.size()]
  Activation act;
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

// x(t) = act(sum_j c[t, j] V_j), then the layers, then the head.
template <class T> struct Chain {
  int64_t rows, points, width;
  std::vector<Rows<T>> terms;      // V_j: [rows][width]
  const double* coefficients;      // [points][terms.size()]
  Activation act;
  std::vector<Layer<T>> layers;
  Head<T> head;
};

// sums: [points], unless the head writes outputs. The result does not depend on the number of threads.
template <class T> void run(const Chain<T>& chain, const Kernels<T>& kernels, Team& team, LossSums* sums);

}  // namespace modeconn
