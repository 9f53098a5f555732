// The on-chip families: training passes that read their tensors once. A block (family resident) or a cluster of blocks
// (family cluster) has a channel, a slab of channels, or a run of them. Each thread keeps the packs that it reads in
// shared memory, in slots that no other thread looks at, until the sums of all blocks are there. What does not fit is
// read again, last things first, while it may still be in L2.
#pragma once

#include "../device/cluster.cuh"
#include "elementwise.cuh"
#include "finish.cuh"
#include "slots.cuh"

namespace bnext::cuda {

// Batches that a thread has asked for ahead of the one that it works on. The slots are there anyway.
constexpr int kBatchesInFlight = 6;

// ---- what a thread reads -----------------------------------------------------------------------------------------

template <typename T, int kVec, bool kRows, bool kWhole, int kTensors>
class OnChip {
 public:
  using Data = Slots<T, kVec, kRows, kWhole, kTensors>;
  using Batch = typename Data::Batch;

  __device__ OnChip(const KernelArgs& args, const Tile& tile) : args_(args), tile_(tile) {}

  // Brings what stays on chip there, and calls use(batch) for each batch as it arrives.
  template <typename F>
  __device__ void load(F use) const {
    typename Data::Steps loading(args_, tile_), arrived(args_, tile_);
    const int batches = held_batches();
    for (int b = 0; b < batches + kBatchesInFlight; ++b) {
      if (b < batches) Data::copy(loading, b);
      commit_async();
      if (b < kBatchesInFlight) continue;
      wait_async<kBatchesInFlight>();
      use(Data::held(arrived, b - kBatchesInFlight, args_.held_steps));
    }
  }

  // The same batches again.
  template <typename F>
  __device__ void revisit(F use) const {
    typename Data::Steps steps(args_, tile_);
    const int batches = held_batches();
    for (int b = 0; b < batches; ++b) use(Data::held(steps, b, args_.held_steps));
  }

  // The batches that do not stay on chip, from memory.
  template <typename F>
  __device__ void stream(F use) const {
    Data::stream(args_, tile_, held_batches(), all_batches(), use);
  }

  template <typename F>
  __device__ void stream_backwards(F use) const {
    Data::stream_backwards(args_, tile_, held_batches(), all_batches(), use);
  }

 private:
  // held_steps is all of them, or whole batches.
  __device__ int held_batches() const { return on_chip_batches(args_.held_steps); }
  __device__ int all_batches() const { return on_chip_batches(args_.num_steps); }

  const KernelArgs& args_;
  const Tile& tile_;
};

// ---- sums over a block, and over its cluster ---------------------------------------------------------------------

// Planes: all threads have the same channel. The same order on every run, as everywhere.
template <int kSums, int kLanes, typename Acc>
__device__ inline void reduce_planes_on_chip(const KernelArgs& args, const Acc (&sum)[kSums][kLanes], double* totals) {
  Acc* scratch = reinterpret_cast<Acc*>(shared_memory() + args.layout.scratch);
  const int thread = threadIdx.x, num_warps = blockDim.x / kWarpSize;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const Acc of_warp = warp_sum(add_lanes(sum[k]));
    if (thread % kWarpSize == 0) scratch[k * num_warps + thread / kWarpSize] = of_warp;
  }
  __syncthreads();
  if (thread >= kSums) return;
  double total = 0;
  for (int warp = 0; warp < num_warps; ++warp) total += scratch[thread * num_warps + warp];
  totals[thread] = total;
}

// Rows: each lane of a thread has a column, and a channel has one column or several. Threads of a column meet in shared
// memory, first within each warp where its packs divide the warp. A pack's lanes lie apart there: no bank conflicts.
template <int kVec, typename Acc>
__device__ inline void reduce_rows_on_chip(const KernelArgs& args, const Acc (&sum)[kVec], double* totals) {
  Acc* scratch = reinterpret_cast<Acc*>(shared_memory() + args.layout.scratch);
  double* merged = reinterpret_cast<double*>(shared_memory() + args.layout.merged);
  const int thread = threadIdx.x, num_threads = blockDim.x, packs = args.block_packs, columns = packs * kVec;
  const bool within_warps = kWarpSize % packs == 0;
  const int part = thread / (within_warps ? kWarpSize : packs), place = thread % (within_warps ? kWarpSize : packs);
  const int num_parts = on_chip_parts(num_threads, packs);
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    Acc value = sum[v];
    if (within_warps) {
      for (int distance = packs; distance < kWarpSize; distance *= 2) {
        value += __shfl_xor_sync(kFullWarp, value, distance);
      }
    }
    if (part < num_parts && place < packs) scratch[part * columns + v * packs + place] = value;
  }
  __syncthreads();
  const int num_helpers = on_chip_helpers(num_threads, columns);
  for (int i = thread; i < num_helpers * columns; i += num_threads) {
    double total = 0;
    for (int p = i / columns; p < num_parts; p += num_helpers) total += scratch[p * columns + i % columns];
    merged[i] = total;
  }
  __syncthreads();
  // A few neighbouring threads for each channel.
  const int count = args.run_length > 1 ? args.run_length : columns / args.slab_channels;
  const int step = args.run_length > 1 ? 1 : args.slab_channels;
  int sharers = 1;
  while (sharers < kWarpSize && sharers < count && 2 * sharers * args.slab_channels <= num_threads) sharers *= 2;
  for (int first = 0; first < args.slab_channels; first += num_threads / sharers) {
    const int channel = first + thread / sharers;
    double total = 0;
    for (int i = thread % sharers; i < count && channel < args.slab_channels; i += sharers) {
      const int column = channel * args.run_length + i * step;
      for (int h = 0; h < num_helpers; ++h) total += merged[h * columns + column % kVec * packs + column / kVec];
    }
    for (int distance = sharers / 2; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(kFullWarp, total, distance);
    }
    if (thread % sharers == 0 && channel < args.slab_channels) totals[channel] = total;
  }
}

