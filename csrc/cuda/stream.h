// Packed weights on their way through shared memory: slab after slab, layer after layer, without a break between layers.
#pragma once
#include "tiles.h"

namespace modeconn::cuda {

// A ring of Stages slabs of at most SlabBytes. Slab n + Stages - 1 is fetched while slab n is multiplied.
template <int Stages, int SlabSteps, int SlabBytes> class Stream {
 public:
  static constexpr int bytes = Stages * SlabBytes;

  DEVICE Stream(const MlpParams& p, int point, char* ring) : p_(p), ring_(ring), from_(p.packed + point * p.point_bytes) {
    for (int i = 0; i < Stages - 1; ++i) fetch();
  }

  // The next slab, for all threads to read until they call this again.
  DEVICE const char* take() {
    device::wait_copies<Stages - 2>();  // this thread's part of the slab is there
    device::fence_copies();
    device::sync_block();               // every thread's is, and none reads the slab before it any more
    fetch();
    return ring_ + (taken_++ % Stages) * SlabBytes;
  }

 private:
  DEVICE void fetch() {
    if (layer_ < p_.layer_count) {
      const PackedLayer& layer = p_.layers[layer_];
      const int bytes = SlabSteps * step_bytes * layer.padded;
      char* to = ring_ + (fetched_ % Stages) * SlabBytes;
      for (int at = device::thread() * 16; at < bytes; at += threads * 16) device::copy_async(to + at, from_ + at);
      from_ += bytes;
      step_ += SlabSteps;
      if (step_ >= layer.steps) step_ = 0, ++layer_;
    }
    ++fetched_;
    device::commit_copies();  // empty groups at the end keep the count right
  }

  const MlpParams& p_;
  char* ring_;
  const char* from_;
  int layer_ = 0, step_ = 0, fetched_ = 0, taken_ = 0;
};

}  // namespace modeconn::cuda
