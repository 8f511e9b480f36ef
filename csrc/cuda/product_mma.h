// A layer's product by mma.sync: 8 warps as 2 × 4, each 64 rows times a quarter of the units.
#pragma once
#include "stream.h"

namespace modeconn::cuda {

// The part of x that tf32 keeps, and what is left of it; nothing is left of an infinity.
DEVICE void split(float x, uint32_t& high, uint32_t& low) {
  high = device::to_tf32(x);
  float rest = x == device::from_bits(high) ? 0.f : x - device::from_bits(high);
  low = device::to_tf32(rest);
}

template <Precision P, int Width> class MmaProduct {
 public:
  static constexpr Precision precision = P;
  static constexpr int width = Width, slab_steps = 2, tiles = Width / 32;  // of 8 units, a warp
  static constexpr int stride = Width + 4;  // of the activations: rows of a fragment start 4 banks apart
  using Weights = Stream<2, slab_steps, slab_steps * step_bytes * Width>;

  // Warps share rows and columns: what one writes others read.
  DEVICE static void sync() { device::sync_block(); }

  DEVICE void begin(const float*, const PackedLayer& layer) {
    tiles_ = layer.padded / 32;
#pragma unroll
    for (int j = 0; j < tiles; ++j)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 4; ++k) sum_[j][i][k] = 0;
  }

  DEVICE void slab(const float* values, const char* weights, int step, const PackedLayer& layer) {
    const int lane = device::lane(), first = device::warp() % 4 * tiles_;
#pragma unroll
    for (int s = 0; s < slab_steps; ++s, weights += step_bytes * layer.padded) {
      uint32_t a[4][4], rest[4][4];
      load(values, step + s, a, rest);
      const uint32_t* words = reinterpret_cast<const uint32_t*>(weights) + (first * 32 + lane) * 2;
#pragma unroll
      for (int j = 0; j < tiles; ++j)
        if (j < tiles_) {
          const uint32_t b[2] = {words[j * 64], words[j * 64 + 1]};
          multiply(sum_[j], a, rest, b);
        }
    }
  }

  template <class F> DEVICE void results(F&& f) const {
    const int row = device::warp() / 4 * 64 + device::lane() / 4, column = device::warp() % 4 * tiles_ * 8 + device::lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < tiles; ++j)
      if (j < tiles_)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          f(row + i * 16, column + j * 8, sum_[j][i][0], sum_[j][i][1]);
          f(row + i * 16 + 8, column + j * 8, sum_[j][i][2], sum_[j][i][3]);
        }
  }

 private:
  using Fragments = uint32_t[4][4];

  // Four fragments of 16 rows and a step's columns; a thread has rows r and r + 8.
  DEVICE static void load(const float* values, int step, Fragments& a, Fragments& rest) {
    const int per_group = steps_per_group(P), thread = device::lane() % 4;
    const float* row = values + (device::warp() / 4 * 64 + device::lane() / 4) * stride + step / per_group * group;
#pragma unroll
    for (int i = 0; i < 4; ++i, row += 16 * stride) {
      if constexpr (P == Precision::bf16) {
        const float* x = row + pair_column(thread, step % 2 * 2);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float* two = x + k % 2 * 8 * stride + k / 2 * 4;
          a[i][k] = device::to_bf16(two[0], two[1]);
        }
      } else {
        const float* x = row + pair_column(thread, step % 4);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float value = x[k % 2 * 8 * stride + k / 2];
          if constexpr (P == Precision::float32) split(value, a[i][k], rest[i][k]);
          else a[i][k] = device::to_tf32(value);
        }
      }
    }
  }

  DEVICE static void multiply(float (&sum)[4][4], const Fragments& a, const Fragments& rest, const uint32_t (&b)[2]) {
    if constexpr (P == Precision::bf16) device::mma_bf16(sum, a, b);
    if constexpr (P == Precision::tf32) device::mma_tf32(sum, a, b);
    if constexpr (P == Precision::float32) {
      uint32_t high[2], low[2];
      for (int k = 0; k < 2; ++k) split(device::from_bits(b[k]), high[k], low[k]);
      // The tensor cores truncate when they add to an accumulator: long sums are kept outside of them, and are rounded.
      float part[4][4] = {};
      device::mma_tf32(part, rest, high);
      device::mma_tf32(part, a, low);
      device::mma_tf32(part, a, high);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 4; ++k) sum[i][k] += part[i][k];
    }
  }

  float sum_[tiles][4][4];
  int tiles_;
};

}  // namespace modeconn::cuda
