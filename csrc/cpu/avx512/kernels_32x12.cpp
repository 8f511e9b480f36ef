// 32 registers: 2 x 12 accumulators, 2 vectors of samples, broadcasts; 14 loads for 24 multiply-adds.
#include "../bodies/table.h"

namespace modeconn {
void fill_avx512(Context& c) {
  fill<Simd<float, 16>, 2, 12>(c.f32, "avx512 f32 32x12");
  fill<Simd<double, 8>, 2, 12>(c.f64, "avx512 f64 16x12");
}
}  // namespace modeconn
