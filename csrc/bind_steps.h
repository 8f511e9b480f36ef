// Reads a step graph from the dicts that Python passes. Included by bind_engine.cpp alone.
#pragma once
#include "bind_arrays.h"

namespace modeconn {
namespace {

// Reads steps one by one; each is checked against the values before it.
template <class T> class StepReader {
 public:
  StepReader(const py::sequence& terms, const py::array& c, const Activation& act) {
    if (c.ndim() != 2) refuse("coefficients must be [points, terms], got ", shape_text(c));
    chain_.points = c.shape(0), chain_.rows = -1;
    read_terms(terms, c, "", act);
    if (values_[0].image) chain_.layers.push_back({Op::flat, {}, {}, {}, {}, {}, {}, {}});
  }

  void read(const py::handle& object) {
    what_ = "layers[" + std::to_string(values_.size() - 1) + "]";
    if (!py::isinstance<py::dict>(object)) throw py::type_error(what_ + " must be a dict");
    d_ = py::reinterpret_borrow<py::dict>(object);
    op_ = d_.contains("op") ? py::cast<std::string>(py::str(d_["op"])) : "linear";
    if (op_ == "flatten") flatten();
    else if (op_ == "linear") linear();
    else if (op_ == "conv2d" || op_ == "max_pool2d" || op_ == "avg_pool2d") window_step();
    else if (op_ == "batch_norm") norm();
    else if (op_ == "add") sum();
    else if (op_ == "multiply") multiply();
    else if (op_ == "affine") affine();
    else if (op_ == "group_norm") group_norm();
    else if (op_ == "take") take();
    else if (op_ == "concat") concat();
    else if (op_ == "terms") more_terms();
    else
      refuse(what_, ".op must be linear, conv2d, max_pool2d, avg_pool2d, batch_norm, affine, group_norm, flatten, add, multiply, take, ",
             "concat or terms, got '", op_, "'");
  }

  StepGraph<T> finish() {
    const Value& last = values_.back();
    if (last.image != !flattened_ && !chain_.images.empty())
      refuse("the last of the layers must be behind flatten, as others are; it gives ", text(last));
    if (last.image) chain_.flat = last.index, chain_.layers[0].out = {last.shape.count(), 1, 1};
    if (chain_.images.size() == 1) {  // nothing but terms: their rows are the output
      chain_.layers[0] = chain_.images[0];
      chain_.layers[0].out = {chain_.images[0].out.count(), 1, 1};
      chain_.images.clear();
    }
    return std::move(chain_);
  }

 private:
  struct Value {
    bool image;
    int index;  // of the step in its list
    Image shape;
  };

  static std::string text(const Value& v) {
    std::ostringstream text;
    if (v.image) text << "images of [" << v.shape.channels << ", " << v.shape.height << ", " << v.shape.width << "]";
    else text << "rows of " << v.shape.channels;
    return text.str();
  }

  void only(std::initializer_list<const char*> keys) const {
    for (const auto& [key, value] : d_) {
      auto name = py::cast<std::string>(py::str(key));
      bool known = name == "op";
      for (const char* k : keys) known |= name == k;
      if (!known) refuse(what_, " (", op_, ") has an unknown key '", name, "'");
    }
  }

  bool has(const char* key) const { return d_.contains(key) && !d_[key].is_none(); }

  const Value& value_at(const py::handle& index, const char* key) const {
    auto i = py::cast<int64_t>(index), n = int64_t(values_.size()) - 1;
    if (i < -1 || i >= n) refuse(what_, ".", key, " must be a step before it, or -1 for the terms, got ", i);
    return values_[i + 1];
  }

  const Value& input() const { return has("input") ? value_at(d_["input"], "input") : values_.back(); }

  void push(Step<T>&& step, bool image) {
    std::vector<Step<T>>& list = image ? chain_.images : chain_.layers;
    values_.push_back({image, int(list.size()), step.out});
    list.push_back(std::move(step));
  }

  // The value that is added to a product, if any.
  void read_add(Step<T>& step, bool image) const {
    if (!has("add")) return;
    const Value& v = value_at(d_["add"], "add");
    Value own{image, 0, step.out};
    if (text(v) != text(own)) refuse(what_, ".add must be ", text(own), " like the step's value, got ", text(v));
    step.inputs.push_back(v.index);
  }

  Activation act() const {
    return activation(d_.contains("activation") ? py::cast<std::string>(d_["activation"]) : "identity",
                      d_.contains("slope") ? py::cast<double>(d_["slope"]) : 0.01);
  }

  void read_terms(const py::sequence& given, const py::array& c, const std::string& prefix, const Activation& act) {
    if (py::len(given) == 0) refuse(prefix, "terms must not be empty");
    Step<T> s{};
    s.op = Op::terms, s.act = act;
    bool image = array(given[0], prefix + "terms[0]").ndim() == 4;
    Image& shape = s.out = {-1, image ? -1 : 1, image ? -1 : 1};
    for (const auto& term : given) {
      std::string name = prefix + "terms[" + std::to_string(s.terms.values.size()) + "]";
      py::array a = array(term, name);
      if (image) {
        s.terms.values.push_back(images<T>(a, name, chain_.rows, shape.channels, shape.height, shape.width));
        shape = {a.shape(1), a.shape(2), a.shape(3)};
      } else {
        s.terms.values.push_back(rows<T>(a, name, chain_.rows, shape.channels));
        shape.channels = a.shape(1);
      }
      chain_.rows = a.shape(0);
    }
    if (shape.count() < 1) refuse(prefix, "terms must have at least one value in a row, got ", shape_text(array(given[0], "terms[0]")));
    s.terms.coefficients = coefficients(c, prefix + "coefficients", values_.empty() ? -1 : chain_.points, int64_t(s.terms.values.size()));
    s.in = s.out;
    if (image && !values_.empty() && !values_[0].image) refuse(prefix, "terms must be rows where the first terms are, got images");
    push(std::move(s), image);
  }

  void more_terms() {
    only({"terms", "coefficients", "activation", "slope"});
    if (!d_.contains("terms") || !d_.contains("coefficients")) refuse(what_, " must have terms and coefficients");
    read_terms(d_["terms"], array(d_["coefficients"], what_ + ".coefficients"), what_ + ".", act());
  }

  void flatten() {
    only({"input"});
    const Value v = input();
    if (!v.image) refuse(what_, ": flatten must get images, got ", text(v));
    if (flattened_) refuse(what_, ": flatten must come once only");
    flattened_ = true;
    chain_.flat = v.index;
    chain_.layers[0].out = {v.shape.count(), 1, 1};
    values_.push_back({false, 0, chain_.layers[0].out});
  }

  std::vector<Value> inputs() const {
    std::vector<Value> values;
    if (d_.contains("inputs"))
      for (const auto& i : py::cast<py::sequence>(d_["inputs"])) values.push_back(value_at(i, "inputs"));
    if (values.empty()) refuse(what_, " (", op_, ") must have inputs");
    return values;
  }

  void sum() {
    only({"inputs", "activation", "slope"});
    Step<T> s{};
    s.op = Op::sum, s.act = act();
    const std::vector<Value> values = inputs();
    for (const Value& v : values) {
      if (text(v) != text(values[0])) refuse(what_, ".inputs must be of one shape, got ", text(values[0]), " and ", text(v));
      s.inputs.push_back(v.index);
    }
    s.in = s.out = values[0].shape;
    push(std::move(s), values[0].image);
  }

  void multiply() {
    only({"inputs", "activation", "slope"});
    const std::vector<Value> values = inputs();
    if (values.size() != 2) refuse(what_, " (multiply) must have two inputs, got ", values.size());
    const Value &x = values[0], &factor = values[1];
    if (x.image != factor.image || x.shape.channels != factor.shape.channels || (factor.shape.pixels() != 1 && text(x) != text(factor)))
      refuse(what_, ".inputs must be of one shape, or the second one pixel, got ", text(x), " and ", text(factor));
    Step<T> s{};
    s.op = Op::multiply, s.act = act(), s.inputs = {x.index, factor.index}, s.in = factor.shape, s.out = x.shape;
    push(std::move(s), x.image);
  }

  void affine() {
    only({"input", "add", "scale", "shift", "activation", "slope"});
    const Value v = input();
    if (!d_.contains("scale") || !d_.contains("shift")) refuse(what_, " (affine) must have scale and shift");
    Step<T> s{};
    s.op = Op::affine, s.inputs = {v.index}, s.in = s.out = v.shape, s.act = act();
    s.norm.scale = dense("scale", v.shape.channels), s.norm.shift = dense("shift", v.shape.channels);
    read_add(s, v.image);
    push(std::move(s), v.image);
  }

  void group_norm() {
    only({"input", "groups", "scale", "shift", "eps", "activation", "slope"});
    const Value v = input();
    for (const char* key : {"scale", "shift", "eps"})
      if (!d_.contains(key)) refuse(what_, " (group_norm) must have scale, shift and eps");
    Step<T> s{};
    s.op = Op::group_norm, s.inputs = {v.index}, s.in = s.out = v.shape, s.act = act();
    s.norm = {dense("scale", v.shape.channels), dense("shift", v.shape.channels), py::cast<double>(d_["eps"])};
    if (d_.contains("groups")) s.norm.groups = py::cast<int64_t>(d_["groups"]);
    if (s.norm.groups < 1 || v.shape.channels % s.norm.groups)
      refuse(what_, ".groups must divide the ", v.shape.channels, " channels, got ", s.norm.groups);
    push(std::move(s), v.image);
  }

  void take() {
    only({"input", "channels", "activation", "slope"});
    const Value v = input();
    Step<T> s{};
    s.op = Op::take, s.inputs = {v.index}, s.in = s.out = v.shape, s.act = act();
    if (d_.contains("channels")) s.channels = py::cast<std::vector<int64_t>>(d_["channels"]);
    if (s.channels.empty()) refuse(what_, " (take) must have channels");
    for (int64_t c : s.channels)
      if (c < -1 || c >= v.shape.channels) refuse(what_, ".channels must be in [0, ", v.shape.channels, "), or -1 for zeros, got ", c);
    s.out.channels = int64_t(s.channels.size());
    push(std::move(s), v.image);
  }

  void concat() {
    only({"inputs", "activation", "slope"});
    Step<T> s{};
    s.op = Op::concat, s.act = act();
    const std::vector<Value> values = inputs();
    const Value& first = values[0];
    s.in = s.out = first.shape, s.out.channels = 0;
    for (const Value& v : values) {
      if (v.image != first.image || v.shape.height != first.shape.height || v.shape.width != first.shape.width)
        refuse(what_, ".inputs must be rows, or images of one size, got ", text(first), " and ", text(v));
      s.inputs.push_back(v.index), s.channels.push_back(v.shape.channels), s.out.channels += v.shape.channels;
    }
    push(std::move(s), first.image);
  }

  void norm() {
    only({"input", "of", "add", "scale", "shift", "eps", "activation", "slope"});
    const Value v = input(), of = has("of") ? value_at(d_["of"], "of") : v;
    if (of.image != v.image || of.shape.channels != v.shape.channels)
      refuse(what_, ".of must have the channels of the input, ", text(v), ", got ", text(of));
    if (chain_.rows * of.shape.pixels() < 2) refuse(what_, " must get more than one value per channel, got ", chain_.rows * of.shape.pixels());
    for (const char* key : {"scale", "shift", "eps"})
      if (!d_.contains(key)) refuse(what_, " (batch_norm) must have scale, shift and eps");
    Step<T> s{};
    s.op = Op::norm, s.inputs = {v.index}, s.in = s.out = v.shape, s.act = act();
    s.norm = {dense("scale", v.shape.channels), dense("shift", v.shape.channels), py::cast<double>(d_["eps"]), of.index};
    read_add(s, v.image);
    push(std::move(s), v.image);
  }

  void linear() {
    only({"input", "add", "weights", "biases", "coefficients", "bias_coefficients", "activation", "slope", "scale", "shift"});
    const Value& v = input();
    if (v.image) refuse(what_, ": linear must come after flatten, got ", text(v));
    Step<T> s{};
    s.op = Op::linear, s.inputs = {v.index}, s.in = v.shape, s.act = act();
    s.layer = layer(v.shape.channels, nullptr);
    s.out.channels = s.layer.units;
    read_add(s, false);
    push(std::move(s), false);
  }

  void window_step() {
    const Value& v = input();
    if (!v.image) refuse(what_, ": ", op_, " must get images: terms [rows, channels, height, width] and no flatten before it");
    Step<T> s{};
    s.inputs = {v.index}, s.in = s.out = v.shape;
    int64_t *kernel = s.window.kernel, groups = 1;
    bool ceil = false;
    if (op_ == "conv2d") {
      only({"input", "add", "weights", "biases", "coefficients", "bias_coefficients", "activation", "slope", "scale", "shift", "stride",
            "padding", "dilation", "groups"});
      kernel[0] = kernel[1] = -1;
      if (d_.contains("groups")) groups = py::cast<int64_t>(d_["groups"]);
      if (groups < 1 || v.shape.channels % groups) refuse(what_, ".groups must divide the ", v.shape.channels, " channels, got ", groups);
      s.op = Op::conv, s.act = act();
      s.layer = layer(v.shape.channels / groups, kernel);
      if (s.layer.units % groups) refuse(what_, ".groups must divide the ", s.layer.units, " units, got ", groups);
      s.layer.groups = groups;
      s.out.channels = s.layer.units;
      s.window.stride[0] = s.window.stride[1] = 1;
    } else {
      only({"input", "kernel", "stride", "padding", "ceil"});
      s.op = op_ == "max_pool2d" ? Op::max_pool : Op::avg_pool;
      if (!d_.contains("kernel")) refuse(what_, " (", op_, ") must have a kernel");
      pair("kernel", 1, kernel);
      std::copy_n(kernel, 2, s.window.stride);
      ceil = d_.contains("ceil") && py::cast<bool>(d_["ceil"]);
      if (ceil && s.op != Op::max_pool) refuse(what_, ".ceil goes with max_pool2d only");
    }
    pair("stride", 1, s.window.stride);
    pair("padding", 0, s.window.padding);
    pair("dilation", 1, s.window.dilation);
    s.out.height = window_positions(s, 0, ceil), s.out.width = window_positions(s, 1, ceil);
    read_add(s, true);
    push(std::move(s), true);
  }

  // ceil: the last window may go beyond the image, as long as it begins in it or before.
  int64_t window_positions(const Step<T>& s, int i, bool ceil) const {
    const Window& w = s.window;
    int64_t size = i ? s.in.width : s.in.height, reach = (w.kernel[i] - 1) * w.dilation[i] + 1;
    if (s.op != Op::conv && w.padding[i] > w.kernel[i] / 2)
      refuse(what_, ".padding of a pooling must be at most half its kernel, got ", w.padding[i], " and ", w.kernel[i]);
    if (size + 2 * w.padding[i] < reach)
      refuse(what_, ": the kernel must fit the padded image, got kernel ", w.kernel[0], "x", w.kernel[1], " for ", s.in.height, "x", s.in.width,
             " with padding ", w.padding[0], "x", w.padding[1], " and dilation ", w.dilation[0], "x", w.dilation[1]);
    int64_t last = (size + 2 * w.padding[i] - reach + (ceil ? w.stride[i] - 1 : 0)) / w.stride[i];
    return ceil && last * w.stride[i] >= size + w.padding[i] ? last : last + 1;
  }

  void pair(const char* key, int64_t least, int64_t* out) const {
    if (!d_.contains(key)) return;
    auto values = py::cast<std::vector<int64_t>>(d_[key]);
    if (values.size() != 2 || values[0] < least || values[1] < least || std::max(values[0], values[1]) > 1 << 20)
      refuse(what_, ".", key, " must be two integers of at least ", least, ", got ", std::string(py::str(d_[key])));
    out[0] = values[0], out[1] = values[1];
  }

  // One number per channel at every point.
  const double* dense(const char* key, int64_t count) const {
    std::string name = what_ + "." + key;
    return coefficients(array(d_[key], name), name, chain_.points, count);
  }

  // A linear layer, or with a kernel {height, width}, which is filled in, a convolution of so many channels.
  Layer<T> layer(int64_t channels, int64_t* kernel) const {
    if (!d_.contains("weights") || !d_.contains("coefficients")) refuse(what_, " must have weights and coefficients");
    Layer<T> l{};
    l.units = -1, l.depth = channels;
    for (const auto& w : py::cast<py::sequence>(d_["weights"])) {
      std::string name = what_ + ".weights[" + std::to_string(l.weights.size()) + "]";
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
    if (l.weights.empty()) refuse(what_, ".weights must not be empty");
    if (l.units < 1) refuse(what_, " must have at least one unit");
    if (has("biases"))
      for (const auto& b : py::cast<py::sequence>(d_["biases"])) {
        std::string name = what_ + ".biases[" + std::to_string(l.biases.size()) + "]";
        l.biases.push_back(checked<T>(array(b, name), name, {l.units}));
      }
    l.bias_coefficients = l.coefficients = dense("coefficients", int64_t(l.weights.size()));
    if (has("bias_coefficients"))
      l.bias_coefficients = dense("bias_coefficients", int64_t(l.biases.size()));
    else if (!l.biases.empty() && l.biases.size() != l.weights.size())
      refuse(what_, " without bias_coefficients must have as many biases as weights or none, got ", l.biases.size(), " and ", l.weights.size());
    if (d_.contains("scale") != d_.contains("shift")) refuse(what_, " must have both scale and shift or none");
    if (d_.contains("scale")) l.scale = dense("scale", l.units), l.shift = dense("shift", l.units);
    return l;
  }

  StepGraph<T> chain_{};
  std::vector<Value> values_;  // of the terms, then of each step
  bool flattened_ = false;
  std::string what_, op_;      // of the step that is being read
  py::dict d_;
};

}  // namespace
}  // namespace modeconn
