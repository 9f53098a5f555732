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

// What a thread has in flight where it reads one tensor. Masks, and addresses of single elements, leave fewer
// registers.
template <int kVec, bool kWhole>
constexpr int kOfOneTensor = kWhole && kVec > 1 ? kUnrollOne : kUnroll;

// The channel of the tensors that is the block's channel i, or -1.
__device__ inline int64_t find_channel(const KernelArgs& args, const Tile& tile, int i) {
  const int64_t channel = tile_channel(args, tile, i);
  if (channel >= args.tile_channels) return -1;
  if (args.tile_channels == args.num_channels) return channel;
  return args.by_channels.remainder(static_cast<unsigned>(channel));
}

// Of the columns of a folded row that are the same channel, this one answers for it.
__device__ inline bool is_first_column(const KernelArgs& args, const Tile& tile, int i) {
  return tile_channel(args, tile, i) < args.num_channels;
}

// What vectors have of the block's channels, for all threads after a barrier.
__device__ inline void leave_tile_inputs(const KernelArgs& args, const Tile& tile, bool backward) {
  auto channel_of = [&](int i) { return find_channel(args, tile, i); };
  leave_inputs(args, backward, ask_for_input(args, backward, channel_of), shared_at<double>(args.layout.inputs),
               channel_of, [](int, int, double) {});
}

__device__ inline Inputs tile_inputs(const KernelArgs& args, bool backward, int i) {
  return inputs_of(backward, args.slab_channels, shared_at<double>(args.layout.inputs), i);
}

// By each lane of a group, or by one thread alone: the coefficients of the block's channel i to shared memory, and what
// there is to be stored of it, if this block is to do it, once for each channel.
template <bool kRows, int kVec, typename Acc>
__device__ inline void leave_finished(const KernelArgs& args, const Tile& tile, bool backward, bool write, int i,
                                      const Inputs& inputs, const Finished<Acc>& found, int lane, int lanes) {
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  if (lane == 0) shared[place_of_channel<kRows, kVec>(args, i)] = found.coefficients;
  if (!write || !is_first_column(args, tile, i)) return;
  store_outputs(args, backward, find_channel(args, tile, i), inputs, found, lane, lanes);
}

// What the block's channels are mapped with where it follows from vectors alone, for all threads after a barrier.
template <bool kRows, int kVec, typename Acc>
__device__ inline void leave_constants(const KernelArgs& args, const Tile& tile, bool backward, bool write) {
  leave_tile_inputs(args, tile, backward);
  __syncthreads();
  for_each_channel<kRows>(args, [&](int i) {
    if (find_channel(args, tile, i) < 0) return;
    const Inputs inputs = tile_inputs(args, backward, i);
    leave_finished<kRows, kVec>(args, tile, backward, write, i, inputs, finish_constant<Acc>(args, backward, inputs), 0,
                                1);
  });
}

// The same where it follows from the partial sums that the kernel before has left.
template <bool kRows, int kVec, typename Acc>
__device__ inline void leave_from_partials(const KernelArgs& args, const Tile& tile, bool backward, bool write) {
  leave_tile_inputs(args, tile, backward);
  wait_for_kernels();
  __syncthreads();
  for_each_group<kRows>(args, args.slab_channels, [&](int i, int lane, bool there) {
    const int64_t channel = find_channel(args, tile, i);
    const ChannelTotals totals =
        group_partial_totals(args, backward, channel < 0 ? 0 : channel, lane, args.group_lanes);
    if (!there || channel < 0) return;
    const Inputs inputs = tile_inputs(args, backward, i);
    const auto found = finish_channel<Acc>(args, backward, totals, inputs);
    leave_finished<kRows, kVec>(args, tile, backward, write, i, inputs, found, lane, args.group_lanes);
  });
}

// ---- reduce ------------------------------------------------------------------------------------------------------

