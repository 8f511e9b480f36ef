// Activations. Those that are one or two instructions are applied in registers, the others in a pass of their own: inlined
// for every accumulator they would be most of the code.
#pragma once
#include "device.h"
#include "params.h"

namespace modeconn::cuda {

HOST_DEVICE constexpr bool fused(Act act) { return act == Act::identity || act == Act::relu || act == Act::leaky_relu; }

DEVICE float apply_fused(Act act, float slope, float x) {
  return act == Act::identity || !(x < 0) ? x : act == Act::relu ? 0.f : x * slope;  // NaN stays NaN
}

DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

DEVICE float apply(Act act, float slope, float x) {
  switch (act) {
    case Act::tanh: return tanhf(x);
    case Act::gelu: return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case Act::gelu_tanh: return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Act::silu: return x * sigmoid(x);
    case Act::sigmoid: return sigmoid(x);
    default: return apply_fused(act, slope, x);
  }
}

}  // namespace modeconn::cuda
