// The streaming family: any shape, layout, dtype and architecture. A reduce kernel leaves one set of sums per block in the
// workspace; an apply kernel, which starts with what the reduce kernel read last, reads the tensors again. In eval the
// backward pass is the reduce kernel alone: dx does not wait for the sums.
#pragma once

#include "elementwise.cuh"
#include "finish.cuh"
#include "partials.cuh"

namespace bnext::cuda {

// ---- reduce ------------------------------------------------------------------------------------------------------

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
    reduce_planes<true>(args, tile, value, reinterpret_cast<Acc*>(shared_memory()));
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
    reduce_planes<false>(args, tile, value, reinterpret_cast<Acc*>(shared_memory()));
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
