// The fused chain: a block carries a tile of 128 samples through all layers at one point of the path, down to its sums.
//
// Shared memory:   activations [128][width + 4] floats | ring of weight slabs (its first bytes: the warps' sums, at the end)
#pragma once
#include "activation.h"
#include "head.h"
#include "product_mma.h"
#include "product_wgmma.h"

namespace modeconn::cuda {

constexpr int points_together = 8;  // go over a tile one after the other: its input and their weights are in L2 then

template <class Product> constexpr int shared_bytes() {
  return tile_rows * Product::stride * int(sizeof(float)) + Product::Weights::bytes;
}

// The point and tile of a block: points fastest, in groups.
DEVICE void place_of_block(const MlpParams& p, int& point, int64_t& tile) {
  const int64_t whole = p.tiles * points_together, first = device::block() / whole * points_together, in_group = device::block() % whole;
  const int together = int(p.points - first < points_together ? p.points - first : points_together);
  point = int(first + in_group % together);
  tile = in_group / together;
}

// act(Σ_j c_j V_j) of the tile, a warp's 16 rows by the warp. Terms with coefficient 0 are left out, rows and columns that do not exist are 0.
template <class Product> DEVICE void load_input(const MlpParams& p, int point, int64_t first_row, float* values) {
  const double* c = p.coefficients + int64_t(point) * p.term_count;
  for (int r = device::warp() * 16; r < device::warp() * 16 + 16; ++r) {
    float x[Product::width / 32];
    const bool exists = first_row + r < p.rows;
    bool none = true;
#pragma unroll
    for (float& value : x) value = 0;
    for (int j = 0; exists && j < p.term_count; ++j) {
      const float weight = float(c[j]), *row = p.terms[j] + (first_row + r) * p.width;
      if (weight == 0) continue;
#pragma unroll
      for (int i = 0; i < Product::width / 32; ++i) {
        const int column = i * 32 + device::lane();
        if (column < p.width) x[i] = none ? weight * row[column] : fmaf(weight, row[column], x[i]);
      }
      none = false;
    }
    const Act quick = fused(p.act) ? p.act : Act::identity;
#pragma unroll
    for (int i = 0; i < Product::width / 32; ++i) {
      const int column = i * 32 + device::lane();
      if (column < p.input_padded) values[r * Product::stride + column] = apply_fused(quick, p.slope, x[i]);
    }
    for (int column = device::lane(); !fused(p.act) && column < p.width; column += 32) {
      float& value = values[r * Product::stride + column];
      value = apply(p.act, p.slope, value);
    }
  }
}

template <class Product> DEVICE void finish_layer(const Product& product, const PackedLayer& layer, const float* biases, float* values) {
  Product::sync();  // no thread needs the layer's input any more
  const Act quick = fused(layer.act) ? layer.act : Act::identity;
  product.results([&](int row, int column, float x, float y) {
    float* to = values + row * Product::stride + column;
    to[0] = apply_fused(quick, layer.slope, x + biases[column]);
    to[1] = apply_fused(quick, layer.slope, y + biases[column + 1]);
  });
  if (fused(layer.act)) return;
  Product::sync();
  for (int r = device::warp() * 16; r < device::warp() * 16 + 16; ++r)
    for (int column = device::lane(); column < layer.padded; column += 32) {
      float& value = values[r * Product::stride + column];
      value = apply(layer.act, layer.slope, value);
    }
}

template <class Product> KERNEL(threads) mlp_kernel(const GRID_CONSTANT MlpParams p) {
  char* memory = device::shared_memory();
  float* values = reinterpret_cast<float*>(memory);
  char* ring = memory + tile_rows * Product::stride * sizeof(float);
  int point;
  int64_t tile;
  place_of_block(p, point, tile);
  typename Product::Weights weights(p, point, ring);
  load_input<Product>(p, point, tile * tile_rows, values);

  const float* biases = reinterpret_cast<const float*>(p.packed + point * p.point_bytes + p.bias_offset);
  Product product;
  for (int l = 0; l < p.layer_count; ++l) {
    const PackedLayer& layer = p.layers[l];
    product.begin(values, layer);
    for (int step = 0; step < layer.steps; step += Product::slab_steps) product.slab(values, weights.take(), step, layer);
    finish_layer(product, layer, biases + layer.biases, values);
  }

  device::sync_block();
  Sums sums;
  for (int r = device::warp() * 16 + device::lane() / 4, half = 0; half < 2; ++half, r += 8) {
    const int64_t row = tile * tile_rows + r;
    const int label = row < p.rows ? int(p.labels[row]) : 0;
    add_row(values + r * Product::stride, p.classes, label, p.top5, row < p.rows, sums);
  }
  write_sums(sums, reinterpret_cast<double*>(ring), p.partial + (point * p.tiles + tile) * 3);
}

}  // namespace modeconn::cuda
