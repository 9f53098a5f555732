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

  // Asks L2 for what comes first of a later tile, up to a line of each tensor for each thread: this block's next one,
  // or that of a block which begins when some block has ended. Of planes, the first warp adds up meanwhile.
  __device__ void ask_early(Tile tile) const {
    const int line = static_cast<int>(threadIdx.x) - (kRows ? 0 : kWarpSize);
    tile.slab += args_.early_slabs;
    if (line < 0 || line >= args_.early_lines || tile.slab >= args_.num_slabs) return;
    const auto item = Steps::at_pack(args_, tile, line * args_.line_packs).next();
    if (item.empty()) return;
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      if (kWhole || is_aligned(item.at[1 + t])) ask_l2(item.at[1 + t]);
    }
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

// Where what vectors have of the block's channels is: a block's turns use two places in turn, because threads may be
// ahead of those that store the results of the turn before.
__device__ inline double* place_of_inputs(const KernelArgs& args, const Turn& turn) {
  return shared_at<double>(args.layout.inputs) + turn.number % 2 * kMostInputs * args.slab_channels;
}

// Which one of the tensors' channels that is, or less than 0.
__device__ inline auto turn_channels(const KernelArgs& args, const Turn& turn) {
  return [&args, &turn](int i) {
    const int64_t channel = tile_channel(args, turn.tile, i);
    return channel < args.num_channels ? channel : -1;
  };
}

// This thread's number, for leave_turn_inputs.
template <bool kBackward>
__device__ inline Asked ask_for_turn_input(const KernelArgs& args, const Turn& turn) {
  return ask_for_input(args, kBackward, turn_channels(args, turn));
}

// It comes there before anything is added up. Backward leaves the channels' means for all threads, who see them after a
// barrier.
template <bool kRows, bool kBackward, int kVec, typename Acc>
__device__ inline void leave_turn_inputs(const KernelArgs& args, const Turn& turn, Asked asked_for) {
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  leave_inputs(args, kBackward, asked_for, place_of_inputs(args, turn), turn_channels(args, turn),
               [&](int role, int i, double number) {
                 if (!kBackward || role != static_cast<int>(backward::kMean)) return;
                 shared[place_of_channel<kRows, kVec>(args, i)].centre = static_cast<Acc>(number);
               });
}

template <bool kBackward>
__device__ inline Inputs turn_inputs(const KernelArgs& args, const Turn& turn, int i) {
  return inputs_of(kBackward, args.slab_channels, place_of_inputs(args, turn), i);
}

// The numbers of a channel among as many of each kind as the block has channels.
__device__ inline void leave_numbers(const KernelArgs& args, double* to, const ChannelTotals& totals) {
#pragma unroll
  for (int k = 0; k < kNumSums; ++k) to[k * args.slab_channels] = totals.value[k];
}
__device__ inline ChannelTotals find_numbers(const KernelArgs& args, const double* from) {
  return {{from[0], from[args.slab_channels], from[2 * args.slab_channels]}};
}

// Leaves the totals of the block's channels for add_totals, slice by slice; planes have one. totals_of(channel of the
// block, lane) for a group of lanes, which goes on counting where that of the slice before has stopped.
template <bool kRows, typename F>
__device__ inline void leave_totals(const KernelArgs& args, F totals_of) {
  const int channels = args.slab_channels;
  for_each_group<kRows>(args, args.slices * channels, [&](int i, int lane, bool there) {
    const int slice = kRows ? static_cast<int>(args.by_slab.divide(i)) : 0, channel = i - slice * channels;
    const ChannelTotals totals = totals_of(channel, slice * args.group_lanes + lane);
    if (!there || lane > 0) return;
    leave_numbers(args, shared_at<double>(args.layout.totals) + slice * kNumSums * channels + channel, totals);
  });
}

