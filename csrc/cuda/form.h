// Two small kernels around the chain: one materializes and packs the weights of every point before it, one adds up its sums.
#pragma once
#include "tiles.h"

namespace modeconn::cuda {

// Coefficients of 0 leave their tensor out, and a lone 1 keeps every bit.
DEVICE float blended(const Blend& b, int point, int64_t size, int64_t index) {
  const double* c = b.coefficients + int64_t(point) * b.count;
  float total = 0;
  bool none = true;
  for (int k = 0; k < b.count; ++k) {
    const float weight = float(c[k]), value = weight == 0 ? 0 : b.tensors[k * size + index];
    if (weight == 0) continue;
    total = none ? weight * value : fmaf(weight, value, total);
    none = false;
  }
  return total;
}

// One layer's weights and biases at all points, each point by `blocks / points` blocks.
inline KERNEL(threads) form_kernel(const GRID_CONSTANT FormParams f) {
  const Layer& layer = f.layer;
  const int each = int(device::blocks() / f.points), point = int(device::block() / each);
  const int units = f.packed.padded, depth = padded_depth(layer.depth, f.variant);
  char* weights = f.weights + point * f.point_bytes;
  float* biases = reinterpret_cast<float*>(reinterpret_cast<char*>(f.biases) + point * f.point_bytes);
  const int first = int(device::block() % each) * threads + device::thread();

  for (int i = first; i < units * depth; i += each * threads) {
    const int unit = i / depth, column = i % depth;
    float value = 0;
    if (unit < layer.units && column < layer.depth) {
      value = blended(layer.weights, point, int64_t(layer.units) * layer.depth, int64_t(unit) * layer.depth + column);
      if (layer.scale) value *= float(layer.scale[int64_t(point) * layer.units + unit]);
    }
    char* to = weights + packed_offset(unit, column, units, f.precision, f.variant);
    if (f.precision == Precision::bf16) *reinterpret_cast<uint16_t*>(to) = device::to_bf16(value);
    else if (f.precision == Precision::tf32) *reinterpret_cast<uint32_t*>(to) = device::to_tf32(value);
    else *reinterpret_cast<float*>(to) = value;
  }
  for (int unit = first; unit < units; unit += each * threads) {
    float value = unit < layer.units ? blended(layer.biases, point, layer.units, unit) : 0;
    if (layer.scale && unit < layer.units) {
      const int64_t at = int64_t(point) * layer.units + unit;
      value = float(layer.scale[at] * value + layer.shift[at]);
    }
    biases[unit] = value;
  }
}

// sums[point][i] = Σ_tile partial[point][tile][i], one block of a warp per point, always in the same order.
inline KERNEL(32) sum_kernel(const double* partial, int64_t tiles, double* sums) {
  const double* of_point = partial + device::block() * tiles * 3;
  for (int i = 0; i < 3; ++i) {
    double total = 0;
    for (int64_t tile = device::lane(); tile < tiles; tile += 32) total += of_point[tile * 3 + i];
    for (int mask = 16; mask; mask /= 2) total += device::shuffle_xor(total, mask);
    if (device::lane() == 0) sums[device::block() * 3 + i] = total;
  }
}

}  // namespace modeconn::cuda
