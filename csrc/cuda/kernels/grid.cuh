// The grid family: a channel is shared by so many blocks that it fits on chip, up to all that run at once, and blocks wait
// for each other at a counter in global memory. That takes time, so blocks never wait with nothing to do: they work
// through a sequence of batches, of one channel after the other, and what one step of a thread does is
//   map   y or dx of a batch of the channel before, from its slots, which are free then
//   copy  ask for a later batch of this channel, or of the next one, which goes to these slots
//   sum   what has been asked for some steps ago
// Between the last sum of a channel and its first map are some steps, and the part of the next channel that has no slots,
// if there is one: that is the time in which the sums of all blocks arrive.
#pragma once

#include "finish.cuh"
#include "slots.cuh"

namespace bnext::cuda {

__device__ inline Tile grid_tile(const KernelArgs& args, int64_t channel) {
  return {channel, blockIdx.x % args.num_splits};
}

// Where a block is in its sequence of held batches: those of its first channel, then of its second, and so on.
template <typename Steps>
struct Position {
  int channel, batch = 0;
  Steps steps;

  __device__ explicit Position(const KernelArgs& args)
      : channel(static_cast<int>(blockIdx.x / args.num_splits)), steps(args, grid_tile(args, channel)) {}

  __device__ bool is_there(const KernelArgs& args) const { return channel < args.num_channels; }
  __device__ bool begins_channel() const { return batch == 0; }

  // To the first batch of a channel; what has no slots comes before it. Not sooner than needed: it takes registers.
  __device__ void enter_channel(const KernelArgs& args) {
    steps = Steps(args, grid_tile(args, channel), args.num_steps - args.held_steps);
  }

