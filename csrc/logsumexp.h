// Row-wise log-sum-exp: log(sum_j exp(x[i, j])), the normaliser of the cross-entropy loss.
#pragma once

#include <cstddef>

namespace modeconn {

// One value per row of x, computed and returned in double whatever the input's type.
//
// x            first element of a rows x columns matrix of float or double; every element must be aligned
// row_stride   bytes from one row to the next; zero and negative strides are fine
// column_stride  bytes from one column to the next
// out          rows doubles, contiguous; all of them are written
//
// Each row is shifted by its maximum, so that nothing overflows: max + log(sum_j exp(x[i, j] - max)).
// A row with a NaN gives NaN; otherwise one with +inf gives +inf; a row of -inf alone, or of no columns, gives -inf.
template <typename Element>
void logsumexp_rows(const Element* x, std::ptrdiff_t rows, std::ptrdiff_t columns, std::ptrdiff_t row_stride,
                    std::ptrdiff_t column_stride, double* out);

}  // namespace modeconn
