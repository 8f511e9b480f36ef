// The Python module modeconn._native: every argument is checked here, the engine trusts what it gets. modeconn/_native.pyi
// states its signatures for type checkers; modeconn/backends/native/extension.py is its only importer.
#include "bind_steps.h"
#include "cpu/context.h"
#include "engine/chain.h"
#include "engine/statistics.h"

namespace modeconn {
namespace {

struct Options {
  std::string activation;
  double slope;
  int threads;
  const Context& context;
  bool winograd = true;
};

template <class T>
StepGraph<T> training_chain(const py::sequence& terms, const py::array& c, const py::sequence& layers, const Options& o) {
  StepReader<T> reader(terms, c, activation(o.activation, o.slope));
  for (const auto& l : layers) reader.read(l);
  StepGraph<T> built = reader.finish();
  built.winograd = o.winograd;
  return built;
}

template <class T>
StepGraph<T> chain(const py::sequence& terms, const py::array& c, const py::sequence& layers, const Options& o) {
  StepGraph<T> built = training_chain<T>(terms, c, layers, o);
  if (norm_channels(built)) refuse("batch_norm must be one of chain_statistics' layers; elsewhere a norm is the scale and shift of a layer");
  return built;
}

// Without the GIL, except for a look at the signals about every 50 ms.
template <class Run> void released(const Options& o, Run&& run) {
  try {
    py::gil_scoped_release release;
    Team team(o.threads, [] {
      py::gil_scoped_acquire acquire;
      return PyErr_CheckSignals() != 0;
    });
    run(team);
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

// Rows are written by several threads: no two of [points, rows, width] may share memory.
void refuse_overlap(const py::array& out, int64_t width) {
  if (!out.size()) return;
  int64_t taken = width * out.itemsize();  // bytes from the first to the last of what lies inside
  std::pair<int64_t, int64_t> axes[2] = {{std::abs(out.strides(0)), out.shape(0)}, {std::abs(out.strides(1)), out.shape(1)}};
  if (axes[0].second == 1 || (axes[1].second > 1 && axes[0].first > axes[1].first)) std::swap(axes[0], axes[1]);
  for (auto [stride, count] : axes) {
    if (count > 1 && stride < taken) refuse("rows of out must not overlap, got strides of ", out.strides(0), " and ", out.strides(1), " bytes");
    taken += (count - 1) * stride;
  }
}

template <class T>
void outputs_of(const py::sequence& terms, const py::array& c, const py::sequence& layers, const py::array& out, const Options& o) {
  StepGraph<T> built = chain<T>(terms, c, layers, o);
  built.head.outputs = const_cast<T*>(checked<T>(out, "out", {built.points, built.rows, built.result()}));
  if (!out.writeable()) refuse("out must be writable");
  built.head.point_stride = out.strides(0) / ptrdiff_t(sizeof(T));
  built.head.row_stride = out.strides(1) / ptrdiff_t(sizeof(T));
  refuse_overlap(out, built.result());
  released(o, [&](Team& team) { run(built, o.context.kernels<T>(), team, nullptr); });
}

template <class T>
py::array_t<double> sums_of(const py::sequence& terms, const py::array& c, const py::sequence& layers, const py::array& targets,
                            const std::string& loss, bool top5, const Options& o) {
  StepGraph<T> built = chain<T>(terms, c, layers, o);
  if (loss == "cross_entropy") {
    built.head.loss = Loss::cross_entropy;
    built.head.top5 = top5;
    built.head.labels = checked<int64_t>(targets, "targets", {built.rows});
    for (int64_t i = 0; i < built.rows; ++i)
      if (int64_t label = built.head.labels[i]; label < 0 || label >= built.result())
        refuse("targets must be classes in [0, ", built.result(), "), got ", label, " at row ", i);
  } else if (loss == "mse" || loss == "bce") {
    if (top5) refuse("top5 goes with loss 'cross_entropy' only, got '", loss, "'");
    built.head.loss = loss == "mse" ? Loss::mse : Loss::bce;
    built.head.targets = rows<T>(targets, "targets", built.rows, built.result());
  } else {
    refuse("loss must be 'cross_entropy', 'mse' or 'bce', got '", loss, "'");
  }
  static_assert(sizeof(LossSums) == 3 * sizeof(double));
  py::array_t<double> sums({built.points, int64_t(3)});
  auto* out = reinterpret_cast<LossSums*>(sums.mutable_data());
  released(o, [&](Team& team) { run(built, o.context.kernels<T>(), team, out); });
  return sums;
}

template <class T>
py::array_t<double> statistics_of(const py::sequence& terms, const py::array& c, const py::sequence& layers, const Options& o) {
  StepGraph<T> built = training_chain<T>(terms, c, layers, o);
  int64_t channels = norm_channels(built);
  if (!channels) refuse("layers must have a batch_norm");
  py::array_t<double> out({built.points, int64_t(2), channels});
  double* data = out.mutable_data();
  released(o, [&](Team& team) { statistics(built, o.context.kernels<T>(), team, data); });
  return out;
}

// The element type of the first term decides; every other array must agree.
template <class F> auto by_type(const py::sequence& terms, F&& f) {
  if (py::len(terms) == 0) refuse("terms must not be empty");
  py::array first = array(terms[0], "terms[0]");
  if (py::isinstance<py::array_t<float>>(first)) return f(float());
  if (py::isinstance<py::array_t<double>>(first)) return f(double());
  refuse("terms must be float32 or float64, got ", shape_text(first));
}

Options options(const std::string& activation, double slope, int threads, const std::string& isa, bool winograd) {
  if (threads < 1 || threads > 1024) refuse("threads must be in 1..1024, got ", threads);
  return {activation, slope, threads, context(isa.c_str()), winograd};
}

}  // namespace
}  // namespace modeconn

PYBIND11_MODULE(_native, m) {
  using namespace modeconn;
  m.doc() = "The C++ engine of modeconn, as the backend \"native\" uses it.";
  m.def("isas", [] {
    const char* names[3];
    int n = supported_isas(names);
    return std::vector<std::string>(names, names + n);
  }, "The instruction sets this CPU runs, best first.");
  m.def("activations", [] {
    std::vector<std::string> names;
    for (const ActivationRow& row : activation_rows) names.push_back(row.name);
    return names;
  }, "The activations of the kernels, in the order of the table.");
  m.def("kernel_names", [](const std::string& isa) {
    const Context& c = context(isa.c_str());
    return py::make_tuple(c.isa, c.f32.name, c.f64.name);
  }, py::arg("isa") = "", "The instruction set in use and its float32 and float64 tiles.");
  m.def("chain_outputs",
        [](const py::sequence& terms, const py::array& coefficients, const py::sequence& layers, const py::array& out,
           const std::string& activation, double slope, int threads, const std::string& isa, bool winograd) {
          Options o = options(activation, slope, threads, isa, winograd);
          by_type(terms, [&](auto t) { outputs_of<decltype(t)>(terms, coefficients, layers, out, o); });
        },
        py::arg("terms"), py::arg("coefficients"), py::arg("layers"), py::arg("out"), py::kw_only(),
        py::arg("activation") = "identity", py::arg("slope") = 0.01, py::arg("threads") = 1, py::arg("isa") = "", py::arg("winograd") = true,
        "Writes the chain's outputs to out [points, rows, width].");
  m.def("chain_sums",
        [](const py::sequence& terms, const py::array& coefficients, const py::sequence& layers, const py::array& targets,
           const std::string& loss, bool top5, const std::string& activation, double slope, int threads, const std::string& isa,
           bool winograd) {
          Options o = options(activation, slope, threads, isa, winograd);
          return by_type(terms, [&](auto t) { return sums_of<decltype(t)>(terms, coefficients, layers, targets, loss, top5, o); });
        },
        py::arg("terms"), py::arg("coefficients"), py::arg("layers"), py::arg("targets"), py::kw_only(),
        py::arg("loss") = "cross_entropy", py::arg("top5") = false, py::arg("activation") = "identity", py::arg("slope") = 0.01,
        py::arg("threads") = 1, py::arg("isa") = "", py::arg("winograd") = true,
        "float64 [points, 3]: sums over the rows of loss, errors and (if asked) top-5 errors.");
  m.def("chain_statistics",
        [](const py::sequence& terms, const py::array& coefficients, const py::sequence& layers, const std::string& activation,
           double slope, int threads, const std::string& isa, bool winograd) {
          Options o = options(activation, slope, threads, isa, winograd);
          return by_type(terms, [&](auto t) { return statistics_of<decltype(t)>(terms, coefficients, layers, o); });
        },
        py::arg("terms"), py::arg("coefficients"), py::arg("layers"), py::kw_only(), py::arg("activation") = "identity",
        py::arg("slope") = 0.01, py::arg("threads") = 1, py::arg("isa") = "", py::arg("winograd") = true,
        "float64 [points, 2, channels]: mean and unbiased variance of what each batch_norm normalises.");
}
