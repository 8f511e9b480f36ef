// CUDA for the host: devices, and launches on a stream. The emulation has the same functions.
#pragma once
#include <stdexcept>
#include <string>

#include "device.h"

#ifdef __CUDACC__
namespace modeconn::cuda::runtime {

constexpr bool emulated = false;

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error of a launch would be reported again by whoever asks next
  throw std::runtime_error("CUDA failed " + what + ": " + cudaGetErrorString(error));
}

inline int device_count(std::string& problem) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();
  problem = cudaGetErrorString(error);
  return 0;
}

struct Device {
  int major, minor, shared_bytes;  // that a block may have
};

inline Device device(int index) {
  Device d{};
  check(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, index), "asking for the compute capability");
  check(cudaDeviceGetAttribute(&d.minor, cudaDevAttrComputeCapabilityMinor, index), "asking for the compute capability");
  check(cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "asking for the shared memory");
  return d;
}

// Makes a device current, and the one before it again at the end.
class On {
 public:
  explicit On(int index) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (before_ != index) check(cudaSetDevice(index), "choosing device " + std::to_string(index));
  }
  ~On() { cudaSetDevice(before_); }

 private:
  int before_;
};

template <class... P>
void launch(void (*kernel)(P...), const char* name, int64_t blocks, int threads, int shared_bytes, void* stream, const P&... p) {
  const std::string what = std::string("launching ") + name + " with " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                           " threads and " + std::to_string(shared_bytes) + " bytes of shared memory";
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), what);
  kernel<<<unsigned(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p...);
  check(cudaGetLastError(), what);
}

}  // namespace modeconn::cuda::runtime
#else
namespace modeconn::cuda::runtime {

constexpr bool emulated = true;

inline int device_count(std::string&) { return 1; }

struct Device {
  int major, minor, shared_bytes;
};
inline Device device(int) { return {9, 0, 227 * 1024}; }

struct On {
  explicit On(int) {}
};

template <class... P>
void launch(void (*kernel)(P...), const char* name, int64_t blocks, int threads, int shared_bytes, void*, const P&... p) {
  emulation::run(name, blocks, threads, shared_bytes, [&] { kernel(p...); });
}

}  // namespace modeconn::cuda::runtime
#endif
