// The streaming family: any shape, layout, dtype and architecture. A reduce kernel leaves one set of sums per block in the
// workspace; an apply kernel, which starts with what the reduce kernel read last, reads the tensors again. In eval the
// backward pass is the reduce kernel alone: dx does not wait for the sums.
#pragma once

#include "elementwise.cuh"
#include "finish.cuh"

namespace bnext::cuda {

// ---- from a thread's sums to the workspace -----------------------------------------------------------------------

__device__ inline void store_partial(const KernelArgs& args, int64_t wide_channel, int64_t split,
                                     const double (&value)[kNumSums]) {
  const int64_t stride = args.wide_channels * args.num_splits;
  double* to = args.partials + wide_channel * args.num_splits + split;
  for (int k = 0; k < kNumSums; ++k) to[k * stride] = value[k];
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

// Planes: all threads of a block have the same channel. Each warp leaves `value` in shared memory; warp 0 adds up.
// kMoments: value is count, pivot, sum, sum of squares. Otherwise the first three are sums.
template <bool kMoments, typename Acc>
__device__ inline void reduce_planes(const KernelArgs& args, const Tile& tile, const Acc (&value)[4]) {
  Acc* shared = reinterpret_cast<Acc*>(shared_memory());
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

// ---- reduce ------------------------------------------------------------------------------------------------------

// A number near the mean of what a thread (rows) or a warp (planes) will see: the mean of its first batch. The first
// element alone would do for most data, but not where it is far from all others, as in the black border of an image.
template <bool kRows, typename T, int kVec, typename Acc>
__device__ inline void find_pivots(const Pack<T, kVec> (&x)[kUnroll], const Item<T, 1> (&items)[kUnroll],
                                   Acc (&pivot)[kVec]) {
  Acc sum[kVec];
  int count = count_positions<kRows>(items);
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    sum[v] = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum[v] += items[u].has(v) ? widen(x[u].value[v]) : Acc(0);
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

// Statistics of x. Sums are of x - pivot, and every part is moved to the common mean when parts are merged.
template <typename T, int kVec, bool kRows, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 2) streaming_statistics_kernel(const KernelArgs args) {
  using Acc = accumulate_t<T>;
  const Tile tile = make_tile<kRows>(args, false);
  Cursor<T, kVec, kRows, kWhole, 1> cursor(args, tile);
  // Nobody else reads it before this kernel ends.
  if (args.num_batches_tracked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*args.num_batches_tracked;

  constexpr int kLanes = kSumLanes<kRows, kVec>;
  Acc pivot[kVec] = {}, s1[kLanes] = {}, s2[kLanes] = {};
  int count = 0;
  const int batches = num_batches<kRows>(args, tile);
  for (int b = 0; b < batches; ++b) {
    Item<T, 1> items[kUnroll];
    Pack<T, kVec> x[kUnroll];
    for (auto& item : items) item = cursor.next();
    load_batch<Cache::kKeep, kWhole>(x, items, 0);
    if (b == 0) find_pivots<kRows>(x, items, pivot);
    add_moments(x, items, pivot, s1, s2);
    count += count_positions<kRows>(items);
  }
  if constexpr (kRows) {
    Acc value[kNumSums][kVec];
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      value[0][v] = pivot[v];
      value[1][v] = s1[v];
      value[2][v] = s2[v];
    }
    reduce_rows<true, kVec>(args, tile, value, count);
  } else {
    const Acc value[4] = {static_cast<Acc>(warp_sum(count)), pivot[0], warp_sum(add_lanes(s1)),
                          warp_sum(add_lanes(s2))};
    reduce_planes<true>(args, tile, value);
  }
}

// Sums of dy, dy * (x - mean) and x - mean, or of dy alone where x is null. kWritesDx is for eval: dx = scale * dy on the
// way, and with halves, or packs that planes share, fewer packs at once, because there are not enough registers.
template <typename T, int kVec, bool kRows, bool kWhole, bool kWritesDx>
__global__ void __launch_bounds__(kMaxThreads, 2) streaming_backward_reduce_kernel(const KernelArgs args) {
  using Acc = accumulate_t<T>;
  const Tile tile = make_tile<kRows>(args, false);
  constexpr int kViews = kWritesDx ? 3 : 2, kItems = kWritesDx && (kVec == 8 || !kWhole) ? kUnroll / 2 : kUnroll;
  Cursor<T, kVec, kRows, kWhole, kViews> cursor(args, tile);
  const bool has_x = args.view[1].data != nullptr;

  constexpr int kLanes = kSumLanes<kRows, kVec>;
  Acc mean[kVec], scale[kVec], sum[kNumSums][kLanes] = {};
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    const bool same = !kRows && v > 0;  // planes: one channel
    const int64_t c = lane_channel<kRows, kVec>(args, tile, v);
    mean[v] = same ? mean[0] : has_x ? static_cast<Acc>(load_channel(args.mean, c, 0)) : Acc(0);
    scale[v] = same ? scale[0] : kWritesDx ? constant_coefficients<Acc>(args, c, false).scale_dy : Acc(0);
  }
  const int batches = num_batches<kRows>(args, tile) * (kUnroll / kItems);
  for (int b = 0; b < batches; ++b) {
    Item<T, kViews> items[kItems];
    Pack<T, kVec> dy[kItems], x[kItems];
    for (auto& item : items) item = cursor.next();
    load_batch<Cache::kKeep, kWhole>(dy, items, 0);
    if (has_x) {
      load_batch<Cache::kKeep, kWhole>(x, items, 1);
    } else {
      for (auto& pack : x) pack = {};
    }
    add_gradients(x, dy, items, mean, sum);
    if constexpr (kWritesDx) {
#pragma unroll
      for (int u = 0; u < kItems; ++u) {
        Pack<T, kVec> dx;
#pragma unroll
        for (int v = 0; v < kVec; ++v) narrow(dx.value[v], scale[v] * widen(dy[u].value[v]));
        store_item<kWhole>(dx, items[u], 2);
      }
    }
  }
  if constexpr (kRows) {
    reduce_rows<false, kVec>(args, tile, sum, 0);
  } else {
    Acc value[4] = {};
    for (int k = 0; k < kNumSums; ++k) value[k] = warp_sum(add_lanes(sum[k]));
    reduce_planes<false>(args, tile, value);
  }
}

// ---- apply -------------------------------------------------------------------------------------------------------

// out = scale_dy * dy + (scale_x * (x - centre) + shift), without the part whose tensor is null. Forward has no dy, and
// eval's dx no x.
template <typename T, int kVec, bool kRows, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 2) streaming_apply_kernel(const KernelArgs args) {
  using Acc = accumulate_t<T>;
  const Tile tile = make_tile<kRows>(args, true);
  Cursor<T, kVec, kRows, kWhole, 3> cursor(args, tile);
  const bool has_x = args.view[1].data != nullptr, has_dy = args.view[2].data != nullptr;

  Coefficients<Acc> of_block;
  if (!kRows && args.source == Source::kPartials) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    auto* shared = reinterpret_cast<Coefficients<Acc>*>(shared_memory() + finish_coefficients_offset(blockDim.x));
    const ChannelTotals totals = merge_partials(args, tile.column, scratch);
    if (threadIdx.x == 0) *shared = finish_channel<Acc>(args, tile.column, totals, tile.split == 0);
    __syncthreads();
    of_block = *shared;
  }
  Coefficients<Acc> coefficients[kVec];
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    const int64_t c = lane_channel<kRows, kVec>(args, tile, v);
    if (!kRows && v > 0) {
      coefficients[v] = coefficients[0];
    } else if (!kRows && args.source == Source::kPartials) {
      coefficients[v] = of_block;
    } else if (args.source == Source::kFinished) {
      coefficients[v] = static_cast<const Coefficients<Acc>*>(args.coefficients)[c];
    } else {
      const bool first_row =
          kRows ? static_cast<int>(threadIdx.x) < args.block_packs && !cursor.idle() : threadIdx.x == 0;
      coefficients[v] = constant_coefficients<Acc>(args, c, first_row && tile.split == 0);
    }
  }
  constexpr int kItems = kWhole ? kUnroll : kUnroll / 2;
  const int batches = num_batches<kRows>(args, tile) * (kUnroll / kItems);
  for (int b = 0; b < batches; ++b) {
    Item<T, 3> items[kItems];
    Pack<T, kVec> x[kItems], dy[kItems];
    for (auto& item : items) item = cursor.next();
    if (has_x) load_batch<Cache::kLastUse, kWhole>(x, items, 1);
    if (has_dy) load_batch<Cache::kLastUse, kWhole>(dy, items, 2);
#pragma unroll
    for (int u = 0; u < kItems; ++u) {
      store_item<kWhole>(map_pack(coefficients, x[u], dy[u], has_x, has_dy), items[u], 0);
    }
  }
}

}  // namespace bnext::cuda
