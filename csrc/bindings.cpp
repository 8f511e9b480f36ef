// The Python module modeconn._native. modeconn/_native.pyi states its signatures for type checkers;
// modeconn/backends/native/extension.py is its only importer.
#include "bind_engine.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "The C++ engine of modeconn, as the backend \"native\" uses it.";
  modeconn::bind_engine(module);
}
