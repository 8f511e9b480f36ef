// The head: loss, error and top-5 error of a tile's logits, which never leave shared memory.
#pragma once
#include "device.h"
#include "params.h"

namespace modeconn::cuda {

// Whether the value at index i ranks above the one at index j: NaN above all numbers, the first of equals above the others.
DEVICE bool ranks_above(float x, int i, float y, int j) {
  const bool nan_x = x != x, nan_y = y != y;
  const bool greater = x > y || (nan_x && !nan_y), equal = x == y || (nan_x && nan_y);
  return greater || (equal && i < j);
}

template <class T> DEVICE T sum_of_quad(T value) {
  value += device::shuffle_xor(value, 1);
  return value + device::shuffle_xor(value, 2);
}

struct Sums {
  double of[3] = {};  // loss, errors, top-5 errors
};

// Adds one row, whose classes its four threads share. loss = log1p(Σ_{c ≠ argmax} exp(x_c - max)) + (max - x_label): nothing
// cancels. An infinite or NaN maximum gives NaN, a label at -infinity gives infinity.
DEVICE void add_row(const float* logits, int classes, int label, bool top5, bool counts, Sums& sums) {
  const int thread = device::lane() % 4;
  float max = -INFINITY;
  int best = INT32_MAX;
  for (int c = thread; c < classes; c += 4)
    if (ranks_above(logits[c], c, max, best)) max = logits[c], best = c;
  for (int mask = 1; mask < 4; mask *= 2) {
    const float other = device::shuffle_xor(max, mask);
    const int index = device::shuffle_xor(best, mask);
    if (ranks_above(other, index, max, best)) max = other, best = index;
  }
  const float own = logits[label];
  float sum = 0;
  int above = 0;
  for (int c = thread; c < classes; c += 4) {
    if (c != best) sum += expf(logits[c] - max);
    above += ranks_above(logits[c], c, own, label);
  }
  sum = sum_of_quad(sum);
  above = sum_of_quad(above);
  if (!counts || thread != 0) return;
  sums.of[0] += double(log1pf(sum) + (max - own) + (max - max));
  sums.of[1] += best != label;
  if (top5) sums.of[2] += above >= 5;
}

// The block's sums, in an order that never changes. `scratch`: 3 doubles a warp.
DEVICE void write_sums(Sums sums, double* scratch, double* out) {
  for (double& value : sums.of)
    for (int mask = 16; mask; mask /= 2) value += device::shuffle_xor(value, mask);
  if (device::lane() == 0)
    for (int i = 0; i < 3; ++i) scratch[device::warp() * 3 + i] = sums.of[i];
  device::sync_block();
  if (device::thread() < 3) {
    double total = 0;
    for (int warp = 0; warp < threads / 32; ++warp) total += scratch[warp * 3 + device::thread()];
    out[device::thread()] = total;
  }
}

}  // namespace modeconn::cuda
