// Launches of a chain, for the bindings.
#pragma once
#include <string>

#include "params.h"

namespace modeconn::cuda {

// Devices that CUDA finds; `problem` says why there are none, if it knows.
int device_count(std::string& problem);

// The instructions that a precision gets on a device: wgmma where there are such, and it has them.
Variant best_variant(int device, Precision precision);

// Why a device cannot run a chain; "" where it can.
std::string cannot_run(int device, const Chain& chain);

// Lays out the chain's workspace. Nothing of the chain is read but its sizes, precision and variant.
Workspace plan(const Chain& chain);

// Forms the weights, runs the chain and writes sums [points][3], all on the stream and without waiting for it.
// `workspace`: plan(chain).bytes bytes, aligned to 128. Throws std::runtime_error where CUDA fails.
void run(const Chain& chain, int device, char* workspace, double* sums, void* stream);

// Whether this is the emulation on the CPU, and the addresses are the CPU's.
bool emulated();

// The kernels of one precision: one source each, so that they compile at the same time.
template <Precision P> void launch_mlp(Variant variant, int kernel_width, const MlpParams& p, void* stream);
template <Precision P> int shared_bytes_of(Variant variant, int kernel_width);

}  // namespace modeconn::cuda
