// The table of micro-kernels: one per element type and instruction set. The engine sees nothing else of a CPU.
// The contract of every slot is written in csrc/README.md.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../activations.h"

namespace modeconn {

constexpr int64_t cache_line = 64;  // bytes; panels and packed weights start on one

// Whether a product's tile applies it in registers; the others are a pass over the finished panel.
constexpr bool fused(Act act) { return activation_rows[int(act)].in_registers; }

struct Activation {
  Act kind = Act::identity;
  double slope = 0;  // of leaky_relu; alpha of elu
};

// Rows of a matrix: element (i, k) is data[i * stride + k].
template <class T> struct Rows {
  const T* data = nullptr;
  ptrdiff_t stride = 0;
};

// A run of consecutive k in a tile's product: `length` rows of the panel from `x`, against packed weights from `w`.
template <class T> struct Span {
  const T* x;
  const T* w;
  int64_t length;
};

// Pixels of an image from some channel on: the next row's and the next column's are so many elements away.
template <class T> struct Pixels {
  T* at;
  ptrdiff_t row, column;
};

struct LossSums {
  double loss = 0, errors = 0, errors5 = 0;
};

template <class T> struct Kernels {
  const char* name;    // for instance "avx512 32x12"
  int panel;           // samples in a panel: values of one unit for `panel` samples are contiguous
  int units;           // most units a tile computes at once
  int64_t depth;       // most k of one product call, so that the panel's part stays in L1

  void (*pack)(int terms, const Rows<T>* weights, const T* coefficients, int units, int64_t depth, T* out);
  void (*combine_rows)(int terms, const Rows<T>* rows, const T* coefficients, int samples, int64_t width, Activation act, T* panel);
  void (*combine)(int terms, const T* const* values, const T* coefficients, int64_t count, Activation act, T* out);
  void (*product)(int spans, const Span<T>* span, int units, const T* bias, const T* add, Activation act, T* out);
  void (*depthwise)(int taps, const T* const* x, const T* w, int units, const T* bias, const T* add, Activation act, T* out);
  void (*winograd_weights)(const T* taps, int64_t count, T* out);
  void (*winograd_input)(const T* const* pixels, int64_t count, int64_t apart, T* out);
  bool (*winograd)(const T* x, int64_t apart, int64_t depth, const T* w, int units, const T* bias, Pixels<const T> add, Activation act,
                   int rows, int columns, Pixels<T> out);
  void (*multiply)(int64_t pixels, int64_t count, const T* x, const T* factor, int64_t apart, T* out);
  void (*pool)(bool max, int taps, const T* const* values, T divisor, int64_t count, T* out);
  void (*activate)(Activation act, int64_t count, T* values);
  void (*moments)(int64_t pixels, int64_t pitch, int units, int samples, const T* x, double* mean, double* squares);
  void (*normalise)(int64_t pixels, int64_t units, const T* x, const T* scale, const T* shift, const T* add, Activation act, T* out);
  void (*group_norm)(int64_t pixels, int64_t units, int64_t groups, const T* x, double eps, const T* scale, const T* shift,
                     Activation act, T* out);
  void (*write_rows)(const T* panel, int samples, int64_t width, T* out, ptrdiff_t stride);
  LossSums (*cross_entropy)(const T* panel, int samples, int64_t classes, const int64_t* labels, bool top5);
  LossSums (*mse)(const T* panel, int samples, int64_t width, const T* targets, ptrdiff_t stride);
  LossSums (*bce)(const T* panel, int samples, int64_t width, const T* targets, ptrdiff_t stride);
};

struct Context {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
  template <class T> const Kernels<T>& kernels() const;
};
template <> inline const Kernels<float>& Context::kernels<float>() const { return f32; }
template <> inline const Kernels<double>& Context::kernels<double>() const { return f64; }

// `isa` null or empty: the variable MODECONN_ISA, else the best that this CPU runs. Throws std::invalid_argument on
// a name that is unknown, was not built, or that this CPU cannot run.
const Context& context(const char* isa = nullptr);

// The names that context() accepts here, best first; the last is "generic".
int supported_isas(const char* names[3]);

int64_t l2_bytes();

// Each instruction set fills the whole table, because the panel's width is shared by all slots.
void fill_generic(Context& c);
void fill_avx2(Context& c);
void fill_avx512(Context& c);

}  // namespace modeconn
