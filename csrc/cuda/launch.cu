#include "launch.h"

#include <algorithm>

#include "form.h"
#include "runtime.h"

namespace modeconn::cuda {
namespace {

constexpr int form_blocks = 16;  // of a layer at one point

int64_t aligned(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// Calls f with the precision as a compile-time constant.
template <class F> auto with_precision(Precision precision, F&& f) {
  switch (precision) {
    case Precision::tf32: return f(std::integral_constant<Precision, Precision::tf32>{});
    case Precision::bf16: return f(std::integral_constant<Precision, Precision::bf16>{});
    default: return f(std::integral_constant<Precision, Precision::float32>{});
  }
}

MlpParams params(const Chain& chain, const Workspace& w, char* workspace) {
  MlpParams p{};
  p.rows = chain.rows, p.tiles = w.tiles, p.points = chain.points, p.width = chain.width;
  p.term_count = chain.term_count, p.layer_count = chain.layer_count, p.classes = chain.result();
  std::copy_n(chain.terms, max_terms, p.terms);
  p.coefficients = chain.coefficients, p.act = chain.act, p.slope = chain.slope;
  std::copy_n(w.layers, max_layers, p.layers);
  p.labels = chain.labels, p.top5 = chain.top5;
  p.packed = workspace, p.point_bytes = w.point_bytes, p.bias_offset = w.bias_offset;
  p.input_padded = w.input_padded;
  p.partial = reinterpret_cast<double*>(workspace + w.partial_offset);
  return p;
}

}  // namespace

int device_count(std::string& problem) { return runtime::device_count(problem); }

bool emulated() { return runtime::emulated; }

Variant best_variant(int device, Precision precision) {
  const runtime::Device d = runtime::device(device);
  return d.major == 9 && d.minor == 0 && precision != Precision::float32 ? Variant::wgmma : Variant::mma;
}

std::string cannot_run(int device, const Chain& chain) {
  const runtime::Device d = runtime::device(device);
  const std::string name = "device " + std::to_string(device) + " has compute capability " + std::to_string(d.major) + "." + std::to_string(d.minor);
  if (d.major < 8) return name + ": expected 8.0 or later";
  if (chain.variant == Variant::wgmma && (d.major != 9 || d.minor != 0)) return name + ": wgmma needs 9.0";
  const int width = plan(chain).kernel_width;
  const int bytes = with_precision(chain.precision, [&](auto p) { return shared_bytes_of<p.value>(chain.variant, width); });
  if (bytes > d.shared_bytes)
    return name + " and " + std::to_string(d.shared_bytes) + " bytes of shared memory in a block: widths up to " + std::to_string(width) +
           " need " + std::to_string(bytes);
  return "";
}

Workspace plan(const Chain& chain) {
  Workspace w;
  int widest = chain.width;
  for (int l = 0; l < chain.layer_count; ++l) widest = std::max(widest, chain.layers[l].units);
  w.kernel_width = widest > 128 ? 256 : 128;
  w.input_padded = padded_depth(chain.width, chain.variant);
  int biases = 0;
  for (int l = 0; l < chain.layer_count; ++l) {
    const Layer& layer = chain.layers[l];
    const int padded = padded_units(layer.units, w.kernel_width, chain.variant);
    const int steps = padded_depth(layer.depth, chain.variant) / group * steps_per_group(chain.precision);
    w.layers[l] = {padded, steps, biases, layer.act, layer.slope};
    biases += padded;
    w.bias_offset += int64_t(steps) * padded * step_bytes;
  }
  w.point_bytes = aligned(w.bias_offset + biases * int64_t(sizeof(float)));
  w.tiles = (chain.rows + tile_rows - 1) / tile_rows;
  w.partial_offset = w.point_bytes * chain.points;
  w.bytes = w.partial_offset + aligned(w.tiles * chain.points * 3 * int64_t(sizeof(double)));
  return w;
}

void run(const Chain& chain, int device, char* workspace, double* sums, void* stream) {
  if (chain.points == 0) return;
  runtime::On on(device);
  const Workspace w = plan(chain);
  if (w.tiles > 0) {
    char* weights = workspace;
    for (int l = 0; l < chain.layer_count; ++l) {
      const PackedLayer& packed = w.layers[l];
      float* biases = reinterpret_cast<float*>(workspace + w.bias_offset) + packed.biases;
      const FormParams f{chain.layers[l], packed, chain.precision, chain.variant, weights, biases, w.point_bytes, chain.points};
      runtime::launch(form_kernel, "form_kernel", int64_t(chain.points) * form_blocks, threads, 0, stream, f);
      weights += int64_t(packed.steps) * packed.padded * step_bytes;
    }
    const MlpParams p = params(chain, w, workspace);
    with_precision(chain.precision, [&](auto precision) { launch_mlp<precision.value>(chain.variant, w.kernel_width, p, stream); });
  }
  const double* partial = reinterpret_cast<const double*>(workspace + w.partial_offset);
  runtime::launch(sum_kernel, "sum_kernel", int64_t(chain.points), 32, 0, stream, partial, w.tiles, sums);
}

}  // namespace modeconn::cuda
