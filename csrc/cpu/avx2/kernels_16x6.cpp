// 16 registers: 2 x 6 accumulators, 2 vectors of samples, broadcasts; 8 loads for 12 multiply-adds.
#include "../bodies/table.h"

namespace modeconn {
void fill_avx2(Context& c) {
  fill<Simd<float, 8>, 2, 6>(c.f32, "avx2 f32 16x6");
  fill<Simd<double, 4>, 2, 6>(c.f64, "avx2 f64 8x6");
}
}  // namespace modeconn