// A channel's totals from all slices, and all blocks of the cluster, in an order that never changes.
template <bool kMoments>
__device__ inline ChannelTotals add_totals(const KernelArgs& args, int channel, int blocks) {
  const double* own = shared_at<const double>(args.layout.totals) + channel;
  const int stride = args.slab_channels;
  auto load = [&](int slice, int k, int rank) {
    const double* at = own + (slice * kNumSums + k) * stride;
    return blocks > 1 ? load_cluster(at, static_cast<unsigned>(rank)) : *at;
  };
  if (args.slices * blocks == 1) return find_numbers(args, own);
  Moments moments;
  double sum[kNumSums] = {};
  const double first_mean = kMoments ? load(0, 1, 0) : 0;
  moments.point = is_finite(first_mean) ? first_mean : 0;
  for (int slice = 0; slice < args.slices; ++slice) {
#pragma unroll 4
    for (int rank = 0; rank < blocks; ++rank) {
      const double value[kNumSums] = {load(slice, 0, rank), load(slice, 1, rank), load(slice, 2, rank)};
      if (kMoments) {
        moments.add(value[0], value[1], 0, value[2]);
      } else {
#pragma unroll
        for (int k = 0; k < kNumSums; ++k) sum[k] += value[k];
      }
    }
  }
  return kMoments ? merged_totals(args, moments) : ChannelTotals{{sum[0], sum[1], sum[2]}};
}

// Coefficients of all the block's channels, to shared memory; and the totals, for store_results.
template <bool kRows, bool kBackward, int kVec, typename Acc>
__device__ inline void finish_channels(const KernelArgs& args, const Turn& turn, int blocks) {
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  for_each_channel<kRows>(args, [&](int i) {
    if (tile_channel(args, turn.tile, i) >= args.num_channels) return;
    const ChannelTotals totals = add_totals<!kBackward>(args, i, blocks);
    leave_numbers(args, shared_at<double>(args.layout.results) + i, totals);
    const auto found = finish_channel<Acc>(args, kBackward, totals, turn_inputs<kBackward>(args, turn, i));
    shared[place_of_channel<kRows, kVec>(args, i)] = found.coefficients;
  });
}

// The totals of a channel of a grid's slab from the letters of all blocks, a few at once, for lane `lane` of so many
// neighbouring ones; all lanes of the warp come along. Statistics are around the mean of the first block, which the
// first lane has.
template <bool kBackward, typename Acc>
__device__ inline ChannelTotals read_totals(const KernelArgs& args, const Turn& turn, int channel, int lane,
                                            int lanes) {
  constexpr int kReads = kLettersAtOnce;
  const int splits = static_cast<int>(args.num_splits);
  const Letter<ChannelTotals>* letters = TeamLetters<Acc>::sums(args, turn, channel);
  PartialSums sums = begin_partials(0);
#pragma unroll 1
  for (int first = 0; first < splits; first += kReads * lanes) {
    auto letter = [&](int i) {
      const int split = first + lane + i * lanes;
      return split < splits ? letters + split : nullptr;
    };
    ChannelTotals found[kReads];
    read_letters(found, turn.stamp(), letter);
    if (!kBackward && first == 0) {
      const int first_lane = static_cast<int>(threadIdx.x) % kWarpSize - lane;
      sums = begin_partials(__shfl_sync(kFullWarp, found[0].value[1], first_lane));
    }
#pragma unroll
    for (const ChannelTotals& of_block : found) {
      sums.add(kBackward, of_block.value[0], of_block.value[1], of_block.value[2]);
    }
  }
  group_sum(lanes, sums.value);
  return partial_totals(args, kBackward, sums);
}

// Where a grid shares out the slab's channels among the warps of all blocks: if many blocks add up the sums of many
// channels, that can be more to read than the slab. Then all blocks get letters with the coefficients.
template <bool kRows, Blocks kBlocks>
__device__ inline bool shares_out(const KernelArgs& args) {
  return kRows && kBlocks == Blocks::kGrid && args.shares_out;
}