// Leaves the block's sums in totals[kSums][slab_channels], for all blocks of the cluster to read.
template <bool kRows, int kSums, int kLanes, typename Acc>
__device__ inline void reduce_on_chip(const KernelArgs& args, const Acc (&sum)[kSums][kLanes], double* totals) {
  if constexpr (kRows) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) reduce_rows_on_chip(args, sum[k], totals + k * args.slab_channels);
  } else {
    reduce_planes_on_chip(args, sum, totals);
  }
  if (args.cluster_size > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

// A channel's sums from all blocks of the cluster, in the order of the blocks. Several reads at once: each takes as long as
// a read from L2.
template <int kSums>
__device__ inline void add_blocks(const KernelArgs& args, const double* totals, int channel, double (&sum)[kSums]) {
  constexpr int kReads = 8;
  const int size = args.cluster_size, stride = args.slab_channels;
#pragma unroll
  for (int k = 0; k < kSums; ++k) sum[k] = size == 1 ? totals[k * stride + channel] : 0;
  if (size == 1) return;
  for (int first = 0; first < size; first += kReads) {
    double part[kSums][kReads];
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int i = 0; i < kReads; ++i) {
        const int rank = first + i < size ? first + i : size - 1;
        part[k][i] = load_cluster(totals + k * stride + channel, rank);
      }
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int i = 0; i < kReads; ++i) sum[k] += first + i < size ? part[k][i] : 0;
    }
  }
}

// Calls f(channel of the slab, channel) for this thread's share of the block's channels; then all threads see the result.
template <typename F>
__device__ inline void for_each_channel(const KernelArgs& args, const Tile& tile, F f) {
  const int64_t first = tile.column * args.slab_channels;
  for (int i = threadIdx.x; i < args.slab_channels && first + i < args.num_channels; i += blockDim.x) f(i, first + i);
  __syncthreads();
}

// Of the block's channels, the one of a lane.
template <bool kRows, int kVec>
__device__ inline int slab_channel(const KernelArgs& args, int lane) {
  if (!kRows) return 0;
  const int column = threadIdx.x % args.block_packs * kVec + lane;
  return column / args.run_length % args.slab_channels;
}

// From the sums of all blocks to the coefficients of this thread's lanes. totals_of(i) are those of channel i of the slab.
template <bool kRows, int kVec, typename Acc, typename F>
__device__ inline void finish_on_chip(const KernelArgs& args, const Tile& tile, F totals_of,
                                      Coefficients<Acc> (&coefficients)[kVec]) {
  auto* shared = reinterpret_cast<Coefficients<Acc>*>(shared_memory() + args.layout.coefficients);
  for_each_channel(args, tile,
                   [&](int i, int64_t c) { shared[i] = finish_channel<Acc>(args, c, totals_of(i), tile.split == 0); });
  if (args.cluster_size > 1) cluster_arrive();  // this thread reads no other block's memory any more
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    coefficients[v] = kRows || v == 0 ? shared[slab_channel<kRows, kVec>(args, v)] : coefficients[0];
  }
}

// ---- the kernels -------------------------------------------------------------------------------------------------

__device__ inline Tile on_chip_tile(const KernelArgs& args) {
  return {blockIdx.x / args.cluster_size, blockIdx.x % args.cluster_size};
}

// A block's memory must not go while others of the cluster may read it.
__device__ inline void leave_cluster(const KernelArgs& args) {
  if (args.cluster_size > 1) cluster_wait();
}

