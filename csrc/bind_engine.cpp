// Python's side of the engine: every argument is checked here, the engine trusts what it gets.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>

#include "bind_engine.h"
#include "cpu/context.h"
#include "engine/chain.h"

namespace py = pybind11;

namespace modeconn {
namespace {

template <class... A> [[noreturn]] void refuse(const A&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw py::value_error(text.str());
}

std::string shape_text(const py::array& a) {
  std::ostringstream text;
  text << "[";
  for (int i = 0; i < a.ndim(); ++i) text << (i ? ", " : "") << a.shape(i);
  text << "] " << std::string(py::str(a.dtype()));
  return text.str();
}

py::array array(const py::handle& object, const std::string& what) {
  if (!py::isinstance<py::array>(object))
    throw py::type_error(what + " must be a numpy array, got " + std::string(py::str(py::type::of(object))));
  return py::reinterpret_borrow<py::array>(object);
}

// Checks type, shape (-1: any) and that the last dimension is contiguous; other strides are free but whole elements.
template <class T> const T* checked(const py::array& a, const std::string& what, std::initializer_list<int64_t> shape) {
  bool good = py::isinstance<py::array_t<T>>(a) && a.ndim() == int(shape.size());
  int i = 0;
  for (auto s = shape.begin(); good && s != shape.end(); ++s, ++i) good = *s == -1 || *s == a.shape(i);
  if (!good) {
    std::ostringstream text;
    for (int64_t s : shape) text << (text.tellp() ? ", " : "") << (s < 0 ? "any" : std::to_string(s));
    refuse(what, " must be [", text.str(), "] ", std::string(py::str(py::dtype::of<T>())), ", got ", shape_text(a));
  }
  for (int d = 0; d < a.ndim() && a.size(); ++d)
    if (a.strides(d) % ssize_t(sizeof(T)) || (d + 1 == a.ndim() && a.shape(d) > 1 && a.strides(d) != ssize_t(sizeof(T))))
      refuse(what, " must be contiguous in its last dimension, got stride ", a.strides(d), " bytes in dimension ", d);
  if (a.size() && reinterpret_cast<uintptr_t>(a.data()) % alignof(T)) refuse(what, " must be aligned to its element size");
  return static_cast<const T*>(a.data());
}

template <class T> Rows<T> rows(const py::array& a, const std::string& what, int64_t n, int64_t width) {
  const T* data = checked<T>(a, what, {n, width});
  return {data, a.strides(0) / ptrdiff_t(sizeof(T))};
}

// Contiguous images, or kernels; their rows may have any stride.
template <class T> Rows<T> images(const py::array& a, const std::string& what, int64_t n, int64_t c, int64_t h, int64_t w) {
  const T* data = checked<T>(a, what, {n, c, h, w});
  auto size = ssize_t(sizeof(T));
  for (int d = 2; d > 0 && a.size(); size *= a.shape(d + 1), --d)
    if (a.shape(d) > 1 && a.strides(d) != size * a.shape(d + 1))
      refuse(what, " must be contiguous in all dimensions but the first, got stride ", a.strides(d), " bytes in dimension ", d);
  return {data, a.strides(0) / ptrdiff_t(sizeof(T))};
}

// Coefficients are read at every point: they must be dense.
const double* coefficients(const py::array& a, const std::string& what, int64_t points, int64_t count) {
  const double* data = checked<double>(a, what, {points, count});
  if (a.size() && a.strides(0) != ssize_t(count * sizeof(double))) refuse(what, " must be contiguous");
  return data;
}

Activation activation(const std::string& name, double slope) {
  static const char* names[] = {"identity", "relu", "leaky_relu", "tanh", "gelu", "gelu_tanh", "silu", "sigmoid"};
  for (int i = 0; i < 8; ++i)
    if (name == names[i]) return {Act(i), slope};
  refuse("activation must be identity, relu, leaky_relu, tanh, gelu, gelu_tanh, silu or sigmoid, got '", name, "'");
}

py::dict checked_dict(const py::handle& object, const std::string& what, const std::string& op, std::initializer_list<const char*> keys) {
  auto d = py::reinterpret_borrow<py::dict>(object);
  for (const auto& [key, value] : d) {
    auto name = py::cast<std::string>(py::str(key));
    bool known = name == "op";
    for (const char* k : keys) known |= name == k;
    if (!known) refuse(what, " (", op, ") has an unknown key '", name, "'");
  }
  return d;
}

// A linear layer, or with a kernel {height, width} a convolution of `channels` channels.
template <class T>
Layer<T> layer(const py::dict& d, const std::string& what, int64_t points, int64_t channels, int64_t* kernel = nullptr) {
  if (!d.contains("weights") || !d.contains("coefficients")) refuse(what, " must have weights and coefficients");
  Layer<T> l{};
  l.units = -1, l.depth = channels;
  for (const auto& w : py::cast<py::sequence>(d["weights"])) {
    std::string name = what + ".weights[" + std::to_string(l.weights.size()) + "]";
    py::array a = array(w, name);
    if (kernel) {
      l.weights.push_back(images<T>(a, name, l.units, channels, kernel[0], kernel[1]));
      kernel[0] = a.shape(2), kernel[1] = a.shape(3);
      l.taps = kernel[0] * kernel[1], l.depth = channels * l.taps;
      if (l.taps < 1) refuse(name, " must have a kernel of at least one tap, got ", shape_text(a));
    } else {
      l.weights.push_back(rows<T>(a, name, l.units, channels));
    }
    l.units = a.shape(0);
  }
  if (l.weights.empty()) refuse(what, ".weights must not be empty");
  if (l.units < 1) refuse(what, " must have at least one unit");
  if (d.contains("biases") && !d["biases"].is_none()) {
    for (const auto& b : py::cast<py::sequence>(d["biases"])) {
      std::string name = what + ".biases[" + std::to_string(l.biases.size()) + "]";
      l.biases.push_back(checked<T>(array(b, name), name, {l.units}));
    }
  }
  l.coefficients = coefficients(array(d["coefficients"], what + ".coefficients"), what + ".coefficients", points, int64_t(l.weights.size()));
  l.bias_coefficients = l.coefficients;
  if (d.contains("bias_coefficients") && !d["bias_coefficients"].is_none()) {
    std::string name = what + ".bias_coefficients";
    l.bias_coefficients = coefficients(array(d["bias_coefficients"], name), name, points, int64_t(l.biases.size()));
  } else if (!l.biases.empty() && l.biases.size() != l.weights.size()) {
    refuse(what, " without bias_coefficients must have as many biases as weights or none, got ", l.biases.size(), " and ", l.weights.size());
  }
  l.act = activation(d.contains("activation") ? py::cast<std::string>(d["activation"]) : "identity",
                     d.contains("slope") ? py::cast<double>(d["slope"]) : 0.01);
  if (d.contains("scale") != d.contains("shift")) refuse(what, " must have both scale and shift or none");
  if (d.contains("scale")) {
    l.scale = coefficients(array(d["scale"], what + ".scale"), what + ".scale", points, l.units);
    l.shift = coefficients(array(d["shift"], what + ".shift"), what + ".shift", points, l.units);
  }
  return l;
}

void pair(const py::dict& d, const char* key, const std::string& what, int64_t least, int64_t* out) {
  if (!d.contains(key)) return;
  auto values = py::cast<std::vector<int64_t>>(d[key]);
  if (values.size() != 2 || values[0] < least || values[1] < least || std::max(values[0], values[1]) > 1 << 20)
    refuse(what, ".", key, " must be two integers of at least ", least, ", got ", std::string(py::str(d[key])));
  out[0] = values[0], out[1] = values[1];
}

template <class T> ImageStep<T> image_step(const py::dict& d, const std::string& what, const std::string& op, int64_t points, const Image& in) {
  ImageStep<T> s{};
  s.in = s.out = in;
  int64_t* kernel = s.window.kernel;
  if (op == "conv2d") {
    checked_dict(d, what, op, {"weights", "biases", "coefficients", "bias_coefficients", "activation", "slope", "scale", "shift", "stride", "padding"});
    kernel[0] = kernel[1] = -1;
    s.op = Op::conv;
    s.layer = layer<T>(d, what, points, in.channels, kernel);
    s.out.channels = s.layer.units;
    s.window.stride[0] = s.window.stride[1] = 1;
  } else {
    checked_dict(d, what, op, {"kernel", "stride", "padding"});
    s.op = op == "max_pool2d" ? Op::max_pool : Op::avg_pool;
    if (!d.contains("kernel")) refuse(what, " (", op, ") must have a kernel");
    pair(d, "kernel", what, 1, kernel);
    std::copy_n(kernel, 2, s.window.stride);
  }
  pair(d, "stride", what, 1, s.window.stride);
  pair(d, "padding", what, 0, s.window.padding);
  int64_t size[2] = {in.height, in.width}, out[2];
  for (int i = 0; i < 2; ++i) {
    int64_t padding = s.window.padding[i];
    if (s.op != Op::conv && padding > kernel[i] / 2) refuse(what, ".padding of a pooling must be at most half its kernel, got ", padding, " and ", kernel[i]);
    if (size[i] + 2 * padding < kernel[i])
      refuse(what, ": the kernel must fit the padded image, got kernel ", kernel[0], "x", kernel[1], " for ", in.height, "x", in.width,
             " with padding ", s.window.padding[0], "x", s.window.padding[1]);
    out[i] = (size[i] + 2 * padding - kernel[i]) / s.window.stride[i] + 1;
  }
  s.out.height = out[0], s.out.width = out[1];
  return s;
}

// Adds layers[index] to the chain; `image`: what the steps so far give, while values are images.
template <class T> void add_layer(Chain<T>& chain, const py::handle& object, size_t index, std::optional<Image>& image) {
  std::string what = "layers[" + std::to_string(index) + "]";
  if (!py::isinstance<py::dict>(object)) throw py::type_error(what + " must be a dict");
  auto d = py::reinterpret_borrow<py::dict>(object);
  std::string op = d.contains("op") ? py::cast<std::string>(py::str(d["op"])) : "linear";
  if (op == "flatten") {
    checked_dict(d, what, op, {});
    image.reset();
  } else if (op == "linear") {
    checked_dict(d, what, op, {"weights", "biases", "coefficients", "bias_coefficients", "activation", "slope", "scale", "shift"});
    if (image)
      refuse(what, ": linear must come after flatten, got images of [", image->channels, ", ", image->height, ", ", image->width, "]");
    chain.layers.push_back(layer<T>(d, what, chain.points, chain.result()));
  } else if (op == "conv2d" || op == "max_pool2d" || op == "avg_pool2d") {
    if (!image) refuse(what, ": ", op, " must get images: terms [rows, channels, height, width] and no flatten before it");
    chain.steps.push_back(image_step<T>(d, what, op, chain.points, *image));
    image = chain.steps.back().out;
  } else {
    refuse(what, ".op must be linear, conv2d, max_pool2d, avg_pool2d or flatten, got '", op, "'");
  }
}

struct Options {
  std::string activation;
  double slope;
  int threads;
  const Context& context;
};

template <class T>
Chain<T> chain(const py::sequence& terms, const py::array& c, const py::sequence& layers, const Options& o) {
  Chain<T> chain{};
  chain.rows = chain.width = -1;
  std::optional<Image> image;
  if (array(terms[0], "terms[0]").ndim() == 4) image = Image{-1, -1, -1};
  for (const auto& term : terms) {
    std::string name = "terms[" + std::to_string(chain.terms.size()) + "]";
    py::array a = array(term, name);
    if (image) {
      chain.terms.push_back(images<T>(a, name, chain.rows, image->channels, image->height, image->width));
      image = Image{a.shape(1), a.shape(2), a.shape(3)};
    } else {
      chain.terms.push_back(rows<T>(a, name, chain.rows, chain.width));
    }
    chain.rows = a.shape(0), chain.width = image ? image->count() : a.shape(1);
  }
  if (chain.width < 1) refuse("terms must have at least one value in a row, got ", shape_text(array(terms[0], "terms[0]")));
  if (c.ndim() != 2) refuse("coefficients must be [points, terms], got ", shape_text(c));
  chain.points = c.shape(0);
  chain.coefficients = coefficients(c, "coefficients", -1, int64_t(chain.terms.size()));
  chain.act = activation(o.activation, o.slope);
  size_t index = 0;
  for (const auto& l : layers) add_layer(chain, l, index++, image);
  return chain;
}

// Without the GIL, except for a look at the signals about every 50 ms.
template <class T> void run_released(const Chain<T>& chain, const Options& o, LossSums* sums) {
  try {
    py::gil_scoped_release release;
    Team team(o.threads, [] {
      py::gil_scoped_acquire acquire;
      return PyErr_CheckSignals() != 0;
    });
    run(chain, o.context.kernels<T>(), team, sums);
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

template <class T>
void outputs_of(const py::sequence& terms, const py::array& c, const py::sequence& layers, const py::array& out, const Options& o) {
  Chain<T> built = chain<T>(terms, c, layers, o);
  built.head.outputs = const_cast<T*>(checked<T>(out, "out", {built.points, built.rows, built.result()}));
  if (!out.writeable()) refuse("out must be writable");
  built.head.point_stride = out.strides(0) / ptrdiff_t(sizeof(T));
  built.head.row_stride = out.strides(1) / ptrdiff_t(sizeof(T));
  if (built.rows > 1 && std::abs(built.head.row_stride) < built.result()) refuse("rows of out must not overlap");
  run_released(built, o, nullptr);
}

template <class T>
py::array_t<double> sums_of(const py::sequence& terms, const py::array& c, const py::sequence& layers, const py::array& targets,
                            const std::string& loss, bool top5, const Options& o) {
  Chain<T> built = chain<T>(terms, c, layers, o);
  if (loss == "cross_entropy") {
    built.head.loss = Loss::cross_entropy;
    built.head.top5 = top5;
    built.head.labels = checked<int64_t>(targets, "targets", {built.rows});
    for (int64_t i = 0; i < built.rows; ++i)
      if (int64_t label = built.head.labels[i]; label < 0 || label >= built.result())
        refuse("targets must be classes in [0, ", built.result(), "), got ", label, " at row ", i);
  } else if (loss == "mse") {
    if (top5) refuse("top5 goes with loss 'cross_entropy' only, got 'mse'");
    built.head.loss = Loss::mse;
    built.head.targets = rows<T>(targets, "targets", built.rows, built.result());
  } else {
    refuse("loss must be 'cross_entropy' or 'mse', got '", loss, "'");
  }
  static_assert(sizeof(LossSums) == 3 * sizeof(double));
  py::array_t<double> sums({built.points, int64_t(3)});
  run_released(built, o, reinterpret_cast<LossSums*>(sums.mutable_data()));
  return sums;
}

// The element type of the first term decides; every other array must agree.
template <class F> auto by_type(const py::sequence& terms, F&& f) {
  if (py::len(terms) == 0) refuse("terms must not be empty");
  py::array first = array(terms[0], "terms[0]");
  if (py::isinstance<py::array_t<float>>(first)) return f(float());
  if (py::isinstance<py::array_t<double>>(first)) return f(double());
  refuse("terms must be float32 or float64, got ", shape_text(first));
}

Options options(const std::string& activation, double slope, int threads, const std::string& isa) {
  if (threads < 1 || threads > 1024) refuse("threads must be in 1..1024, got ", threads);
  return {activation, slope, threads, context(isa.c_str())};
}

}  // namespace

void bind_engine(py::module_& m) {
  m.def("isas", [] {
    const char* names[3];
    int n = supported_isas(names);
    return std::vector<std::string>(names, names + n);
  }, "The instruction sets this CPU runs, best first.");
  m.def("kernel_names", [](const std::string& isa) {
    const Context& c = context(isa.c_str());
    return py::make_tuple(c.isa, c.f32.name, c.f64.name);
  }, py::arg("isa") = "", "The instruction set in use and its float32 and float64 tiles.");
  m.def("chain_outputs",
        [](const py::sequence& terms, const py::array& coefficients, const py::sequence& layers, const py::array& out,
           const std::string& activation, double slope, int threads, const std::string& isa) {
          Options o = options(activation, slope, threads, isa);
          by_type(terms, [&](auto t) { outputs_of<decltype(t)>(terms, coefficients, layers, out, o); });
        },
        py::arg("terms"), py::arg("coefficients"), py::arg("layers"), py::arg("out"), py::kw_only(),
        py::arg("activation") = "identity", py::arg("slope") = 0.01, py::arg("threads") = 1, py::arg("isa") = "",
        "Writes the chain's outputs to out [points, rows, width].");
  m.def("chain_sums",
        [](const py::sequence& terms, const py::array& coefficients, const py::sequence& layers, const py::array& targets,
           const std::string& loss, bool top5, const std::string& activation, double slope, int threads, const std::string& isa) {
          Options o = options(activation, slope, threads, isa);
          return by_type(terms, [&](auto t) { return sums_of<decltype(t)>(terms, coefficients, layers, targets, loss, top5, o); });
        },
        py::arg("terms"), py::arg("coefficients"), py::arg("layers"), py::arg("targets"), py::kw_only(),
        py::arg("loss") = "cross_entropy", py::arg("top5") = false, py::arg("activation") = "identity", py::arg("slope") = 0.01,
        py::arg("threads") = 1, py::arg("isa") = "",
        "float64 [points, 3]: sums over the rows of loss, errors and (if asked) top-5 errors.");
}

}  // namespace modeconn
