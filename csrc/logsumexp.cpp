#include "logsumexp.h"

#include <cmath>
#include <limits>

namespace modeconn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename Element>
double at(const char* row, std::ptrdiff_t column, std::ptrdiff_t column_stride) {
    return static_cast<double>(*reinterpret_cast<const Element*>(row + column * column_stride));
}

template <typename Element>
double logsumexp_row(const char* row, std::ptrdiff_t columns, std::ptrdiff_t column_stride) {
    double largest = -kInfinity;
    for (std::ptrdiff_t j = 0; j < columns; ++j) {
        const double value = at<Element>(row, j, column_stride);
        if (std::isnan(value)) return value;
        if (value > largest) largest = value;
    }
    // inf - inf would be NaN, and these two need no sum.
    if (std::isinf(largest)) return largest;
    double sum = 0.0;
    for (std::ptrdiff_t j = 0; j < columns; ++j) sum += std::exp(at<Element>(row, j, column_stride) - largest);
    return largest + std::log(sum);
}

}  // namespace

template <typename Element>
void logsumexp_rows(const Element* x, std::ptrdiff_t rows, std::ptrdiff_t columns, std::ptrdiff_t row_stride,
                    std::ptrdiff_t column_stride, double* out) {
    const char* first = reinterpret_cast<const char*>(x);
    for (std::ptrdiff_t i = 0; i < rows; ++i)
        out[i] = logsumexp_row<Element>(first + i * row_stride, columns, column_stride);
}

template void logsumexp_rows<float>(const float*, std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t,
                                    double*);
template void logsumexp_rows<double>(const double*, std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t,
                                     double*);

}  // namespace modeconn
