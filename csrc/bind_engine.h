#pragma once
#include <pybind11/pybind11.h>

namespace modeconn {
void bind_engine(pybind11::module_& m);
}
