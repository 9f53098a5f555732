// The streaming family: any shape, layout, dtype and architecture. A reduce kernel leaves one set of sums per block in
// the workspace; an apply kernel, which starts with what the reduce kernel read last, reads the tensors again. In eval
// the backward pass is the reduce kernel alone: dx does not wait for the sums.
//
// A block asks for its first batch before it looks at anything else: two trips to memory at once, not one after the
// other. The kernels of a pass overlap: that batch is on its way before the kernel before has ended, which only reads
// it.
#pragma once

#include "elementwise.cuh"
#include "finish.cuh"

namespace bnext::cuda {

// The channel of the tensors that is the block's channel i, if there is one.
__device__ inline bool find_channel(const KernelArgs& args, const Tile& tile, int i, int64_t& channel) {
  channel = tile_channel(args, tile, i);
  const bool there = channel < args.tile_channels;
  if (!there) channel = 0;
  if (args.tile_channels > args.num_channels) channel = args.by_channels.remainder(static_cast<unsigned>(channel));
  return there;
}

// Of the columns of a folded row that are the same channel, this one answers for it.
__device__ inline bool is_first_column(const KernelArgs& args, const Tile& tile, int i) {
  return tile_channel(args, tile, i) < args.num_channels;
}

// What the block's channels are mapped with where it follows from vectors alone, to shared memory, for all threads
// after a barrier. `write`: the results as well, once for each channel.
template <bool kRows, typename Acc>
__device__ inline void leave_constants(const KernelArgs& args, const Tile& tile, bool backward, bool write) {
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  for_each_group<kRows>(args, [&](int i, int lane, bool there, int) {
    int64_t channel;
    there = find_channel(args, tile, i, channel) && there;
    const double input = load_input(args, channel, lane);
    const double output = finish_constant<Acc>(args, backward, input, lane, [&](const Coefficients<Acc>& coefficients) {
      if (there && lane == 0) shared[i] = coefficients;
    });
    if (there && write && is_first_column(args, tile, i)) store_output(args, channel, lane, output);
  });
}

// ---- reduce ------------------------------------------------------------------------------------------------------

// Statistics of x. Sums are of x - pivot, and every part is moved to the common mean when parts are merged.
template <typename T, int kVec, bool kRows, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, kStreamingBlocksPerSm)
    streaming_statistics_kernel(const __grid_constant__ KernelArgs args) {
  using Acc = accumulate_t<T>;
  const Tile tile = make_tile<kRows>(args, false);
  Cursor<T, kVec, kRows, kWhole, 1> cursor(args, tile);
  start_next_kernel();
  count_batch(args, true);  // finish kernels may read it, and wait

  constexpr int kElements = kSumElements<kRows, kVec>;
  Acc pivot[kVec] = {}, s1[kElements] = {}, s2[kElements] = {};
  int count = 0;
  const int batches = num_batches(args, tile);
  for (int b = 0; b < batches; ++b) {
    Item<T, 1> items[kUnroll];
    Pack<T, kVec> x[kUnroll];
    for (auto& item : items) item = cursor.next();
    load_batch<Cache::kKeep, kWhole>(x, items, 0);
    if (b == 0) find_pivots<kRows>(args, x, items, pivot);
    add_moments(x, items, pivot, s1, s2);
    count += count_positions<kRows>(items);
    if (b + 1 == kPivotItems / kUnroll) move_pivots<kRows>(args, pivot, s1, s2, count);
  }
  leave_moments<kRows>(args, pivot, s1, s2, count);
  __syncthreads();
  store_partials<kRows, true, kVec, Acc>(args, tile);
}

