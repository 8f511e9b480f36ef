// The statistics of the batch for every norm of a network in training mode, at many points.
#pragma once
#include "chain.h"

namespace modeconn {

// The channels that `statistics` counts: those of all norms together, in the order of the steps.
template <class T> int64_t norm_channels(const StepGraph<T>& chain) {
  int64_t channels = 0;
  for (const auto* steps : {&chain.images, &chain.layers})
    for (const Step<T>& s : *steps)
      if (s.op == Op::norm) channels += s.in.channels;
  return channels;
}

// out: [points][2][norm_channels]: the mean and the unbiased variance of each channel over rows and pixels, more than one of
// them. The chain's head is not used. The result does not depend on the number of threads.
template <class T> void statistics(const StepGraph<T>& chain, const Kernels<T>& kernels, Team& team, double* out);

}  // namespace modeconn
