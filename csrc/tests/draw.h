// Random numbers, the same in every run.
#pragma once
#include <cstdint>
#include <random>
#include <vector>

namespace modeconn {

inline std::mt19937 random_bits(1);

template <class T> std::vector<T> draw(int64_t n, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> v(n);
  for (T& x : v) x = T(normal(random_bits));
  return v;
}

}  // namespace modeconn