// Sums of dy, dy * (x - mean) and x - mean, or of dy alone where x is null. kWritesDx is for eval: dx = scale * dy on
// the way, and with halves, or packs that planes share, fewer packs at once, because there are not enough registers.
template <typename T, int kVec, bool kRows, bool kWhole, bool kWritesDx>
__global__ void __launch_bounds__(kMaxThreads, kStreamingBlocksPerSm)
    streaming_backward_reduce_kernel(const __grid_constant__ KernelArgs args) {
  using Acc = accumulate_t<T>;
  const Tile tile = make_tile<kRows>(args, false);
  constexpr int kViews = kWritesDx ? 3 : 2, kItems = kWritesDx && (kVec == 8 || !kWhole) ? kUnroll / 2 : kUnroll;
  Cursor<T, kVec, kRows, kWhole, kViews> cursor(args, tile);
  const bool has_x = args.view[1].data != nullptr;
  constexpr Cache kUse = kWritesDx ? Cache::kLastUse : Cache::kKeep;
  start_next_kernel();

  constexpr int kElements = kSumElements<kRows, kVec>;
  Acc mean[kVec] = {}, scale[kVec] = {}, sum[kNumSums][kElements] = {};
  const int batches = num_batches(args, tile) * (kUnroll / kItems);
  for (int b = 0; b < batches; ++b) {
    Item<T, kViews> items[kItems];
    Pack<T, kVec> dy[kItems], x[kItems];
    for (auto& item : items) item = cursor.next();
    load_batch<kUse, kWhole>(dy, items, 0);
    if (has_x) {
      load_batch<kUse, kWhole>(x, items, 1);
    } else {
      for (auto& pack : x) pack = {};
    }
    if (b == 0) {
      leave_constants<kRows, Acc>(args, tile, true, false);
      __syncthreads();
      const auto* shared = shared_at<const Coefficients<Acc>>(args.layout.coefficients);
      int channel[kVec];
      find_slab_channels<kRows>(args, channel);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const Coefficients<Acc>& of_channel = shared[channel[v]];
        mean[v] = has_x ? of_channel.centre : Acc(0);
        scale[v] = of_channel.scale_dy;
      }
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
  leave_sums<kRows>(args, sum);
  __syncthreads();
  store_partials<kRows, false, kVec, Acc>(args, tile);
}

// ---- apply -------------------------------------------------------------------------------------------------------

// What this thread's elements are mapped with, from wherever the plan says.
template <bool kRows, int kVec, typename Acc>
__device__ inline void load_coefficients(const KernelArgs& args, const Tile& tile, Coefficients<Acc> (&found)[kVec]) {
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  if (args.source == Source::kConstants) leave_constants<kRows, Acc>(args, tile, args.backward, tile.split == 0);
  if (args.source == Source::kPartials) {
    for_each_group<kRows>(args, [&](int i, int lane, bool there, int) {
      int64_t channel;
      there = find_channel(args, tile, i, channel) && there;
      const bool writes = there && tile.split == 0 && is_first_column(args, tile, i);
      const double input = load_input(args, channel, lane);
      wait_for_kernels();
      const ChannelTotals totals = group_partial_totals(args, channel, lane, args.group_lanes);
      const double output =
          finish_group<Acc>(args, args.backward, totals, input, lane, [&](const Coefficients<Acc>& coefficients) {
            if (there && lane == 0) shared[i] = coefficients;
          });
      if (writes) store_output(args, channel, lane, output);
    });
  }
  wait_for_kernels();
  if (args.source != Source::kFinished) __syncthreads();
  int slab_channel[kVec];
  find_slab_channels<kRows>(args, slab_channel);
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    const int i = slab_channel[v];
    if (!kRows && v > 0) {
      found[v] = found[0];
    } else if (args.source == Source::kFinished) {
      int64_t channel;
      find_channel(args, tile, i, channel);
      found[v] = load_from_l2(static_cast<const Coefficients<Acc>*>(args.coefficients) + channel);
    } else {
      found[v] = shared[i];
    }
  }
}

// out = scale_dy * dy + (scale_x * (x - centre) + shift), without the part whose tensor is null. Forward has no dy, and
// eval's dx no x.
template <typename T, int kVec, bool kRows, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, kStreamingBlocksPerSm)
    streaming_apply_kernel(const __grid_constant__ KernelArgs args) {
  using Acc = accumulate_t<T>;
  const Tile tile = make_tile<kRows>(args, true);
  Cursor<T, kVec, kRows, kWhole, 3> cursor(args, tile);
  const bool has_x = args.view[1].data != nullptr, has_dy = args.view[2].data != nullptr;

  Coefficients<Acc> coefficients[kVec] = {};
  constexpr bool kAskFirst = kWhole;  // packs that planes share leave no registers for it
  if (!kAskFirst) load_coefficients<kRows>(args, tile, coefficients);
  constexpr int kItems = kWhole ? kUnroll : kUnroll / 2;
  const int batches = num_batches(args, tile) * (kUnroll / kItems);
  for (int b = 0; b < batches; ++b) {
    Item<T, 3> items[kItems];
    Pack<T, kVec> x[kItems], dy[kItems];
    for (auto& item : items) item = cursor.next();
    if (has_x) load_batch<Cache::kLastUse, kWhole>(x, items, 1);
    if (has_dy) load_batch<Cache::kLastUse, kWhole>(dy, items, 2);
    if (kAskFirst && b == 0) load_coefficients<kRows>(args, tile, coefficients);
#pragma unroll
    for (int u = 0; u < kItems; ++u) {
      store_item<kWhole>(map_pack(coefficients, x[u], dy[u], has_x, has_dy), items[u], 0);
    }
  }
}

}  // namespace bnext::cuda
