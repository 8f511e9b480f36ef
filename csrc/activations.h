// The table of activations, for the CPU's kernels and CUDA's. Its rows are those of modeconn/backends/activations.py, in the
// same order: Python compares the names when an extension loads. Bodies: cpu/bodies/math.h and cuda/activation.h.
#pragma once
#include <string>

namespace modeconn {

// X(name, in_registers, cuda)
//   in_registers  a product's tile on the CPU applies it to its accumulators; the others are a pass over the finished panel,
//                 since inlined for every accumulator they would be most of the code
//   cuda          the CUDA kernels have it
#define MODECONN_ACTIVATIONS(X) \
  X(identity, true, true)       \
  X(relu, true, true)           \
  X(leaky_relu, true, true)     \
  X(tanh, false, true)          \
  X(gelu, false, true)          \
  X(gelu_tanh, false, true)     \
  X(silu, false, true)          \
  X(sigmoid, false, true)       \
  X(relu6, true, false)         \
  X(hardsigmoid, false, false)  \
  X(hardswish, false, false)    \
  X(elu, false, false)          \
  X(selu, false, false)         \
  X(softplus, false, false)     \
  X(mish, false, false)         \
  X(log_sigmoid, false, false)

enum class Act : int {
#define MODECONN_ROW(name, in_registers, cuda) name,
  MODECONN_ACTIVATIONS(MODECONN_ROW)
#undef MODECONN_ROW
};

struct ActivationRow {
  const char* name;
  bool in_registers, cuda;
};

constexpr ActivationRow activation_rows[] = {
#define MODECONN_ROW(name, in_registers, cuda) {#name, in_registers, cuda},
    MODECONN_ACTIVATIONS(MODECONN_ROW)
#undef MODECONN_ROW
};

// Finds an activation by its name; false, and all names in `known`, if there is none.
inline bool find_activation(const std::string& name, bool cuda, Act& found, std::string& known) {
  int index = 0;
  for (const ActivationRow& row : activation_rows) {
    if (!cuda || row.cuda) {
      if (name == row.name) return found = Act(index), true;
      known += (known.empty() ? "" : ", ") + std::string(row.name);
    }
    ++index;
  }
  return false;
}

}  // namespace modeconn
