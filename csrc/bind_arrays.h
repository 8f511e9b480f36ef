// Checks of what Python passes: every array's type, shape and strides. Included by bind_engine.cpp alone.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

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
  if (a.size() && a.shape(0) > 1 && a.strides(0) != ssize_t(count * sizeof(double))) refuse(what, " must be contiguous");
  return data;
}

Activation activation(const std::string& name, double slope) {
  Activation found{Act::identity, slope};
  std::string known;
  if (!find_activation(name, false, found.kind, known)) refuse("activation must be one of ", known, "; got '", name, "'");
  return found;
}

}  // namespace
}  // namespace modeconn
