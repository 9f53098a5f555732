// The on-chip families: training passes that read their tensors once. At a time, a team has a channel, a slab of
// channels, or a run of them: one block (family resident), a cluster of blocks (family cluster), or any number of
// blocks that tell each other through memory what they have found (family grid). Each thread keeps the packs that it
// reads in shared memory, in slots that no other thread looks at, until the sums of all blocks are there. Where there
// are too few slots, what was read first stays in registers, as far as there are some, or makes room for what comes
// later, and is read again when the rest has been mapped.
#pragma once

#include "../device/cluster.cuh"
#include "elementwise.cuh"
#include "finish.cuh"
#include "slots.cuh"
#include "teams.cuh"

namespace bnext::cuda {

// ---- what a thread reads -----------------------------------------------------------------------------------------

// A thread's batches, 0 to n - 1, and its places for `held` of them, a ring. They are summed up in order, so the last
// ones are there at the end; and mapped from the last one on, so that each place is free for the batch that had it
// before, and gets it back. The places that come free last are for the first batches of the block's next tile, if there
// is one; that tile goes round the ring the other way. So some batches are on their way to their places all the time.
// The first `kept` batches, kMostKept at most, stay in registers: they are mapped last, and need no places by then.
template <typename T, int kVec, bool kRows, bool kWhole, int kTensors, int kMostKept>
class OnChip {
 public:
  using Data = Slots<T, kVec, kRows, kWhole, kTensors>;
  using Batch = typename Data::Batch;

  __device__ OnChip(const KernelArgs& args, const Tile& tile)
      : args_(args),
        batches_(on_chip_batches(args.num_steps)),
        held_(on_chip_batches(args.held_steps)),
        again_(others() - held_),
        first_(-args.batches_ahead),
        loading_(args, tile) {}

  // Calls use(batch) for each batch as it arrives. begin() comes before them, when the first copies are on their way.
  template <typename Begin, typename F>
  __device__ void load(const Tile& tile, Begin begin, F use) {
    const int ahead = args_.batches_ahead;
    Steps arrived(args_, tile);
    for (int b = first_; b < batches_; ++b) {
      if (b + ahead < batches_) copy_next(b + ahead, copied_);
      commit_async();  // also an empty group: they are counted
      copied_ = after(copied_);
      if (b == -1) begin();
      if (b < 0) continue;
      wait_async(ahead);
      // Before use(): when that has what it takes from the place, this has been read, and the place is free.
      if (b < kept()) keep(b, used_);
      use(slots_.held(arrived, used_, args_.held_steps));
      used_ = after(used_);
    }
  }

  // The same batches again, the last one first. If there are more tiles, asks for the next one's first batches: all
  // that are kept ahead, but for the one that load() asks for before begin().
  template <typename F>
  __device__ void revisit(const Tile& tile, bool more, const Tile& next, F use) {
    Steps steps(args_, tile, batches_ * kOnChipBatch - 1);
    if (again_ > 0) loading_ = Steps(args_, tile, (kept() + again_) * kOnChipBatch - 1);
    const int early = more ? args_.batches_ahead - 1 : 0;  // batches of the next tile
    backwards_ = !backwards_;
    int place = after(used_);
    for (int b = others() - 1; b >= 0; --b) {
      // It was asked for held_ batches ago, and each has committed a group.
      if (b < again_) wait_async(held_ - 1);
      use(slots_.template held<true>(steps, place, args_.held_steps));
      if (b >= held_) slots_.template copy<true>(loading_, place);
      if (more && b == early) {
        loading_ = Steps(args_, next);
        copied_ = used_ = place;
      }
      if (b < early) {
        copy_next(early - 1 - b, copied_);
        copied_ = after(copied_);
      }
      if (again_ > 0 || b < early) commit_async();
      place = after(place);
    }
#pragma unroll
    for (int b = kMostKept - 1; b >= 0; --b) {
      if (b < kept()) use(Data::kept(steps, packs_[b]));
    }
    first_ = -1;
  }

 private:
  using Steps = typename Data::Steps;

  // Of all batches, those in registers, and the others behind them.
  __device__ int kept() const { return kMostKept > 0 ? args_.kept_batches : 0; }
  __device__ int others() const { return kMostKept > 0 ? batches_ - kept() : batches_; }

