// What kernels are told, by value: plain data, filled in by launch.cu from a problem and its plan.
// Also the sizes that host and kernels must agree on. No CUDA, no torch.
#pragma once

#include <cstdint>

#include "../../problem.h"

#ifdef __CUDACC__
#define BNEXT_HOST_DEVICE __host__ __device__
#else
#define BNEXT_HOST_DEVICE
#endif

namespace bnext::cuda {

// Sums per channel and block. Statistics: count, mean, sum of (x-mean)^2. Backward: sum_dy, sum_dy_xmu, sum_xmu.
constexpr int kNumSums = 3;
// A pack: what a thread moves at once, where it does not move single elements.
constexpr int kPackBytes = 16;
// Packs of each tensor that a thread has in flight. 4 x 16 bytes x 2 tensors x 512 threads is 64 KiB for an SM, above
// the 48 KiB or so that hide the latency of an H200's memory.
constexpr int kUnroll = 4;
// On chip: packs of each tensor that a thread takes from shared memory at once. That is near, and more would cost
// registers, which decide how many blocks an SM has room for.
constexpr int kOnChipBatch = 2;
BNEXT_HOST_DEVICE constexpr int on_chip_batches(int steps) { return (steps + kOnChipBatch - 1) / kOnChipBatch; }
// Grid: groups of copies that a thread leaves in flight at most, one for each batch.
constexpr int kMostGroups = 7;
constexpr int kMaxThreads = 256;
// On chip, where a block may have an SM for itself.
constexpr int kMaxOnChipThreads = 512;
// Rows: threads that share a column of partial sums in the first of the two merges in shared memory.
constexpr int kMaxHelpers = 16;

// Where the apply kernel has the numbers of its channels from.
enum class Source : uint8_t {
  kConstants,  // eval: from the vectors themselves
  kPartials,   // it finishes the reduction itself, each block for its own channel
  kFinished    // the finish kernel has left them in the workspace
};

// Where an on-chip block keeps what in its shared memory, as offsets in bytes. Slots for packs come first.
struct OnChipLayout {
  int64_t scratch = 0;       // sums of warps or rows
  int64_t merged = 0;        // rows: of those, one for each column and helper
  int64_t totals = 0;        // [kOnChipTotals][slab_channels]: what the block has found, for the cluster to read
  int64_t pivots = 0;        // [slab_channels]
  int64_t coefficients = 0;  // [slab_channels]
  int64_t bytes = 0;
};

// An item is what one thread loads at once: of a channel's planes or strided positions (kPlanes), or of one row (kRows).
// Planes: item (i0, i1, j) is pack j of plane (i0, i1). Rows: item (i0, i1, i2) is a row, and a block has block_packs of
// its packs. A block has `chunk` consecutive items.
struct KernelArgs {
  View view[3];        // reduce: x, or dy, x, dx; apply: out, x, dy. The first is never null
  int64_t size[3];     // of i0, i1 and j or i2
  int64_t step[3];     // the mixed-radix digits of the distance between two items of a thread
  int64_t move[3][3];  // for each view, in elements: such a step; what more a row or plane overflowing takes; a group
  int64_t num_items;   // size[0] * size[1] * size[2]
  int64_t chunk;       // items in a block
  int64_t num_splits;  // blocks that share a channel
  int64_t plane_size;  // positions in a plane
  int64_t num_channels;
  int64_t wide_channels;  // rows: channels of a folded row, a multiple of num_channels
  int64_t num_slabs;      // rows: blocks side by side
  int block_packs, block_rows;

  // On chip only. Blocks of a cluster share a channel or a slab; num_splits is their number. So it is of the blocks of a
  // grid, which go through the channels in num_groups groups of so many; a counter for each channel says who has arrived.
  int cluster_size;
  int num_steps, held_steps;  // items of a thread, and how many of them stay on chip
  // Column e of a slab is of its channel e / run_length % slab_channels: planes of run_length elements side by side, or
  // one row of slab_channels (or several, folded).
  int run_length, slab_channels;
  OnChipLayout layout;
  int64_t num_groups;
  int ring_batches, batches_ahead;  // batches that there are slots for, and those of them that wait to be added up
  int* counters;

  double* partials;    // [kNumSums][wide_channels][num_splits]
  void* coefficients;  // [num_channels] of Coefficients<Acc>
  Source source;
  bool backward, training, cumulative;
  double num_positions, momentum, eps, running_limit;

  ChannelVector weight, bias, mean, invstd, running_mean, running_var, stats_mean, stats_var;
  ChannelVector grad_mean, grad_var, dweight, dbias, dmean, dvar;
  int64_t* num_batches_tracked;
};

// Per-channel numbers of the apply pass: out = scale_dy * dy + (scale_x * (x - centre) + shift).
template <typename Acc>
struct alignas(16) Coefficients {
  Acc scale_dy, scale_x, centre, shift;
};

// Sums over a cluster: two rounds of two (statistics) or one of three (backward).
constexpr int kOnChipTotals = 4;

// ---- dynamic shared memory, in bytes ----------------------------------------------------------------------------

// Planes: four numbers for each warp.
BNEXT_HOST_DEVICE constexpr int64_t planes_reduce_shared(int threads, int64_t acc_bytes) {
  return 4 * (threads / 32) * acc_bytes;
}

// Rows: kNumSums numbers for each thread and lane, one count for each row, then the merged sums of the helpers.
BNEXT_HOST_DEVICE constexpr int64_t rows_helpers(int threads, int64_t columns) {
  return threads / columns < kMaxHelpers ? threads / columns : kMaxHelpers;
}
BNEXT_HOST_DEVICE constexpr int64_t rows_counts_offset(int block_rows, int64_t columns, int64_t acc_bytes) {
  return kNumSums * block_rows * columns * acc_bytes;
}
BNEXT_HOST_DEVICE constexpr int64_t rows_merged_offset(int block_rows, int64_t columns, int64_t acc_bytes) {
  return (rows_counts_offset(block_rows, columns, acc_bytes) + block_rows * 4 + 15) / 16 * 16;
}
BNEXT_HOST_DEVICE constexpr int64_t rows_reduce_shared(int threads, int block_rows, int64_t columns,
                                                       int64_t acc_bytes) {
  return rows_merged_offset(block_rows, columns, acc_bytes) + kNumSums * rows_helpers(threads, columns) * columns * 8;
}

// A block-wide sum in float64, and one channel's Coefficients behind it.
BNEXT_HOST_DEVICE constexpr int64_t finish_coefficients_offset(int threads) {
  return (threads / 32 * 8 + 15) / 16 * 16;
}
BNEXT_HOST_DEVICE constexpr int64_t finish_shared(int threads) { return finish_coefficients_offset(threads) + 4 * 8; }

// Rows whose packs divide a warp evenly are added up within each warp before they meet in shared memory.
BNEXT_HOST_DEVICE constexpr int on_chip_parts(int threads, int block_packs) {
  return 32 % block_packs == 0 ? threads / 32 : threads / block_packs;
}
BNEXT_HOST_DEVICE constexpr int on_chip_helpers(int threads, int columns) {
  return threads > columns ? threads / columns : 1;
}

}  // namespace bnext::cuda
