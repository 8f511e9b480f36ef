// A layer's product by wgmma: two warpgroups of 64 rows, each with all units. A warp's 16 rows are its own.
#pragma once
#include "stream.h"

namespace modeconn::cuda {

template <Precision P, int Width> class WgmmaProduct {
  static_assert(P != Precision::float32, "three products need more accumulators than there are registers");

 public:
  static constexpr Precision precision = P;
  static constexpr int width = Width, slab_steps = 4;
  static constexpr int elements = P == Precision::bf16 ? 2 : 1;  // of a register of a fragment
  static constexpr int stride = Width + 4;
  using Weights = Stream<3, slab_steps, slab_steps * step_bytes * Width>;

  DEVICE static void sync() { device::sync_warp(); }

  DEVICE void begin(const float* values, const PackedLayer& layer) {
    sync();
#pragma unroll
    for (int i = 0; i < Width / 2; ++i) sum_[i] = 0;
    load(values, 0);
    convert();
    padded_ = layer.padded;
  }

  DEVICE void slab(const float* values, const char* weights, int step, const PackedLayer& layer) {
    if (layer.padded == Width) product<Width>(values, weights, step, layer);
    else product<64>(values, weights, step, layer);
  }

  template <class F> DEVICE void results(F&& f) const {
    const int row = device::warp() * 16 + device::lane() / 4, column = device::lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < Width / 8; ++j)
      if (j * 8 < padded_) {
        f(row, column + j * 8, sum_[j * 4], sum_[j * 4 + 1]);
        f(row + 8, column + j * 8, sum_[j * 4 + 2], sum_[j * 4 + 3]);
      }
  }

 private:
  template <int N> DEVICE void product(const float* values, const char* weights, int step, const PackedLayer& layer) {
    device::wgmma_begin();
#pragma unroll
    for (int s = 0; s < slab_steps; ++s) {
      const uint32_t address = device::shared_address(weights + s * step_bytes * N);
      device::wgmma<N, P == Precision::bf16>(sum_, a_[s], descriptor(address, N));
    }
    device::wgmma_end();
    // The rows do not change before the layer's end: these loads are hidden behind the products. The fragments are made of
    // them after the wait, since the products read their registers until then.
    load(values, step + slab_steps < layer.steps ? step + slab_steps : 0);
    device::wgmma_wait();
    convert();
  }

  DEVICE void load(const float* values, int step) {
    const float* row = values + (device::warp() * 16 + device::lane() / 4) * stride + step / steps_per_group(P) * group;
#pragma unroll
    for (int s = 0; s < slab_steps; ++s)
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int e = 0; e < elements; ++e) {
          const int at = P == Precision::bf16 ? s / 2 * group + pair_column(device::lane() % 4, s % 2 * 2 + k / 2) + e
                                              : pair_column(device::lane() % 4, s) + k / 2;
          next_[s][k][e] = row[k % 2 * 8 * stride + at];
        }
  }

  DEVICE void convert() {
#pragma unroll
    for (int s = 0; s < slab_steps; ++s)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (P == Precision::bf16) a_[s][k] = device::to_bf16(next_[s][k][0], next_[s][k][1]);
        else a_[s][k] = device::to_tf32(next_[s][k][0]);
      }
  }

  float sum_[Width / 2];
  uint32_t a_[slab_steps][4];
  float next_[slab_steps][4][elements];
  int padded_;
};

}  // namespace modeconn::cuda
