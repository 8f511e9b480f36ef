// One precision's kernels, for its source.
#pragma once
#include "launch.h"
#include "mlp.h"
#include "runtime.h"

namespace modeconn::cuda {

// Calls f with the product that a variant and a width have.
template <Precision P, class F> auto with_product(Variant variant, int kernel_width, F&& f) {
  if constexpr (P != Precision::float32)
    if (variant == Variant::wgmma) return kernel_width > 128 ? f((WgmmaProduct<P, 256>*)nullptr) : f((WgmmaProduct<P, 128>*)nullptr);
  return kernel_width > 128 ? f((MmaProduct<P, 256>*)nullptr) : f((MmaProduct<P, 128>*)nullptr);
}

template <Precision P> int shared_bytes_of(Variant variant, int kernel_width) {
  return with_product<P>(variant, kernel_width, [](auto* product) { return shared_bytes<std::remove_pointer_t<decltype(product)>>(); });
}

template <Precision P> void launch_mlp(Variant variant, int kernel_width, const MlpParams& p, void* stream) {
  with_product<P>(variant, kernel_width, [&](auto* product) {
    using Product = std::remove_pointer_t<decltype(product)>;
    runtime::launch(mlp_kernel<Product>, "mlp_kernel", p.points * p.tiles, threads, shared_bytes<Product>(), stream, p);
  });
}

}  // namespace modeconn::cuda
