// The Python module modeconn._native: checks the arguments, releases the GIL, calls the code beside it.
// modeconn/_native.pyi states the same signatures for type checkers; modeconn/native.py is the only importer.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "bind_engine.h"
#include "cpu_features.h"
#include "logsumexp.h"

namespace py = pybind11;

namespace {

py::dict features() {
    const modeconn::Features found = modeconn::detect_features();
    py::dict result;
    result["avx2"] = found.avx2;
    result["fma"] = found.fma;
    result["avx512f"] = found.avx512f;
    result["avx512bw"] = found.avx512bw;
    result["avx512dq"] = found.avx512dq;
    result["avx512vl"] = found.avx512vl;
    result["cores"] = found.cores;
    result["l1d_bytes"] = found.l1d_bytes;
    result["l2_bytes"] = found.l2_bytes;
    result["l3_bytes"] = found.l3_bytes;
    return result;
}

py::dict versions() {
    const modeconn::Versions built = modeconn::build_versions();
    py::dict result;
    result["modeconn"] = built.modeconn;
    result["compiler"] = built.compiler;
    result["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR) + "." +
                         std::to_string(PYBIND11_VERSION_MICRO);
    result["cplusplus"] = built.cplusplus;
    result["instruction_sets"] = built.instruction_sets;
    result["sanitizers"] = built.sanitizers;
    return result;
}

template <typename Element>
py::array_t<double> logsumexp_of(const py::array& x) {
    const py::ssize_t rows = x.shape(0);
    py::array_t<double> result(rows);
    const auto* data = static_cast<const Element*>(x.data());
    double* out = result.mutable_data();
    const py::ssize_t columns = x.shape(1), row_stride = x.strides(0), column_stride = x.strides(1);
    {
        py::gil_scoped_release unlocked;
        modeconn::logsumexp_rows(data, rows, columns, row_stride, column_stride, out);
    }
    return result;
}

py::array_t<double> logsumexp(const py::array& x) {
    if (x.ndim() != 2)
        throw py::value_error("logsumexp: x must have 2 dimensions, [rows, columns]; it has " +
                              std::to_string(x.ndim()));
    if ((x.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0)
        throw py::value_error("logsumexp: the elements of x must be aligned in memory; these are not, make a copy");
    if (py::isinstance<py::array_t<float>>(x)) return logsumexp_of<float>(x);
    if (py::isinstance<py::array_t<double>>(x)) return logsumexp_of<double>(x);
    throw py::type_error("logsumexp: x must be float32 or float64 in native byte order; its dtype is " +
                         py::str(x.dtype()).cast<std::string>());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The C++ part of modeconn; use it through modeconn.native.";
    module.def("features", &features, "What the CPU offers: instruction sets, usable cores, cache sizes in bytes.");
    module.def("versions", &versions, "What this extension was built with.");
    module.def("logsumexp", &logsumexp, py::arg("x").noconvert(),
               "Row-wise log-sum-exp of a float32 or float64 array [rows, columns], in float64: [rows].");
    modeconn::bind_engine(module);
}
