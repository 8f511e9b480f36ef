// The hardware, as the kernels use it. nvcc gets instructions; a host compiler gets the emulation of emulate.h,
// which has the same functions. Nothing beside these two files and runtime.h knows which of the two it is.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#define DEVICE __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define GRID_CONSTANT __grid_constant__
#else
#define HOST_DEVICE
#define DEVICE inline
#define KERNEL(threads) void
#define GRID_CONSTANT
#endif

#ifndef __CUDACC__
#include "emulate.h"
#else
#include <cuda_bf16.h>

namespace modeconn::cuda::device {

// wgmma exists only in code for sm_90a.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool has_wgmma = true;
#else
constexpr bool has_wgmma = false;
#endif

DEVICE int thread() { return int(threadIdx.x); }
DEVICE int lane() { return int(threadIdx.x % 32); }
DEVICE int warp() { return int(threadIdx.x / 32); }
DEVICE int64_t block() { return blockIdx.x; }
DEVICE int64_t blocks() { return gridDim.x; }

DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
template <class T> DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// 16 bytes of global memory to shared memory, both aligned to 16; they are there after wait_copies, for this thread alone
// before a barrier, and for wgmma after a fence_copies as well.
DEVICE void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Newest> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(Newest) : "memory"); }
DEVICE void fence_copies() {
  if constexpr (has_wgmma) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
// Two elements in a register, the first in its low half.
DEVICE uint32_t to_bf16(float first, float second) {
  __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<uint32_t*>(&two);
}
DEVICE uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// d[i] += a[i] b for M tiles of 16 rows and one of 8 units: m16n8k8 of tf32, m16n8k16 of bf16.
template <int M> DEVICE void mma_tf32(float (&d)[M][4], const uint32_t (&a)[M][4], const uint32_t (&b)[2]) {
#pragma unroll
  for (int i = 0; i < M; ++i)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
                 : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[0]), "r"(b[1]));
}
template <int M> DEVICE void mma_bf16(float (&d)[M][4], const uint32_t (&a)[M][4], const uint32_t (&b)[2]) {
#pragma unroll
  for (int i = 0; i < M; ++i)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
                 : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[0]), "r"(b[1]));
}

// d += a B, asynchronously: between wgmma_begin and wgmma_wait neither d nor a may be touched.
DEVICE void wgmma_begin() {
  if constexpr (has_wgmma) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_end() {
  if constexpr (has_wgmma) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_wait() {
  if constexpr (has_wgmma) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define D32_0 D32(0)
#define D64 D32(0), D32(32)
#define D128 D64, D32(64), D32(96)
#define R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define R128 R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90," \
  "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116," \
  "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// The last two ones are the signs of a and B; a third, for bf16, says that B is not transposed.
#define WGMMA(shape, types, registers, outputs, a0, a1, a2, a3, b, more)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned." shape "." types " {" registers "}, {%" a0 ",%" a1  \
               ",%" a2 ",%" a3 "}, %" b ", p, 1, 1" more ";\n}"                                                                   \
               : outputs                                                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor))

// 64 rows a warpgroup times N units; d holds N / 2 accumulators a thread.
template <int N, bool Bf16, int Size> DEVICE void wgmma(float (&d)[Size], const uint32_t (&a)[4], uint64_t b_descriptor) {
  static_assert(Size >= N / 2 && (N == 64 || N == 128 || N == 256), "see the list below");
  if constexpr (has_wgmma && Bf16) {
    if constexpr (N == 64) WGMMA("m64n64k16", "f32.bf16.bf16", R32, D32_0, "32", "33", "34", "35", "36", ", 0");
    if constexpr (N == 128) WGMMA("m64n128k16", "f32.bf16.bf16", R64, D64, "64", "65", "66", "67", "68", ", 0");
    if constexpr (N == 256)
      WGMMA("m64n256k16", "f32.bf16.bf16", R128, D128, "128", "129", "130", "131", "132", ", 0");
  } else if constexpr (has_wgmma) {
    if constexpr (N == 64) WGMMA("m64n64k8", "f32.tf32.tf32", R32, D32_0, "32", "33", "34", "35", "36", "");
    if constexpr (N == 128) WGMMA("m64n128k8", "f32.tf32.tf32", R64, D64, "64", "65", "66", "67", "68", "");
    if constexpr (N == 256)
      WGMMA("m64n256k8", "f32.tf32.tf32", R128, D128, "128", "129", "130", "131", "132", "");
  }
}

}  // namespace modeconn::cuda::device
#endif
