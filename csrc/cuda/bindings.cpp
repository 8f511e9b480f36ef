// The Python module modeconn._cuda: checks numbers and addresses, builds a chain, launches it. No header of PyTorch: tensors
// come as addresses, and modeconn/backends/cuda.py, the only importer, vouches for their sizes, types and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "launch.h"

namespace py = pybind11;

namespace modeconn::cuda {
namespace {

template <class... A> [[noreturn]] void refuse(const A&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw py::value_error(text.str());
}

template <size_t Count> int index_of(const std::string& name, const char* what, const char* const (&names)[Count]) {
  std::string all;
  for (size_t i = 0; i < Count; ++i) {
    if (name == names[i]) return int(i);
    all += (i ? ", " : "") + std::string(names[i]);
  }
  refuse(what, " must be one of ", all, ", got '", name, "'");
}

Act activation(const std::string& name) {
  Act found;
  std::string known;
  if (!find_activation(name, true, found, known)) refuse("activation must be one of ", known, ", got '", name, "'");
  return found;
}

template <class T> const T* address(uint64_t value, const std::string& what, bool needed = true) {
  if (needed && !value) refuse(what, " must be the address of something, got 0");
  if (value % alignof(T)) refuse(what, " must be aligned to ", alignof(T), " bytes, got address ", value);
  return reinterpret_cast<const T*>(value);
}

void check_range(const std::string& what, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) refuse(what, " must be in ", least, "..", most, ", got ", value);
}

// {address, number of tensors, address of the coefficients}
using GivenBlend = std::tuple<uint64_t, int, uint64_t>;

Blend blend(const GivenBlend& given, const std::string& what, bool needed) {
  const auto& [tensors, count, coefficients] = given;
  check_range("the number of " + what, count, needed ? 1 : 0, 1 << 20);
  return {address<float>(tensors, what, count > 0), address<double>(coefficients, "coefficients of " + what, count > 0), count};
}

Layer layer(const py::dict& d, int index, int depth) {
  const std::string what = "layers[" + std::to_string(index) + "]";
  for (const char* key : {"weights", "biases", "units", "depth", "activation", "slope", "scale", "shift"})
    if (!d.contains(key)) refuse(what, " must have '", key, "'");
  Layer l;
  l.units = py::cast<int>(d["units"]), l.depth = py::cast<int>(d["depth"]);
  check_range(what + ".units", l.units, 1, max_width);
  if (l.depth != depth) refuse(what, ".depth must be ", depth, ", the width before it, got ", l.depth);
  l.weights = blend(py::cast<GivenBlend>(d["weights"]), what + ".weights", true);
  l.biases = blend(py::cast<GivenBlend>(d["biases"]), what + ".biases", false);
  const auto scale = py::cast<uint64_t>(d["scale"]), shift = py::cast<uint64_t>(d["shift"]);
  if (!scale != !shift) refuse(what, " must have both scale and shift or none, got addresses ", scale, " and ", shift);
  l.scale = address<double>(scale, what + ".scale", false), l.shift = address<double>(shift, what + ".shift", false);
  l.act = activation(py::cast<std::string>(d["activation"]));
  l.slope = py::cast<float>(d["slope"]);
  return l;
}

struct Prepared {
  Chain chain;
  int device;
};

Prepared prepare(int64_t rows, int points, int width, const std::vector<uint64_t>& terms, uint64_t coefficients, const py::list& layers,
                 uint64_t labels, const std::string& act, float slope, bool top5, const std::string& precision,
                 const std::string& variant, int device) {
  Prepared p{{}, device};
  Chain& c = p.chain;
  check_range("rows", c.rows = rows, 0, int64_t(1) << 40);
  check_range("points", c.points = points, 0, 1 << 24);
  check_range("width", c.width = width, 1, max_width);
  check_range("the number of terms", c.term_count = int(terms.size()), 1, max_terms);
  check_range("the number of layers", c.layer_count = int(py::len(layers)), 0, max_layers);
  if ((rows + tile_rows - 1) / tile_rows * points >= int64_t(1) << 31) refuse("rows / 128 * points must be below 2^31, got rows ", rows, " and points ", points);
  for (size_t j = 0; j < terms.size(); ++j) c.terms[j] = address<float>(terms[j], "terms[" + std::to_string(j) + "]", rows > 0);
  c.coefficients = address<double>(coefficients, "coefficients", points > 0);
  c.labels = address<int64_t>(labels, "labels", rows > 0);
  c.act = activation(act), c.slope = slope, c.top5 = top5;
  for (int l = 0; l < c.layer_count; ++l) c.layers[l] = layer(py::cast<py::dict>(layers[size_t(l)]), l, l ? c.layers[l - 1].units : width);
  c.precision = Precision(index_of(precision, "precision", {"float32", "tf32", "bf16"}));
  std::string problem;
  check_range("device", device, 0, int64_t(device_count(problem)) - 1);
  const int chosen = index_of(variant, "variant", {"mma", "wgmma", "auto"});
  c.variant = chosen == 2 ? best_variant(device, c.precision) : Variant(chosen);
  if (c.variant == Variant::wgmma && c.precision == Precision::float32) refuse("variant 'wgmma' is for tf32 and bf16, got precision 'float32'");
  if (const std::string reason = cannot_run(device, c); !reason.empty()) refuse(reason);
  return p;
}

}  // namespace
}  // namespace modeconn::cuda

