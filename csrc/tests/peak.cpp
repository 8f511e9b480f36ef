// The machine's multiply-add peak from registers alone: the ceiling of every product. Compiled once per vector width.
#include <chrono>

#ifndef LANES
#define LANES 4
#endif
typedef float V __attribute__((vector_size(LANES * 4)));

extern "C" double peak_gflops(double seconds) {
  V acc[12], a = V{} + 0.999f, b = V{} + 1e-6f;
  for (V& x : acc) x = V{};
  double best = 0;
  auto begin = std::chrono::steady_clock::now();
  for (double spent = 0; spent < seconds;) {
    auto start = std::chrono::steady_clock::now();
    constexpr int rounds = 200000;
    for (int i = 0; i < rounds; ++i) {
      for (V& x : acc) x = x * a + b;
      asm volatile("" : "+x"(a), "+x"(b));
    }
    auto stop = std::chrono::steady_clock::now();
    double rate = 2.0 * LANES * 12 * rounds / std::chrono::duration<double>(stop - start).count() * 1e-9;
    if (rate > best) best = rate;
    spent = std::chrono::duration<double>(stop - begin).count();
  }
  float sum = 0;
  for (V& x : acc) sum += x[0];
  volatile float sink = sum;
  (void)sink;
  return best;
}