// The block's sums to the workspace, where finish.cuh finds them.
template <bool kRows, bool kMoments, int kVec, typename Acc>
__device__ inline void store_partials(const KernelArgs& args, const Tile& tile) {
  leave_block_totals<kRows, kMoments, kVec, Acc>(args, tile, [&](int, int64_t channel, const ChannelTotals& totals) {
    const int64_t stride = args.tile_channels * args.num_splits;
    double* to = args.partials + channel * args.num_splits + tile.split;
    for (int k = 0; k < kNumSums; ++k) to[k * stride] = totals.value[k];
  });
}

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
  constexpr int kItems = kOfOneTensor<kVec, kWhole>;
  const int steps = num_steps(args, tile);
  for (int step = 0; step < steps; step += kItems) {
    Item<T, kVec, kWhole, 1> items[kItems];
    Pack<T, kVec> x[kItems];
#pragma unroll
    for (auto& item : items) item = cursor.next();
    load_batch<Cache::kKeep>(x, items, 0);
    if (step == 0) find_pivots<kRows>(args, x, items, pivot);
    add_moments(x, items, pivot, s1, s2);
    count += count_positions<kRows>(items);
    if (step + kItems == kPivotItems) move_pivots<kRows>(args, pivot, s1, s2, count);
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
  const int steps = num_steps(args, tile);
  for (int step = 0; step < steps; step += kItems) {
    Item<T, kVec, kWhole, kViews> items[kItems];
    Pack<T, kVec> dy[kItems], x[kItems];
#pragma unroll
    for (auto& item : items) item = cursor.next();
    load_batch<kUse>(dy, items, 0);
    if (has_x) {
      load_batch<kUse>(x, items, 1);
    } else {
      for (auto& pack : x) pack = {};
    }
    if (step == 0) {
      leave_constants<kRows, kVec, Acc>(args, tile, true, false);
      __syncthreads();
      const auto* shared = shared_at<const Coefficients<Acc>>(args.layout.coefficients);
      int place[kVec];
      find_places<kRows>(args, place);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const Coefficients<Acc>& of_channel = shared[place[v]];
        mean[v] = has_x ? of_channel.centre : Acc(0);
        scale[v] = of_channel.scale_dy;
      }
    }
    add_gradients(x, dy, items, mean, sum);
    if constexpr (kWritesDx) {
#pragma unroll
      for (int u = 0; u < kItems; ++u) {
        Acc dx[kVec];
        widen_pack(dx, dy[u]);
#pragma unroll
        for (int v = 0; v < kVec; ++v) dx[v] *= scale[v];
        store_item(narrow_pack<T>(dx), items[u], 2);
      }
    }
  }
  leave_sums<kRows>(args, sum);
  __syncthreads();
  store_partials<kRows, false, kVec, Acc>(args, tile);
}

// ---- apply -------------------------------------------------------------------------------------------------------

// What this thread's elements are mapped with, from wherever the plan says.
template <bool kRows, int kTensors, int kVec, typename Acc>
__device__ inline void load_coefficients(const KernelArgs& args, const Tile& tile, Coefficients<Acc> (&found)[kVec]) {
  const auto* shared = shared_at<const Coefficients<Acc>>(args.layout.coefficients);
  const bool writes = tile.split == 0;
  // Of two tensors it is training's backward pass.
  if (kTensors == 1 && args.source == Source::kConstants)
    leave_constants<kRows, kVec, Acc>(args, tile, args.backward, writes);
  if (args.source == Source::kPartials) leave_from_partials<kRows, kVec, Acc>(args, tile, args.backward, writes);
  wait_for_kernels();
  if (args.source != Source::kFinished) __syncthreads();
  const bool finished = args.source == Source::kFinished;
  int at[kVec];
  finished ? find_slab_channels<kRows>(args, at) : find_places<kRows>(args, at);
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    if (!kRows && v > 0) {
      found[v] = found[0];
    } else if (finished) {
      const int64_t channel = find_channel(args, tile, at[v]);
      found[v] = load_from_l2(static_cast<const Coefficients<Acc>*>(args.coefficients) + (channel < 0 ? 0 : channel));
    } else {
      found[v] = shared[at[v]];
    }
  }
  if constexpr (kTensors == 1) {
    if (!args.backward) return;
    // Of dy alone it is scale_x * (dy - centre) + shift, too, with the zero that changes no other zero's sign.
#pragma unroll
    for (int v = 0; v < kVec; ++v) found[v] = {Acc(0), found[v].scale_dy, Acc(0), -Acc(0)};
  }
}

// out = scale_dy * dy + (scale_x * (x - centre) + shift), of two tensors, x and dy. Of one: forward without the first
// term, and eval's dx, which is a multiple of dy.
template <typename T, int kVec, bool kRows, bool kWhole, int kTensors>
__global__ void __launch_bounds__(kMaxThreads, kStreamingBlocksPerSm)
    streaming_apply_kernel(const __grid_constant__ KernelArgs args) {
  using Acc = accumulate_t<T>;
  const Tile tile = make_tile<kRows>(args, true);
  Cursor<T, kVec, kRows, kWhole, 1 + kTensors> cursor(args, tile);

  Coefficients<Acc> coefficients[kVec] = {};
  constexpr bool kAskFirst = kWhole;  // packs that planes share leave no registers for it
  if (!kAskFirst) load_coefficients<kRows, kTensors>(args, tile, coefficients);
  constexpr int kItems = kOfOneTensor<kVec, kWhole> / kTensors;
  const int steps = num_steps(args, tile);
  for (int step = 0; step < steps; step += kItems) {
    Item<T, kVec, kWhole, 1 + kTensors> items[kItems];
    Pack<T, kVec> packs[kTensors][kItems];
#pragma unroll
    for (auto& item : items) item = cursor.next();
#pragma unroll
    for (int t = 0; t < kTensors; ++t) load_batch<Cache::kLastUse>(packs[t], items, 1 + t);
    if (kAskFirst && step == 0) load_coefficients<kRows, kTensors>(args, tile, coefficients);
#pragma unroll
    for (int u = 0; u < kItems; ++u) {
      if (u == kItems / 2 && step + u >= steps) break;  // for small tensors
      if constexpr (kTensors == 1) {
        store_item(map_pack(coefficients, packs[0][u]), items[u], 0);
      } else {
        store_item(map_pack(coefficients, packs[0][u], packs[1][u]), items[u], 0);
      }
    }
  }
}

}  // namespace bnext::cuda