template <typename T, int kVec, bool kRows, bool kWhole>
__global__ void __launch_bounds__(kMaxOnChipThreads, 1) on_chip_forward_kernel(const KernelArgs args) {
  using Acc = accumulate_t<T>;
  using Data = OnChip<T, kVec, kRows, kWhole, 1>;
  constexpr int kLanes = kSumLanes<kRows, kVec>;
  const Tile tile = on_chip_tile(args);
  const Data data(args, tile);
  count_batch(args);

  // The mean of what is on chip, which is all of the channel, or half of it at least.
  Acc pivot[kVec] = {}, first[2][kLanes] = {}, unused[kLanes] = {};
  int count = 0;
  data.load([&](const typename Data::Batch& batch) {
    add_moments(batch.pack[0], batch.items, pivot, first[0], unused);
    count += count_positions<kRows>(batch.items);
  });
#pragma unroll
  for (int v = 0; v < kLanes; ++v) first[1][v] = static_cast<Acc>(kRows || v == 0 ? count : 0);
  double* totals = reinterpret_cast<double*>(shared_memory() + args.layout.totals);
  const int stride = args.slab_channels;
  Acc* pivots = reinterpret_cast<Acc*>(shared_memory() + args.layout.pivots);
  reduce_on_chip<kRows>(args, first, totals);
  for_each_channel(args, tile, [&](int i, int64_t) {
    double sum[2];
    add_blocks(args, totals, i, sum);
    const Acc mean = static_cast<Acc>(sum[0] / sum[1]);
    pivots[i] = is_finite(mean) ? mean : Acc(0);  // NaN and Inf reach the result through the sums
  });
#pragma unroll
  for (int v = 0; v < kVec; ++v) pivot[v] = kRows || v == 0 ? pivots[slab_channel<kRows, kVec>(args, v)] : pivot[0];

  // Squares around it. Where half the data is its own, the pivot is within a deviation of the mean: nothing cancels.
  Acc second[2][kLanes] = {};
  auto add = [&](const typename Data::Batch& batch) {
    add_moments(batch.pack[0], batch.items, pivot, second[0], second[1]);
  };
  data.revisit(add);
  data.stream(add);
  reduce_on_chip<kRows>(args, second, totals + 2 * stride);
  Coefficients<Acc> coefficients[kVec];
  finish_on_chip<kRows>(
      args, tile,
      [&](int i) {
        double sum[2];
        add_blocks(args, totals + 2 * stride, i, sum);
        const double distance = sum[0] / args.num_positions;
        return ChannelTotals{{pivots[i] + distance, sum[1] - distance * sum[0], 0}};
      },
      coefficients);

  auto apply = [&](const typename Data::Batch& batch) {
#pragma unroll
    for (int u = 0; u < kOnChipBatch; ++u) {
      const Pack<T, kVec>& x = batch.pack[0][u];
      store_item<kWhole>(map_pack(coefficients, x, x, true, false), batch.items[u], 0);
    }
  };
  data.stream_backwards(apply);
  data.revisit(apply);
  leave_cluster(args);
}

template <typename T, int kVec, bool kRows, bool kWhole>
__global__ void __launch_bounds__(kMaxOnChipThreads, 1) on_chip_backward_kernel(const KernelArgs args) {
  using Acc = accumulate_t<T>;
  using Data = OnChip<T, kVec, kRows, kWhole, 2>;
  constexpr int kLanes = kSumLanes<kRows, kVec>;
  const Tile tile = on_chip_tile(args);
  const Data data(args, tile);

  Acc mean[kVec], sum[kNumSums][kLanes] = {};
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    const int64_t c = tile.column * args.slab_channels + slab_channel<kRows, kVec>(args, v);
    const bool there = c < args.num_channels;  // not in the last slab, maybe
    mean[v] = !kRows && v > 0 ? mean[0] : there ? static_cast<Acc>(load_channel(args.mean, c, 0)) : Acc(0);
  }
  auto add = [&](const typename Data::Batch& batch) {
    add_gradients(batch.pack[0], batch.pack[1], batch.items, mean, sum);
  };
  data.load(add);
  data.stream(add);
  double* totals = reinterpret_cast<double*>(shared_memory() + args.layout.totals);
  reduce_on_chip<kRows>(args, sum, totals);
  Coefficients<Acc> coefficients[kVec];
  finish_on_chip<kRows>(
      args, tile,
      [&](int i) {
        ChannelTotals result;
        add_blocks(args, totals, i, result.value);
        return result;
      },
      coefficients);

  auto apply = [&](const typename Data::Batch& batch) {
#pragma unroll
    for (int u = 0; u < kOnChipBatch; ++u) {
      store_item<kWhole>(map_pack(coefficients, batch.pack[0][u], batch.pack[1][u], true, true), batch.items[u], 0);
    }
  };
  data.stream_backwards(apply);
  data.revisit(apply);
  leave_cluster(args);
}

}  // namespace bnext::cuda