  // To the next batch. `steps` has moved on by itself.
  __device__ void advance(const KernelArgs& args) {
    if (++batch * kOnChipBatch < args.held_steps) return;
    batch = 0;
    channel += static_cast<int>(args.num_groups);
  }
};

// The sequence. begin(channel), then sum(batch) for all its batches, then end(channel); some steps later finish(channel),
// then map(batch) for all of them again. All threads take the same way.
template <typename Data, typename Begin, typename Sum, typename End, typename Finish, typename Map>
__device__ inline void run_sequence(const KernelArgs& args, Begin begin, Sum sum, End end, Finish finish, Map map) {
  Position<typename Data::Steps> copied(args), summed(args), mapped(args);
  const int streamed = (args.num_steps - args.held_steps) / kOnChipBatch;
  int place = 0;  // in the ring: of what is mapped next, and copied to then
  auto copy = [&] {
    if (copied.is_there(args)) {
      if (copied.begins_channel()) copied.enter_channel(args);
      Data::copy(copied.steps, place);
      copied.advance(args);
    }
    commit_async();  // also an empty group: they are counted
    if (++place == args.ring_batches) place = 0;
  };
  for (int i = 0; i < args.batches_ahead; ++i) copy();
  for (int step = args.batches_ahead - args.ring_batches; mapped.is_there(args); ++step) {
    if (summed.is_there(args) && summed.begins_channel()) {
      begin(summed.channel);
      Data::stream(args, grid_tile(args, summed.channel), 0, streamed, sum);
      summed.enter_channel(args);
    }
    if (step >= 0) {
      if (mapped.begins_channel()) {
        finish(grid_tile(args, mapped.channel));
        Data::stream_backwards(args, grid_tile(args, mapped.channel), 0, streamed, map);
        mapped.enter_channel(args);
      }
      map(Data::held(mapped.steps, place));
      mapped.advance(args);
    }
    copy();
    if (!summed.is_there(args)) continue;
    wait_async_but(args.batches_ahead);
    const int arrived = place - 1 - args.batches_ahead;
    sum(Data::held(summed.steps, arrived < 0 ? arrived + args.ring_batches : arrived));
    const int channel = summed.channel;
    summed.advance(args);
    if (summed.begins_channel()) end(grid_tile(args, channel));
  }
}

// One number for all lanes of a pack: a block has one channel.
template <int kVec, typename Value>
__device__ inline void for_all_lanes(Value (&to)[kVec], const Value& value) {
#pragma unroll
  for (int v = 0; v < kVec; ++v) to[v] = value;
}

// y or dx of a batch. Backward has dy, which is the second of two tensors.
template <bool kWhole, bool kBackward, int kVec, typename Batch, typename Acc>
__device__ inline void map_batch(const Coefficients<Acc>& of_channel, const Batch& batch) {
  Coefficients<Acc> coefficients[kVec];
  for_all_lanes(coefficients, of_channel);
#pragma unroll
  for (int u = 0; u < kOnChipBatch; ++u) {
    const auto out = map_pack(coefficients, batch.pack[0][u], batch.pack[kBackward][u], true, kBackward);
    store_item<kWhole>(out, batch.items[u], 0);
  }
}

// Leaves the block's sums of a channel for the other blocks, when its parts have left theirs. Between two calls is one of
// finish_grid, whose barrier lets nobody write to the shared memory that warp 0 still reads.
template <bool kMoments, int kVec, typename Acc>
__device__ inline void leave_block_sums(const KernelArgs& args, const Tile& tile) {
  __syncthreads();
  store_partials<kMoments, kVec, Acc>(args, tile);
  if (threadIdx.x == 0) arrive_at(args.counters + tile.column);  // it has stored them
}

// When the sums of all blocks are there: from them to coefficients, every block for itself. One warp does it: the others
// have nothing to do meanwhile. It asks for what it can before it waits. What it overwrites has been read: there was a
// barrier of leave_block_sums since.
template <bool kBackward, typename Acc>
__device__ inline Coefficients<Acc> finish_grid(const KernelArgs& args, const Tile& tile) {
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  if (threadIdx.x < kWarpSize) {
    const int lane = threadIdx.x;
    const double input = load_input(args, tile.column, lane);
    wait_at(args.counters + tile.column, static_cast<int>(args.num_splits));
    PartialSums sums = add_partials(args, kBackward, tile.column, lane, kWarpSize);
    group_sum(args, sums.value);
    const ChannelTotals totals = partial_totals(args, kBackward, sums);
    const auto found = finish_group<Acc>(args, kBackward, tile.column, lane, totals, input, tile.split == 0);
    if (lane == 0) *shared = found;
  }
  __syncthreads();
  return *shared;
}

template <typename T, int kVec, bool kWhole>
__global__ void __launch_bounds__(kMaxOnChipThreads, 1) grid_forward_kernel(const __grid_constant__ KernelArgs args) {
  using Acc = accumulate_t<T>;
  using Data = Slots<T, kVec, false, kWhole, 1>;
  using Batch = typename Data::Batch;
  constexpr int kLanes = kSumLanes<false, kVec>;
  count_batch(args);
  // Of a channel: sums around the mean of the first batch that a warp sees of it, as in streaming.
  Acc of_warp = 0, s1[kLanes] = {}, s2[kLanes] = {};
  int count = 0, batches = 0;
  Coefficients<Acc> of_channel = {};
  run_sequence<Data>(
      args,
      [&](int) {
        for_all_lanes(s1, Acc(0));
        for_all_lanes(s2, Acc(0));
        count = batches = 0;
      },
      [&](const Batch& batch) {
        Acc pivot[kVec];
        for_all_lanes(pivot, of_warp);
        if (batches == 0) find_pivots<false>(args, batch.pack[0], batch.items, pivot);
        add_moments(batch.pack[0], batch.items, pivot, s1, s2);
        count += count_positions<false>(batch.items);
        if (++batches == kPivotItems / kOnChipBatch) move_pivots<false>(args, pivot, s1, s2, count);
        of_warp = pivot[0];
      },
      [&](const Tile& tile) {
        const Acc pivot[1] = {of_warp};
        leave_moments<false>(args, pivot, s1, s2, count);
        leave_block_sums<true, kVec, Acc>(args, tile);
      },
      [&](const Tile& tile) { of_channel = finish_grid<false, Acc>(args, tile); },
      [&](const Batch& batch) { map_batch<kWhole, false, kVec>(of_channel, batch); });
}

template <typename T, int kVec, bool kWhole>
__global__ void __launch_bounds__(kMaxOnChipThreads, 1) grid_backward_kernel(const __grid_constant__ KernelArgs args) {
  using Acc = accumulate_t<T>;
  using Data = Slots<T, kVec, false, kWhole, 2>;
  using Batch = typename Data::Batch;
  constexpr int kLanes = sizeof(Acc) == 8 ? 1 : kSumLanes<false, kVec>;  // more sums in float64 spill
  Acc channel_mean = 0, sum[kNumSums][kLanes] = {};
  Coefficients<Acc> of_channel = {};
  run_sequence<Data>(
      args,
      [&](int channel) {
        channel_mean = static_cast<Acc>(load_channel(args.input[backward::kMean], channel, 0));
        for (auto& lanes : sum) for_all_lanes(lanes, Acc(0));
      },
      [&](const Batch& batch) {
        Acc mean[kVec];
        for_all_lanes(mean, channel_mean);
        add_gradients(batch.pack[0], batch.pack[1], batch.items, mean, sum);
      },
      [&](const Tile& tile) {
        leave_sums<false>(args, sum);
        leave_block_sums<false, kVec, Acc>(args, tile);
      },
      [&](const Tile& tile) { of_channel = finish_grid<true, Acc>(args, tile); },
      [&](const Batch& batch) { map_batch<kWhole, true, kVec>(of_channel, batch); });
}

}  // namespace bnext::cuda