using namespace modeconn::cuda;

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA part of modeconn; use it through the backend \"cuda\".";
  module.attr("emulated") = emulated();
  module.attr("max_width") = max_width;
  module.attr("max_layers") = max_layers;
  module.attr("max_terms") = max_terms;
  module.attr("architectures") = MODECONN_CUDA_ARCHS;
  module.def("activations", [] {
    std::vector<std::string> names;
    for (const modeconn::ActivationRow& row : modeconn::activation_rows)
      if (row.cuda) names.push_back(row.name);
    return names;
  }, "The activations of the kernels, in the order of the table.");
  module.def("device_count", [] {
    std::string problem;
    const int count = device_count(problem);
    return py::make_tuple(count, problem);
  }, "How many devices CUDA finds, and why it finds none, if it says so.");
  py::class_<Prepared>(module, "Chain", py::module_local(), "A chain of linear layers under cross-entropy, checked: what to compute, where, and how.")
      .def(py::init(&prepare), py::kw_only(), py::arg("rows"), py::arg("points"), py::arg("width"), py::arg("terms"), py::arg("coefficients"),
           py::arg("layers"), py::arg("labels"), py::arg("activation"), py::arg("slope"), py::arg("top5"), py::arg("precision"),
           py::arg("variant"), py::arg("device"))
      .def_property_readonly("workspace_bytes", [](const Prepared& p) { return plan(p.chain).bytes; })
      .def_property_readonly("variant", [](const Prepared& p) { return p.chain.variant == Variant::wgmma ? "wgmma" : "mma"; })
      .def("mlp_sums", [](const Prepared& p, uint64_t workspace, int64_t workspace_bytes, uint64_t sums, uint64_t stream) {
        const int64_t needed = plan(p.chain).bytes;
        if (workspace_bytes < needed) refuse("the workspace must have ", needed, " bytes, got ", workspace_bytes);
        if (workspace % 128) refuse("the workspace must be aligned to 128 bytes, got address ", workspace);
        auto* out = const_cast<double*>(address<double>(sums, "sums", p.chain.points > 0));
        py::gil_scoped_release release;
        run(p.chain, p.device, reinterpret_cast<char*>(workspace), out, reinterpret_cast<void*>(stream));
      }, py::kw_only(), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("sums"), py::arg("stream"),
           "Launches on the stream what writes float64 sums [points, 3]: loss, errors, top-5 errors.");
}
