// Winograd's F(2x2, 3x3): the products of a square of 2 x 2 output pixels, 16 instead of 36, and the transforms of weights,
// inputs and outputs, which are additions.
#pragma once
#include "../context.h"
#include "product.h"
#include "vector.h"

namespace modeconn {
namespace {

// G w G' for `count` kernels w, [3][3][count] -> [4][4][count].
template <class S> void winograd_weights(const typename S::T* taps, int64_t count, typename S::T* out) {
  using V = typename S::V;
  const typename S::T half(0.5);
  for (int64_t i = 0; i < count; i += S::L) {
    const int n = count - i < S::L ? int(count - i) : S::L;
    V rows[4][3];
    for (int j = 0; j < 3; ++j) {
      const typename S::T* w = taps + j * count + i;
      V a = load_first<S>(w, n), b = load_first<S>(w + 3 * count, n), c = load_first<S>(w + 6 * count, n);
      rows[0][j] = a, rows[1][j] = (a + c + b) * half, rows[2][j] = (a + c - b) * half, rows[3][j] = c;
    }
    for (int r = 0; r < 4; ++r) {
      V a = rows[r][0], b = rows[r][1], c = rows[r][2];
      typename S::T* o = out + 4 * r * count + i;
      store_first<S>(o, a, n), store_first<S>(o + count, (a + c + b) * half, n);
      store_first<S>(o + 2 * count, (a + c - b) * half, n), store_first<S>(o + 3 * count, c, n);
    }
  }
}

// B' d B for 4 x 4 pixels d of `count` values each. Values are read twice: there are not enough registers to keep them.
template <class S, int NV>
void winograd_input(const typename S::T* const* pixels, int64_t count, int64_t apart, typename S::T* out) {
  using V = typename S::V;
  constexpr int first[4] = {0, 1, 2, 1}, second[4] = {2, 2, 1, 3};
  for (int64_t i = 0; i < count; i += NV * S::L)
    for (int r = 0; r < 4; ++r)
      for (int v = 0; v < NV; ++v) {
        const int64_t at = i + v * S::L;
        V d[4];
        for (int j = 0; j < 4; ++j) {
          V a = load<S>(pixels[4 * first[r] + j] + at), b = load<S>(pixels[4 * second[r] + j] + at);
          d[j] = r == 1 ? a + b : a - b;
        }
        typename S::T* o = out + 4 * r * apart + at;
        store<S>(o, d[0] - d[2]), store<S>(o + apart, d[1] + d[2]);
        store<S>(o + 2 * apart, d[2] - d[1]), store<S>(o + 3 * apart, d[1] - d[3]);
      }
}

// A' m A of the products m, with all that `tile` adds to them. An infinity or NaN anywhere makes `check` NaN.
template <class S, int NV, int R>
bool square(const typename S::T* x, int64_t apart, int64_t depth, const typename S::T* w, const typename S::T* bias,
            Pixels<const typename S::T> add, Activation act, int rows, int columns, Pixels<typename S::T> out) {
  using T = typename S::T;
  using V = typename S::V;
  V m[4][4][R][NV];
  for (int p = 0; p < 16; ++p, x += apart, w += depth * R) {
    V sums[R][NV] = {};
    accumulate<S, NV, R>(sums, x, w, depth);
    for (int u = 0; u < R; ++u)
      for (int v = 0; v < NV; ++v) m[p / 4][p % 4][u][v] = sums[u][v];
  }
  V check{};
  for (int u = 0; u < R; ++u)
    for (int v = 0; v < NV; ++v) {
      V s[2][4];
      for (int j = 0; j < 4; ++j) {
        s[0][j] = m[0][j][u][v] + m[1][j][u][v] + m[2][j][u][v];
        s[1][j] = m[1][j][u][v] - m[2][j][u][v] - m[3][j][u][v];
      }
      for (int i = 0; i < 2; ++i) {
        V y[2] = {s[i][0] + s[i][1] + s[i][2], s[i][1] - s[i][2] - s[i][3]};
        check += y[0] * T(0) + y[1] * T(0);
        for (int j = 0; j < 2; ++j) {
          if (i >= rows || j >= columns) continue;
          const int64_t at = (u * NV + v) * S::L;
          if (add.at) y[j] += load<S>(add.at + i * add.row + j * add.column + at);
          if (bias) y[j] += bias[u];
          store<S>(out.at + i * out.row + j * out.column + at, fused<S>(act, y[j]));
        }
      }
    }
  bool finite = true;
  for (int l = 0; l < S::L; ++l) finite &= check[l] == check[l];
  return finite;
}

template <class S, int NV, int MR, size_t... r>
MODECONN_INLINE bool square_of(int units, const typename S::T* x, int64_t apart, int64_t depth, const typename S::T* w,
                               const typename S::T* bias, Pixels<const typename S::T> add, Activation act, int rows, int columns,
                               Pixels<typename S::T> out, std::index_sequence<r...>) {
  static constexpr decltype(&square<S, NV, 1>) squares[MR] = {square<S, NV, int(r) + 1>...};
  return squares[units - 1](x, apart, depth, w, bias, add, act, rows, columns, out);
}

template <class S, int NV, int MR>
bool winograd(const typename S::T* x, int64_t apart, int64_t depth, const typename S::T* w, int units, const typename S::T* bias,
              Pixels<const typename S::T> add, Activation act, int rows, int columns, Pixels<typename S::T> out) {
  return square_of<S, NV, MR>(units, x, apart, depth, w, bias, add, act, rows, columns, out, std::make_index_sequence<MR>{});
}

}  // namespace
}  // namespace modeconn