  // Batch b, which is in this place, stays in registers.
  __device__ void keep(int b, int place) {
#pragma unroll
    for (int k = 0; k < kMostKept; ++k) {
      if (k == b) slots_.read(place, packs_[k]);
    }
  }

  // The next batch, number b, to a place. If it will be read again, L2 should keep it.
  __device__ void copy_next(int b, int place) {
    const bool again = b - kept() < again_ && (kMostKept == 0 || b >= kept());
    slots_.copy(loading_, place, again ? Cache::kKeep : Cache::kLastUse);
  }

  __device__ int after(int place) const {
    if (backwards_) return place == 0 ? held_ - 1 : place - 1;
    return place + 1 == held_ ? 0 : place + 1;
  }

  const KernelArgs& args_;
  const int batches_, held_, again_;  // again_: so many of the others lose their places, and are read again;
                                      // or less than 0
  int first_;                         // where load() begins: it asks for batches that come batches_ahead later
  int copied_ = 0, used_ = 0;         // the places of the next batch to copy and to use
  bool backwards_ = false;            // round the ring
  Steps loading_;
  const Data slots_;
  typename Data::KeptPacks packs_[kMostKept + 1];  // C++ has no arrays of none
};

// ---- from sums to coefficients -----------------------------------------------------------------------------------

// What a group's lane has to load for the group's channel.
__device__ inline double load_on_chip_input(const KernelArgs& args, const Tile& tile, int i, int lane) {
  const int64_t channel = tile_channel(args, tile, i);
  return load_input(args, channel < args.num_channels ? channel : 0, lane);
}

// The same before anything is added up: the lane gets that of its first round, which for most blocks is all, and keeps
// it until it is needed. Backward leaves the channels' means for all threads, who see them after a barrier.
template <bool kRows, bool kBackward, int kVec, typename Acc>
__device__ inline double load_first_inputs(const KernelArgs& args, const Tile& tile) {
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  double first = 0;
  for_each_group<kRows>(args, [&](int i, int lane, bool there, int round) {
    if (!kBackward && round > 0) return;
    const double input = load_on_chip_input(args, tile, i, lane);
    if (round == 0) first = input;
    if (!kBackward || !there || lane != static_cast<int>(backward::kMean)) return;
    shared[place_of_channel<kRows, kVec>(args, i)].centre = static_cast<Acc>(input);
  });
  return first;
}

// Leaves the totals of the block's channels for add_totals, slice by slice. Planes have one.
template <bool kRows, bool kMoments, int kVec, typename Acc>
__device__ inline void leave_totals(const KernelArgs& args) {
  const int channels = args.slab_channels;
  for_each_group<kRows>(args, args.slices * channels, [&](int i, int lane, bool there, int) {
    const int slice = kRows ? static_cast<int>(args.by_slab.divide(i)) : 0, channel = i - slice * channels;
    const ChannelTotals totals = add_parts<kRows, kMoments, kVec, Acc>(args, channel, slice * args.group_lanes + lane);
    double* to = shared_at<double>(args.layout.totals) + slice * kNumSums * channels + channel;
    if (!there || lane > 0) return;
#pragma unroll
    for (int k = 0; k < kNumSums; ++k) to[k * channels] = totals.value[k];
  });
}

// A channel's totals from all slices, and all blocks of the cluster, for a group of lanes: each reads those of one or
// two, and where there are more lanes, some read the same. They are added up in an order that never changes.
template <bool kRows, bool kMoments>
__device__ inline ChannelTotals add_totals(const KernelArgs& args, int channel, int lane) {
  const double* own = shared_at<const double>(args.layout.totals) + channel;
  const int stride = args.slab_channels;
  auto load = [&](const double* at, int rank) {
    return args.cluster_size > 1 ? load_cluster(at, static_cast<unsigned>(rank)) : *at;
  };
  Moments moments;
  double sum[kNumSums] = {};
  const double first_mean = kMoments ? load(own + stride, 0) : 0;
  moments.point = is_finite(first_mean) ? first_mean : 0;
  auto add = [&](int slice, int rank) {
    double value[kNumSums];
#pragma unroll
    for (int k = 0; k < kNumSums; ++k) value[k] = load(own + (slice * kNumSums + k) * stride, rank);
    if (kMoments) {
      moments.add(value[0], value[1], 0, value[2]);
    } else {
#pragma unroll
      for (int k = 0; k < kNumSums; ++k) sum[k] += value[k];
    }
  };
  const int blocks = args.cluster_size;
  if constexpr (!kRows) {
    if (lane % kFewLanes < blocks) add(0, lane % kFewLanes);
  } else {
    const int shift = popcount(static_cast<unsigned>(blocks - 1));  // a power of two
    const int lanes = args.total_lanes;
    for (int i = lane & (lanes - 1); i < args.slices * blocks; i += lanes) add(i >> shift, i & (blocks - 1));
  }
  return group_totals<kRows, kMoments>(args, moments, sum, args.total_lanes);
}

// Coefficients of all the block's channels, to shared memory; totals_of(channel of the block, channel of the tensors,
// lane) for a group of lanes. The first block of the team leaves the results for store_results: others do not wait for
// the stores.
template <bool kRows, bool kBackward, int kVec, typename Acc, typename F>
__device__ inline void finish_groups(const KernelArgs& args, const Tile& tile, double first_input, F totals_of) {
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  double* results = shared_at<double>(args.layout.results);
  for_each_group<kRows>(args, [&](int i, int lane, bool there, int round) {
    const double input = round == 0 ? first_input : load_on_chip_input(args, tile, i, lane);
    const int64_t channel = tile_channel(args, tile, i);
    there = there && channel < args.num_channels;
    const ChannelTotals totals = totals_of(i, there ? channel : 0, lane);
    const double output =
        finish_group<Acc>(args, kBackward, totals, input, lane, [&](const Coefficients<Acc>& coefficients) {
          if (there && lane == 0) shared[place_of_channel<kRows, kVec>(args, i)] = coefficients;
        });
    const bool stores = there && lane < count_outputs(kBackward) && tile.split == 0;
    if (stores) results[lane * args.slab_channels + i] = output;
  });
}

// After a barrier.
template <bool kBackward>
__device__ inline void store_results(const KernelArgs& args, const Tile& tile) {
  if (tile.split > 0) return;
  const double* results = shared_at<const double>(args.layout.results);
#pragma unroll 1
  for (int n = threadIdx.x; n < count_outputs(kBackward) * args.slab_channels; n += blockDim.x) {
    const int role = static_cast<int>(args.by_slab.divide(n));
    const int64_t channel = tile_channel(args, tile, n - role * args.slab_channels);
    if (channel < args.num_channels) store_channel(args.output[role], channel, results[n]);
  }
}

// The same where a grid shares out the slab's channels among the warps of all blocks: if many blocks add up the sums of
// many channels, that can be more to read than the slab. Then all blocks take the coefficients from the workspace.
template <bool kBackward, int kVec, typename Acc>
__device__ inline void finish_share(const KernelArgs& args, const Turn& turn, const Meetings& meetings) {
  auto* left = static_cast<Coefficients<Acc>*>(args.coefficients);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int blocks = static_cast<int>(args.num_splits);
#pragma unroll 1
  for (int i = static_cast<int>(turn.tile.split) + warp * blocks; i < args.slab_channels; i += num_warps * blocks) {
    const int64_t channel = tile_channel(args, turn.tile, i);
    const bool there = channel < args.num_channels;  // the same for all lanes
    double output = 0;
    if (there) {
      const double input = load_input(args, channel, lane);
      const ChannelTotals totals = group_partial_totals(args, channel, lane, kWarpSize);
      output = finish_group<Acc>(args, kBackward, totals, input, lane, [&](const Coefficients<Acc>& found) {
        if (lane == 0) left[channel] = found;
      });
    }
    if (lane == 0) meetings.leave_coefficients(args, turn, i);
    if (there) store_output(args, channel, lane, output);
  }
  meetings.await_coefficients(args, turn);
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  for (int i = threadIdx.x; i < args.slab_channels; i += blockDim.x) {
    const int64_t channel = tile_channel(args, turn.tile, i);
    if (channel < args.num_channels) shared[place_of_channel<true, kVec>(args, i)] = load_from_l2(left + channel);
  }
}

// Waits until the cluster's other blocks have read this one's totals: before it leaves others in their place, or ends.
__device__ inline void await_readers(const KernelArgs& args) {
  if (args.cluster_size > 1) cluster_wait();
}

// From what the block's parts have left to the coefficients of this thread's lanes.
template <bool kRows, bool kBackward, Blocks kBlocks, int kVec, typename Acc>
__device__ inline void finish_on_chip(const KernelArgs& args, const Turn& turn, const TeamMeetings<kBlocks>& meetings,
                                      double first_input, Coefficients<Acc> (&coefficients)[kVec]) {
  const Tile& tile = turn.tile;
  __syncthreads();
  if constexpr (kBlocks == Blocks::kGrid) {
    store_partials<kRows, !kBackward, kVec, Acc>(args, tile);
    meetings.exchange_sums(args, turn);
    if (kRows && args.shares_out) {
      finish_share<kBackward, kVec, Acc>(args, turn, meetings);
    } else {
      finish_groups<kRows, kBackward, kVec, Acc>(args, tile, first_input, [&](int, int64_t channel, int lane) {
        return group_partial_totals(args, channel, lane, args.group_lanes);
      });
    }
  } else {
    if (kBlocks != Blocks::kOneTile && turn.number > 0) await_readers(args);
    const bool sliced = kRows && args.slices > 1, two_stages = args.cluster_size > 1 || sliced;
    if (two_stages) leave_totals<kRows, !kBackward, kVec, Acc>(args);
    if (args.cluster_size > 1) {
      cluster_arrive();
      cluster_wait();
    } else if (sliced) {
      __syncthreads();
    }
    finish_groups<kRows, kBackward, kVec, Acc>(args, tile, first_input, [&](int i, int64_t, int lane) {
      return two_stages ? add_totals<kRows, !kBackward>(args, i, lane)
                        : add_parts<kRows, !kBackward, kVec, Acc>(args, i, lane);
    });
    // This thread reads no other block's memory any more: what it has read has been used.
    if (args.cluster_size > 1) cluster_arrive();
  }
  __syncthreads();
  if (kBlocks != Blocks::kGrid || !kRows || !args.shares_out) store_results<kBackward>(args, tile);
  const auto* shared = shared_at<const Coefficients<Acc>>(args.layout.coefficients);
  int place[kVec];
  find_places<kRows>(args, place);
#pragma unroll
  for (int v = 0; v < kVec; ++v) coefficients[v] = kRows || v == 0 ? shared[place[v]] : coefficients[0];
}

// ---- the kernels -------------------------------------------------------------------------------------------------

template <Blocks kBlocks>
constexpr bool kAlone = kBlocks == Blocks::kKeeping || kBlocks == Blocks::kGrid;

// Launch bounds: a block of as many threads as an SM has registers for, or two of half as many.
template <typename T, bool kRows, bool kWhole, Blocks kBlocks, bool kBackward>
constexpr int kThreads = count_on_chip_threads(kBackward, sizeof(T), kRows, kWhole, kAlone<kBlocks>, kDeviceArch);
constexpr int bounded_threads(int threads) { return threads % kMaxOnChipThreads == 0 ? kMaxOnChipThreads : threads; }

template <typename T, bool kRows, bool kWhole, Blocks kBlocks, int kTensors>
constexpr int kMostKept = kAlone<kBlocks> ? most_kept_batches(sizeof(T), kRows, kWhole, kTensors, kDeviceArch) : 0;

template <typename T, int kVec, bool kRows, bool kWhole, Blocks kBlocks>
__global__ void __launch_bounds__(bounded_threads(kThreads<T, kRows, kWhole, kBlocks, false>),
                                  kThreads<T, kRows, kWhole, kBlocks, false> / kMaxOnChipThreads)
    on_chip_forward_kernel(const __grid_constant__ KernelArgs args) {
  using Acc = accumulate_t<T>;
  using Data = OnChip<T, kVec, kRows, kWhole, 1, kMostKept<T, kRows, kWhole, kBlocks, 1>>;
  constexpr int kElements = kSumElements<kRows, kVec>;
  Turn turn(args);
  count_batch(args, false);
  const TeamMeetings<kBlocks> meetings(args, turn);
  begin_late(args);
  Data data(args, turn.tile);
  bool more = false;

#pragma unroll 1
  do {
    double first_input = 0;
    Acc pivot[kVec] = {}, s1[kElements] = {}, s2[kElements] = {};
    int count = 0, batches = 0;
    data.load(
        turn.tile, [&] { first_input = load_first_inputs<kRows, false, kVec, Acc>(args, turn.tile); },
        [&](const typename Data::Batch& batch) {
          if (batches == 0) find_pivots<kRows>(args, batch.pack[0], batch.items, pivot);
          add_moments(batch.pack[0], batch.items, pivot, s1, s2);
          count += count_positions<kRows>(batch.items);
          if (++batches == kPivotItems / kOnChipBatch) move_pivots<kRows>(args, pivot, s1, s2, count);
        });
    leave_moments<kRows>(args, pivot, s1, s2, count);
    Coefficients<Acc> coefficients[kVec];
    finish_on_chip<kRows, false, kBlocks>(args, turn, meetings, first_input, coefficients);

    const Tile tile = turn.tile;
    more = kBlocks != Blocks::kOneTile && turn.next(args);
    data.revisit(tile, more, turn.tile, [&](const typename Data::Batch& batch) {
#pragma unroll
      for (int u = 0; u < kOnChipBatch; ++u) {
        store_item(map_pack(coefficients, batch.pack[0][u]), batch.items[u], 0);
      }
    });
  } while (more);
  if (kBlocks != Blocks::kGrid) await_readers(args);
}

template <typename T, int kVec, bool kRows, bool kWhole, Blocks kBlocks>
__global__ void __launch_bounds__(bounded_threads(kThreads<T, kRows, kWhole, kBlocks, true>),
                                  kThreads<T, kRows, kWhole, kBlocks, true> / kMaxOnChipThreads)
    on_chip_backward_kernel(const __grid_constant__ KernelArgs args) {
  using Acc = accumulate_t<T>;
  using Data = OnChip<T, kVec, kRows, kWhole, 2, kMostKept<T, kRows, kWhole, kBlocks, 2>>;
  constexpr int kElements = kSumElements<kRows, kVec>;
  Turn turn(args);
  const TeamMeetings<kBlocks> meetings(args, turn);
  begin_late(args);
  Data data(args, turn.tile);
  bool more = false;

#pragma unroll 1
  do {
    double first_input = 0;
    Acc mean[kVec] = {}, sum[kNumSums][kElements] = {};
    data.load(
        turn.tile,
        [&] {
          // The coefficients of the last turn may still be read.
          if (kBlocks != Blocks::kOneTile && turn.number > 0) __syncthreads();
          first_input = load_first_inputs<kRows, true, kVec, Acc>(args, turn.tile);
          __syncthreads();
          const auto* shared = shared_at<const Coefficients<Acc>>(args.layout.coefficients);
          int place[kVec];
          find_places<kRows>(args, place);
#pragma unroll
          for (int v = 0; v < kVec; ++v) mean[v] = kRows || v == 0 ? shared[place[v]].centre : mean[0];
        },
        [&](const typename Data::Batch& batch) {
          add_gradients(batch.pack[0], batch.pack[1], batch.items, mean, sum);
        });
    leave_sums<kRows>(args, sum);
    Coefficients<Acc> coefficients[kVec];
    finish_on_chip<kRows, true, kBlocks>(args, turn, meetings, first_input, coefficients);

    const Tile tile = turn.tile;
    more = kBlocks != Blocks::kOneTile && turn.next(args);
    data.revisit(tile, more, turn.tile, [&](const typename Data::Batch& batch) {
#pragma unroll
      for (int u = 0; u < kOnChipBatch; ++u) {
        store_item(map_pack(coefficients, batch.pack[0][u], batch.pack[1][u]), batch.items[u], 0);
      }
    });
  } while (more);
  if (kBlocks != Blocks::kGrid) await_readers(args);
}

}  // namespace bnext::cuda
