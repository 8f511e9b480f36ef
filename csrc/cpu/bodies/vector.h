// Vectors of L elements as the compiler's vector type: the same source is compiled in each instruction set's folder.
// Everything here has internal linkage: an instruction set's code must never be picked by the linker for another.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#define MODECONN_INLINE static inline __attribute__((always_inline))

namespace modeconn {
namespace {

template <class T> struct IntOf;
template <> struct IntOf<float> { using type = int32_t; using bits = uint32_t; };
template <> struct IntOf<double> { using type = int64_t; using bits = uint64_t; };

// Lanes of T; M: integer lanes of the same width, also the result of comparisons; U: their bits, free to wrap around.
template <class T_, int L_> struct Simd {
  using T = T_;
  using I = typename IntOf<T>::type;
  using Bits = typename IntOf<T>::bits;
  static constexpr int L = L_;
  typedef T V __attribute__((vector_size(L * sizeof(T)), may_alias));
  typedef I M __attribute__((vector_size(L * sizeof(T)), may_alias));
  typedef Bits U __attribute__((vector_size(L * sizeof(T)), may_alias));
  typedef T Unaligned __attribute__((vector_size(L * sizeof(T)), may_alias, aligned(sizeof(T))));
};

template <class S> MODECONN_INLINE typename S::V splat(typename S::T value) { return value - typename S::V{}; }
template <class S> MODECONN_INLINE typename S::V load(const typename S::T* p) { return *(const typename S::V*)p; }
template <class S> MODECONN_INLINE void store(typename S::T* p, typename S::V v) { *(typename S::V*)p = v; }
template <class S> MODECONN_INLINE typename S::V loadu(const typename S::T* p) { return *(const typename S::Unaligned*)p; }
template <class S> MODECONN_INLINE void storeu(typename S::T* p, typename S::V v) { *(typename S::Unaligned*)p = v; }

// The first n elements, zeros behind; never reads beyond them.
template <class S> MODECONN_INLINE typename S::V load_first(const typename S::T* p, int n) {
  if (n >= S::L) return loadu<S>(p);
  alignas(64) typename S::T buffer[S::L] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load<S>(buffer);
}

template <class S> MODECONN_INLINE void store_first(typename S::T* p, typename S::V v, int n) {
  if (n >= S::L) return storeu<S>(p, v);
  alignas(64) typename S::T buffer[S::L];
  store<S>(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class S, int H, size_t... l>
MODECONN_INLINE void exchange(typename S::V& a, typename S::V& b, std::index_sequence<l...>) {
  constexpr int L = S::L;
  typename S::V low = __builtin_shufflevector(a, b, (int(l) & H ? L + int(l) - H : int(l))...);
  b = __builtin_shufflevector(a, b, (int(l) & H ? L + int(l) : int(l) + H)...);
  a = low;
}

// Transposes an L x L square held in registers: log2(L) rounds of exchanging off-diagonal quarters.
template <class S, int H = S::L / 2> MODECONN_INLINE void transpose(typename S::V (&r)[S::L]) {
  for (int i = 0; i < S::L; ++i)
    if (!(i & H)) exchange<S, H>(r[i], r[i + H], std::make_index_sequence<S::L>{});
  if constexpr (H > 1) transpose<S, H / 2>(r);
}

}  // namespace
}  // namespace modeconn