template <bool kBackward, int kVec, typename Acc>
__device__ inline void finish_share(const KernelArgs& args, const Turn& turn) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int blocks = static_cast<int>(args.num_splits);
#pragma unroll 1
  for (int i = turn.tile.split + warp * blocks; i < args.slab_channels; i += num_warps * blocks) {
    if (tile_channel(args, turn.tile, i) >= args.num_channels) break;
    const ChannelTotals totals = read_totals<kBackward, Acc>(args, turn, i, lane, kWarpSize);
    if (lane > 0) continue;
    leave_numbers(args, shared_at<double>(args.layout.results) + i, totals);
    const auto found = finish_channel<Acc>(args, kBackward, totals, turn_inputs<kBackward>(args, turn, i));
    post(TeamLetters<Acc>::finished(args, turn, i), found.coefficients, turn.stamp());
  }
  auto* shared = shared_at<Coefficients<Acc>>(args.layout.coefficients);
  for (int i = threadIdx.x; i < args.slab_channels; i += blockDim.x) {
    if (tile_channel(args, turn.tile, i) >= args.num_channels) break;
    auto letter = [&](int) { return TeamLetters<Acc>::finished(args, turn, i); };
    Coefficients<Acc> found[1];
    read_letters(found, turn.stamp(), letter);
    shared[place_of_channel<true, kVec>(args, i)] = found[0];
  }
}

// The turn that a block has just done: the one before, where it has gone on to the next one.
template <Blocks kBlocks>
__device__ inline Turn done(const KernelArgs& args, const Turn& turn) {
  return kBlocks == Blocks::kOneTile ? turn : turn.before(args);
}

// When all else is done, what there is to be stored of the turn's channels, a thread for each number: by the first
// block of the team, or by those that have taken a share.
template <bool kRows, bool kBackward, Blocks kBlocks, typename Acc>
__device__ inline void store_results(const KernelArgs& args, const Turn& turn) {
  const bool shared_out = shares_out<kRows, kBlocks>(args);
  if (!shared_out && turn.tile.split > 0) return;
#pragma unroll 1
  for (int n = count_from_last(); n < count_outputs(kBackward) * args.slab_channels; n += blockDim.x) {
    const int role = static_cast<int>(args.by_slab.divide(n)), i = n - role * args.slab_channels;
    const int64_t channel = tile_channel(args, turn.tile, i);
    if (channel >= args.num_channels || args.output[role].data == nullptr) continue;
    if (shared_out && !TeamLetters<Acc>::has_share(args, turn, i)) continue;
    const ChannelTotals totals = find_numbers(args, shared_at<const double>(args.layout.results) + i);
    const Inputs inputs = turn_inputs<kBackward>(args, turn, i);
    const auto found = finish_channel<Acc>(args, kBackward, totals, inputs);
    store_outputs(args, kBackward, channel, inputs, found, role, kMostOutputs);
  }
}

// Waits until the cluster's other blocks have read this one's totals: before it leaves others in their place, or ends.
__device__ inline void await_readers(const KernelArgs& args) {
  if (args.cluster_size > 1) cluster_wait();
}

