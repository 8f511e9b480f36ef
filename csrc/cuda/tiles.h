// The layout of packed weights: in the order in which the tensor cores take them, so that a slab is one run of bytes.
//
// A step is what one instruction multiplies: 8 columns of tf32 or 16 of bf16, 32 bytes per unit either way. Columns go into
// steps 32 at a time, and not in their own order: a sum may be taken in any order, and in this one a thread finds its part
// of the activations in pairs of columns that no other thread's bank holds. Column 2 of a group of 32 is thread 1's, and so on:
//
//     column in the group   0 1 | 2 3 | 4 5 | 6 7 | … | 16 17 | 18 19 | …       thread = bits 1 and 4 of the column
//     thread of the four     0     1     0     1          2       3             pair   = bits 2 and 3
#pragma once
#include "device.h"
#include "params.h"

namespace modeconn::cuda {

constexpr int group = 32;      // columns that are permuted together
constexpr int step_bytes = 32; // of a unit in a step

HOST_DEVICE constexpr int steps_per_group(Precision p) { return p == Precision::bf16 ? 2 : 4; }
HOST_DEVICE constexpr int element_bytes(Precision p) { return p == Precision::bf16 ? 2 : 4; }

// The first column of a thread's pair (0..3) in a group; the pair's columns are this one and the next.
HOST_DEVICE constexpr int pair_column(int thread, int pair) { return (thread & 1) * 2 + (thread >> 1) * 16 + pair * 4; }

struct Place {
  int step;    // along the layer's depth
  int thread;  // of the four that share a row of a fragment
  int word;    // of the thread's two 32-bit words in the step: tf32 has one element in a word, bf16 two
  int half;    // of the word
  HOST_DEVICE constexpr int slot(Precision p) const {  // the instruction's k
    return p == Precision::bf16 ? 2 * thread + half + 8 * word : thread + 4 * word;
  }
};

HOST_DEVICE constexpr Place place(int column, Precision p) {
  int in_group = column % group, thread = (in_group >> 1 & 1) | (in_group >> 4 & 1) << 1, pair = in_group >> 2 & 3;
  return p == Precision::bf16 ? Place{column / group * 2 + pair / 2, thread, pair & 1, column & 1}
                              : Place{column / group * 4 + pair, thread, column & 1, 0};
}

// The byte of W[unit][column] in a layer's packed weights.
//   mma:   [step][unit / 8][lane][word], a lane's two words of a fragment together
//   wgmma: [step][slot / 16 bytes][unit / 8][unit % 8][16 bytes]: "core matrices" of 8 units times 16 bytes, no swizzle
HOST_DEVICE constexpr int64_t packed_offset(int unit, int column, int padded, Precision p, Variant v) {
  Place at = place(column, p);
  int64_t step = int64_t(at.step) * padded * step_bytes;
  if (v == Variant::mma) return step + ((unit / 8 * 32 + unit % 8 * 4 + at.thread) * 2 + at.word) * 4 + at.half * 2;
  int byte = at.slot(p) * element_bytes(p);
  return step + (byte / 16 * (padded / 8) + unit / 8) * 128 + unit % 8 * 16 + byte % 16;
}

// Widths are padded to whole groups; wgmma has slabs of two, and multiplies 64 units or all that the kernel has.
HOST_DEVICE constexpr int padded_depth(int depth, Variant v) {
  int whole = v == Variant::mma ? group : 2 * group;
  return (depth + whole - 1) / whole * whole;
}
HOST_DEVICE constexpr int padded_units(int units, int kernel_width, Variant v) {
  return v == Variant::wgmma && units > 64 ? kernel_width : padded_depth(units, v);
}

// The matrix descriptor of wgmma for core matrices as above: where they begin, how far apart along the depth and along units.
HOST_DEVICE constexpr uint64_t descriptor(uint32_t address, int padded) {
  uint64_t along_depth = padded / 8 * 128, along_units = 128;
  return (address >> 4 & 0x3fff) | (along_depth >> 4) << 16 | (along_units >> 4) << 32;
}

}  // namespace modeconn::cuda
