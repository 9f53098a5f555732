// From what the threads of a block have summed up to its partial sums in the workspace, which finish.cuh adds up.
#pragma once

#include "../device/grid.cuh"
#include "../device/reduce.cuh"
#include "elementwise.cuh"

namespace bnext::cuda {

// A number near the mean of what a thread (rows) or a warp (planes) will see: the mean of its first batch. The first
// element alone would do for most data, but not where it is far from all others, as in the black border of an image.
template <bool kRows, typename T, int kVec, int kItems, int kViews, typename Acc>
__device__ inline void find_pivots(const Pack<T, kVec> (&x)[kItems], const Item<T, kViews> (&items)[kItems],
                                   Acc (&pivot)[kVec]) {
  Acc sum[kVec];
  int count = count_positions<kRows>(items);
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    sum[v] = 0;
#pragma unroll
    for (int u = 0; u < kItems; ++u) sum[v] += items[u].has(v) ? widen(x[u].value[v]) : Acc(0);
  }
  if (!kRows) {
    sum[0] = warp_sum(add_lanes(sum));
    count = warp_sum(count);
  }
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    const Acc mean = kRows || v == 0 ? sum[v] / static_cast<Acc>(count > 0 ? count : 1) : pivot[0];
    pivot[v] = is_finite(mean) ? mean : Acc(0);  // NaN and Inf reach the result through the sums
  }
}

__device__ inline void store_partial(const KernelArgs& args, int64_t wide_channel, int64_t split,
                                     const double (&value)[kNumSums]) {
  const int64_t stride = args.wide_channels * args.num_splits;
  double* to = args.partials + wide_channel * args.num_splits + split;
  for (int k = 0; k < kNumSums; ++k) leave_number(to + k * stride, value[k]);
}

// Numbers a block has collected about one channel: sums around pivots that differ from part to part, or plain sums.
// Statistics go in two rounds over the parts: the mean first, then the squares moved to it.
struct MomentsMerge {
  double count = 0, sum = 0, mean = 0, squares = 0;

  __device__ void add(double n, double pivot, double s1) {
    count += n;
    sum += n * pivot + s1;
  }
  __device__ void set_mean() { mean = count > 0 ? sum / count : 0; }
  __device__ void add_squares(double n, double pivot, double s1, double s2) {
    const double distance = mean - pivot;
    squares += s2 - 2 * distance * s1 + n * distance * distance;
  }
};

// Planes: all threads of a block have the same channel. Each warp leaves `value` in shared memory; warp 0 adds up,
// and thread 0 stores.
// kMoments: value is count, pivot, sum, sum of squares. Otherwise the first three are sums.
template <bool kMoments, typename Acc>
__device__ inline void reduce_planes(const KernelArgs& args, const Tile& tile, const Acc (&value)[4], Acc* shared) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  if (lane == 0) {
    for (int k = 0; k < 4; ++k) shared[k * num_warps + warp] = value[k];
  }
  __syncthreads();
  if (warp != 0) return;
  double of_warp[4];  // lane i has what warp i found
  for (int k = 0; k < 4; ++k) of_warp[k] = lane < num_warps ? shared[k * num_warps + lane] : Acc(0);
  double result[kNumSums];
  if (kMoments) {
    MomentsMerge merge;
    merge.add(of_warp[0], of_warp[1], of_warp[2]);
    merge.count = warp_sum(merge.count);
    merge.sum = warp_sum(merge.sum);
    merge.set_mean();
    merge.add_squares(of_warp[0], of_warp[1], of_warp[2], of_warp[3]);
    result[0] = merge.count;
    result[1] = merge.mean;
    result[2] = warp_sum(merge.squares);
  } else {
    for (int k = 0; k < kNumSums; ++k) result[k] = warp_sum(of_warp[k]);
  }
  if (lane == 0) store_partial(args, tile.column, tile.split, result);
}

// Rows: each thread has kVec channels, and all threads of a column of the block the same ones. The column's numbers meet
// in shared memory, where up to kMaxHelpers threads share a channel, and then one of them adds up what the helpers found.
// kMoments: value is pivots, sums, sums of squares, and count how many rows the thread saw. Otherwise three sums.
template <bool kMoments, int kVec, typename Acc>
__device__ inline void reduce_rows(const KernelArgs& args, const Tile& tile, const Acc (&value)[kNumSums][kVec],
                                   int count) {
  const int columns = args.block_packs * kVec, rows = args.block_rows, thread = threadIdx.x;
  unsigned char* shared = shared_memory();
  Acc* values = reinterpret_cast<Acc*>(shared);  // [kNumSums][rows][columns]
  int* counts = reinterpret_cast<int*>(shared + rows_counts_offset(rows, columns, sizeof(Acc)));
  double* merged = reinterpret_cast<double*>(shared + rows_merged_offset(rows, columns, sizeof(Acc)));
  const int row = thread / args.block_packs, pack = thread % args.block_packs;
  if (row < rows) {
    for (int k = 0; k < kNumSums; ++k) {
      for (int v = 0; v < kVec; ++v) values[(k * rows + row) * columns + pack * kVec + v] = value[k][v];
    }
    if (pack == 0) counts[row] = count;
  }
  __syncthreads();

  const int num_helpers = static_cast<int>(rows_helpers(blockDim.x, columns));
  const int column = thread % columns, helper = thread / columns;
  const int64_t wide_channel = tile.column * columns + column;
  auto at = [&](int k, int r) { return static_cast<double>(values[(k * rows + r) * columns + column]); };
  double sum[kNumSums] = {0, 0, 0};
  if (helper < num_helpers) {
    if (kMoments) {
      MomentsMerge merge;
      for (int r = helper; r < rows; r += num_helpers) merge.add(counts[r], at(0, r), at(1, r));
      merge.set_mean();
      for (int r = helper; r < rows; r += num_helpers) merge.add_squares(counts[r], at(0, r), at(1, r), at(2, r));
      sum[0] = merge.count;
      sum[1] = merge.mean;
      sum[2] = merge.squares;
    } else {
      for (int r = helper; r < rows; r += num_helpers) {
        for (int k = 0; k < kNumSums; ++k) sum[k] += at(k, r);
      }
    }
    for (int k = 0; k < kNumSums; ++k) merged[(k * num_helpers + helper) * columns + column] = sum[k];
  }
  __syncthreads();
  if (helper != 0 || wide_channel >= args.wide_channels) return;

  auto found = [&](int k, int h) { return merged[(k * num_helpers + h) * columns + column]; };
  double result[kNumSums] = {0, 0, 0};
  if (kMoments) {
    MomentsMerge merge;
    for (int h = 0; h < num_helpers; ++h) merge.add(found(0, h), found(1, h), 0);
    merge.set_mean();
    for (int h = 0; h < num_helpers; ++h) merge.add_squares(found(0, h), found(1, h), 0, found(2, h));
    result[0] = merge.count;
    result[1] = merge.mean;
    result[2] = merge.squares;
  } else {
    for (int h = 0; h < num_helpers; ++h) {
      for (int k = 0; k < kNumSums; ++k) result[k] += found(k, h);
    }
  }
  store_partial(args, wide_channel, tile.split, result);
}

}  // namespace bnext::cuda
