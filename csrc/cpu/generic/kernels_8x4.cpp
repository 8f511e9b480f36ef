// Any CPU: 16-byte vectors, which the compiler lowers to what the target has.
#include "../bodies/table.h"

namespace modeconn {
void fill_generic(Context& c) {
  fill<Simd<float, 4>, 2, 4>(c.f32, "generic f32 8x4");
  fill<Simd<double, 2>, 2, 4>(c.f64, "generic f64 4x4");
}
}  // namespace modeconn