// From what the block's parts have left to the coefficients of this thread's lanes. Calls meanwhile() before it waits
// for others.
template <bool kRows, bool kBackward, Blocks kBlocks, int kVec, typename Acc, typename F>
__device__ inline void finish_on_chip(const KernelArgs& args, const Turn& turn, const Letters<kBlocks, Acc>& letters,
                                      Coefficients<Acc> (&coefficients)[kVec], F meanwhile) {
  const Tile& tile = turn.tile;
  __syncthreads();
  const bool shared_out = shares_out<kRows, kBlocks>(args);
  if constexpr (kBlocks == Blocks::kGrid) {
    leave_block_totals<kRows, !kBackward, kVec, Acc>(args, tile, [&](int i, int64_t, const ChannelTotals& totals) {
      post(letters.sums(args, turn, i) + tile.split, totals, turn.stamp());
    });
    meanwhile();
    letters.await_others(turn);
    if (shared_out) {
      finish_share<kBackward, kVec, Acc>(args, turn);
    } else {
      leave_totals<kRows>(args, [&](int i, int lane) {
        const bool there = tile_channel(args, tile, i) < args.num_channels;  // else nobody writes of it
        return read_totals<kBackward, Acc>(args, turn, there ? i : 0, lane, args.group_lanes);
      });
    }
  } else {
    if (kBlocks != Blocks::kOneTile && turn.number > 0) await_readers(args);
    leave_totals<kRows>(args, [&](int i, int lane) { return add_parts<kRows, !kBackward, kVec, Acc>(args, i, lane); });
  }
  if (!shared_out) {
    const int blocks = kBlocks == Blocks::kGrid ? 1 : args.cluster_size;  // that see each other's totals
    if (blocks > 1) cluster_arrive();
    if (kBlocks != Blocks::kGrid) meanwhile();
    if (blocks > 1) {
      cluster_wait();
    } else if (kRows) {  // of planes, the thread that has left the totals finishes the channel
      __syncthreads();
    }
    finish_channels<kRows, kBackward, kVec, Acc>(args, turn, blocks);
    // This thread reads no other block's memory any more: what it has read has been used.
    if (blocks > 1) cluster_arrive();
  }
  __syncthreads();
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
constexpr int kThreads = count_on_chip_threads(kBackward, sizeof(T), kRows, kWhole, kBlocks != Blocks::kOneTile,
                                               kAlone<kBlocks>, kDeviceArch);
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
  Letters<kBlocks, Acc> letters;
  begin_late(args, turn, letters);
  Data data(args, turn.tile);
  bool more = false;

#pragma unroll 1
  do {
    Acc pivot[kVec] = {}, s1[kElements] = {}, s2[kElements] = {};
    int count = 0, batches = 0;
    const Asked input = ask_for_turn_input<false>(args, turn);  // it comes with the first packs
    data.load(
        turn.tile,
        [&] {
          letters.begin(args, turn);
          leave_turn_inputs<kRows, false, kVec, Acc>(args, turn, input);
        },
        [&](const typename Data::Batch& batch) {
          if (batches == 0) find_pivots<kRows>(args, batch.pack[0], batch.items, pivot);
          add_moments(batch.pack[0], batch.items, pivot, s1, s2);
          count += count_positions<kRows>(batch.items);
          if (++batches == kPivotItems / kOnChipBatch) move_pivots<kRows>(args, pivot, s1, s2, count);
        });
    leave_moments<kRows>(args, pivot, s1, s2, count);
    Coefficients<Acc> coefficients[kVec];
    finish_on_chip<kRows, false, kBlocks>(args, turn, letters, coefficients, [&] { data.ask_early(turn.tile); });

    const Tile tile = turn.tile;
    more = kBlocks != Blocks::kOneTile && turn.next(args);
    data.revisit(tile, more, turn.tile, [&](const typename Data::Batch& batch) {
#pragma unroll
      for (int u = 0; u < kOnChipBatch; ++u) {
        store_item(map_pack(coefficients, batch.pack[0][u]), batch.items[u], 0);
      }
    });
    store_results<kRows, false, kBlocks, Acc>(args, done<kBlocks>(args, turn));
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
  Letters<kBlocks, Acc> letters;
  begin_late(args, turn, letters);
  Data data(args, turn.tile);
  bool more = false;

#pragma unroll 1
  do {
    Acc mean[kVec] = {}, sum[kNumSums][kElements] = {};
    const Asked input = ask_for_turn_input<true>(args, turn);
    data.load(
        turn.tile,
        [&] {
          letters.begin(args, turn);
          // The coefficients of the last turn may still be read.
          if (kBlocks != Blocks::kOneTile && turn.number > 0) __syncthreads();
          leave_turn_inputs<kRows, true, kVec, Acc>(args, turn, input);
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
    finish_on_chip<kRows, true, kBlocks>(args, turn, letters, coefficients, [&] { data.ask_early(turn.tile); });

    const Tile tile = turn.tile;
    more = kBlocks != Blocks::kOneTile && turn.next(args);
    data.revisit(tile, more, turn.tile, [&](const typename Data::Batch& batch) {
#pragma unroll
      for (int u = 0; u < kOnChipBatch; ++u) {
        store_item(map_pack(coefficients, batch.pack[0][u], batch.pack[1][u]), batch.items[u], 0);
      }
    });
    store_results<kRows, true, kBlocks, Acc>(args, done<kBlocks>(args, turn));
  } while (more);
  if (kBlocks != Blocks::kGrid) await_readers(args);
}

}  // namespace bnext::cuda
