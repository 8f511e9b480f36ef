// A chain of linear layers, for the host and for the kernels: plain numbers and addresses on the device.
#pragma once
#include <cstdint>

#include "../activations.h"

namespace modeconn::cuda {

constexpr int max_width = 256;  // of the input and of every layer
constexpr int max_layers = 64;
constexpr int max_terms = 16;   // of the input
constexpr int tile_rows = 128;  // samples that a block carries through all layers
constexpr int threads = 256;

// float32: three tf32 products per product, as exact as float32. The others round the operands, never the sums.
enum class Precision : int { float32, tf32, bf16 };

// The instructions that multiply: mma.sync (sm_80 and later), or wgmma (sm_90 alone).
enum class Variant : int { mma, wgmma };

// Σ_k coefficients[t][k] tensors[k]: tensors are [count][size], coefficients [points][count]. count may be 0.
struct Blend {
  const float* tensors = nullptr;
  const double* coefficients = nullptr;
  int count = 0;
};

// y = act(scale(t) (W(t) x + b(t)) + shift(t)), W [units][depth].
struct Layer {
  Blend weights, biases;
  const double *scale = nullptr, *shift = nullptr;  // both or none: [points][units]
  int units = 0, depth = 0;
  Act act = Act::identity;
  float slope = 0;  // of leaky_relu
};

// x(t) = act(Σ_j coefficients[t][j] terms[j]), then the layers, then cross-entropy against the labels.
struct Chain {
  int64_t rows = 0;
  int points = 0, width = 0;
  const float* terms[max_terms] = {};    // [rows][width] each, contiguous
  int term_count = 0;
  const double* coefficients = nullptr;  // [points][term_count]
  Act act = Act::identity;
  float slope = 0;
  Layer layers[max_layers];
  int layer_count = 0;
  const int64_t* labels = nullptr;  // [rows], each in [0, result())
  bool top5 = false;
  Precision precision = Precision::float32;
  Variant variant = Variant::mma;
  int result() const { return layer_count ? layers[layer_count - 1].units : width; }
};

// A layer as the kernel reads it.
struct PackedLayer {
  int padded;           // units that are computed: the others of them have weights of zero
  int steps;            // of the tensor cores along the depth, see tiles.h
  int biases;           // offset in a point's biases
  Act act;
  float slope;
};

// The layout of a chain's workspace: the packed weights and biases of each point, then the sums of each tile.
struct Workspace {
  int64_t point_bytes = 0;     // of a point's weights and biases
  int64_t bias_offset = 0;     // of the biases, in a point's bytes
  int64_t tiles = 0;
  int64_t partial_offset = 0;  // of double [points][tiles][3]
  int64_t bytes = 0;
  int kernel_width = 0;        // 128 or 256: the narrowest kernel that does
  int input_padded = 0;        // columns of the input that are set
  PackedLayer layers[max_layers] = {};
};

// The parameters of the chain's kernel.
struct MlpParams {
  int64_t rows, tiles;
  int points, width, term_count, layer_count, classes;
  const float* terms[max_terms];
  const double* coefficients;
  Act act;
  float slope;
  PackedLayer layers[max_layers];
  const int64_t* labels;
  bool top5;
  const char* packed;
  int64_t point_bytes, bias_offset;
  int input_padded;
  double* partial;
};

// The parameters of the kernel that forms a layer's weights at all points.
struct FormParams {
  Layer layer;
  PackedLayer packed;
  Precision precision;
  Variant variant;
  char* weights;        // of the first point
  float* biases;        // of the first point
  int64_t point_bytes;  // from one point to the next
  int points;
};

}  // namespace modeconn::cuda
