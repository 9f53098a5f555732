// From the partial sums of a channel to its results and to the coefficients of the apply pass. All of it in float64: it
// is little work, and what it rounds every element would inherit.
#pragma once

#include "../device/grid.cuh"
#include "../device/math.cuh"
#include "../device/reduce.cuh"
#include "kernel_args.h"

namespace bnext::cuda {

// A channel's sums. Statistics: mean and sum of squares around it. Backward: sum_dy, sum_dy_xmu, sum_xmu.
struct ChannelTotals {
  double value[kNumSums];
};

// Who adds up a channel's partial sums together: a block, or a warp, which needs no barriers.
struct BlockTeam {
  double* scratch;  // one number for each warp

  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ double sum(double value) const { return block_sum(value, scratch); }
};
struct WarpTeam {
  __device__ int rank() const { return threadIdx.x % kWarpSize; }
  __device__ int size() const { return kWarpSize; }
  __device__ double sum(double value) const { return warp_sum(value); }
};

// Calls f(pointer to the partial sums) for this thread's share of channel c: wide channels c, c + num_channels, and so on,
// each with all its splits.
template <typename Team, typename F>
__device__ inline void for_each_partial(const KernelArgs& args, int64_t c, const Team& team, F f) {
  for (int64_t wide = c; wide < args.wide_channels; wide += args.num_channels) {
    const double* of_channel = args.partials + wide * args.num_splits;
    for (int64_t split = team.rank(); split < args.num_splits; split += team.size()) f(of_channel + split);
  }
}

// Adds up the partial sums of channel c; every thread of the team gets the totals.
template <typename Team>
__device__ inline ChannelTotals merge_partials(const KernelArgs& args, int64_t c, const Team& team) {
  const int64_t stride = args.wide_channels * args.num_splits;  // from one of the sums to the next
  ChannelTotals totals;
  double sum[kNumSums] = {0, 0, 0};
  if (args.backward) {
    for_each_partial(args, c, team, [&](const double* p) {
#pragma unroll
      for (int k = 0; k < kNumSums; ++k) sum[k] += read_number(p + k * stride);
    });
#pragma unroll
    for (int k = 0; k < kNumSums; ++k) totals.value[k] = team.sum(sum[k]);
    return totals;
  }
  // Chan: first the mean of all, then every part's squares moved to it. No difference of large numbers anywhere.
  for_each_partial(args, c, team, [&](const double* p) { sum[0] += read_number(p) * read_number(p + stride); });
  const double mean = team.sum(sum[0]) / args.num_positions;
  for_each_partial(args, c, team, [&](const double* p) {
    const double distance = read_number(p + stride) - mean;
    sum[1] += read_number(p + 2 * stride) + read_number(p) * distance * distance;
  });
  totals.value[0] = mean;
  totals.value[1] = team.sum(sum[1]);
  totals.value[2] = 0;
  return totals;
}

// y = scale_x * (x - centre) + shift: centred, so that nothing cancels where the mean is large. What rounding takes from
// the mean to make it `centre` goes into the shift.
template <typename Acc>
__device__ inline Coefficients<Acc> normalize_coefficients(const KernelArgs& args, int64_t c, double mean,
                                                           double invstd) {
  const double scale = load_channel(args.weight, c, 1) * invstd;
  const Acc centre = static_cast<Acc>(mean);
  const double shift = load_channel(args.bias, c, 0) - scale * (mean - centre);
  return {Acc(0), static_cast<Acc>(scale), centre, static_cast<Acc>(shift)};
}

template <typename Acc>
__device__ inline Coefficients<Acc> finish_forward(const KernelArgs& args, int64_t c, const ChannelTotals& totals,
                                                   bool write) {
  // Rounding may leave a sum of squares a little below zero; NaN stays.
  const double mean = totals.value[0], squares = totals.value[1] < 0 ? 0 : totals.value[1];
  const double var = squares / args.num_positions;
  const double invstd = 1 / square_root(var + args.eps);
  if (write) {
    store_channel(args.mean, c, mean);
    store_channel(args.invstd, c, invstd);
    store_channel(args.stats_mean, c, mean);
    store_channel(args.stats_var, c, var);
    if (args.running_mean.data != nullptr) {
      // A kernel before this one has counted the batch already: reduce, or on chip prepare_kernel.
      const double momentum = args.cumulative && args.num_batches_tracked != nullptr
                                  ? 1.0 / static_cast<double>(*args.num_batches_tracked)
                                  : args.momentum;
      const double unbiased = var * (args.num_positions / (args.num_positions - 1));
      const double old_mean = load_channel(args.running_mean, c, 0), old_var = load_channel(args.running_var, c, 1);
      const double new_mean = momentum * mean + (1 - momentum) * old_mean;
      const double new_var = momentum * unbiased + (1 - momentum) * old_var;
      const double limit = args.running_limit;
      if (limit == 0 || (fabs(new_mean) <= limit && fabs(new_var) <= limit)) {
        store_channel(args.running_mean, c, new_mean);
        store_channel(args.running_var, c, new_var);
      }
    }
  }
  return normalize_coefficients<Acc>(args, c, mean, invstd);
}

// dx = scale_dy * dy + (scale_x * (x - centre) + shift).
template <typename Acc>
__device__ inline Coefficients<Acc> finish_backward(const KernelArgs& args, int64_t c, const ChannelTotals& totals,
                                                    bool write) {
  const double m = args.num_positions;
  const double invstd = load_channel(args.invstd, c, 1);
  const double scale = load_channel(args.weight, c, 1) * invstd;
  const double sum_dy = totals.value[0];
  // The mean was rounded when it was saved. In training it is the batch mean, so sum(x - mean) / m is what rounding took
  // from it; in eval it is a constant.
  const double lost = args.training ? totals.value[2] / m : 0;
  const double sum_dy_xmu = totals.value[1] - lost * sum_dy;
  const double dvar = load_channel(args.grad_var, c, 0) - 0.5 * scale * invstd * invstd * sum_dy_xmu;
  // The term of the paper with sum(x - mean) is zero: mean is the batch mean, or a constant.
  const double dmean = load_channel(args.grad_mean, c, 0) - scale * sum_dy;
  if (write) {
    store_channel(args.dbias, c, sum_dy);
    store_channel(args.dweight, c, sum_dy_xmu * invstd);
    store_channel(args.dvar, c, dvar);
    store_channel(args.dmean, c, dmean);
  }
  const double scale_x = 2 * dvar / m;
  return {static_cast<Acc>(scale), static_cast<Acc>(scale_x), static_cast<Acc>(load_channel(args.mean, c, 0)),
          static_cast<Acc>(dmean / m - scale_x * lost)};
}

template <typename Acc>
__device__ inline Coefficients<Acc> finish_channel(const KernelArgs& args, int64_t c, const ChannelTotals& totals,
                                                   bool write) {
  return args.backward ? finish_backward<Acc>(args, c, totals, write) : finish_forward<Acc>(args, c, totals, write);
}

// Eval: everything follows from vectors. In Acc, because every thread does it, and float64 is slow on some devices.
template <typename Acc>
__device__ inline Coefficients<Acc> constant_coefficients(const KernelArgs& args, int64_t c, bool write) {
  const Acc weight = static_cast<Acc>(load_channel(args.weight, c, 1));
  if (args.backward) return {weight * static_cast<Acc>(load_channel(args.invstd, c, 1)), Acc(0), Acc(0), Acc(0)};
  const Acc mean = static_cast<Acc>(load_channel(args.running_mean, c, 0));
  const Acc var = static_cast<Acc>(load_channel(args.running_var, c, 1));
  const Acc invstd = Acc(1) / square_root(var + static_cast<Acc>(args.eps));
  if (write) {
    store_channel(args.mean, c, mean);
    store_channel(args.invstd, c, invstd);
    store_channel(args.stats_mean, c, mean);
    store_channel(args.stats_var, c, var);
  }
  return {Acc(0), weight * invstd, mean, static_cast<Acc>(load_channel(args.bias, c, 0))};
}

// One block for each channel. Without a second bound ptxas aims at 32 registers on some architectures, and spills.
template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads, 4) finish_kernel(const KernelArgs args) {
  const int64_t c = blockIdx.x;
  auto* stored = static_cast<Coefficients<Acc>*>(args.coefficients);
  if (args.source == Source::kConstants) {
    if (threadIdx.x == 0) constant_coefficients<Acc>(args, c, true);
    return;
  }
  const ChannelTotals totals = merge_partials(args, c, BlockTeam{reinterpret_cast<double*>(shared_memory())});
  if (threadIdx.x != 0) return;
  const Coefficients<Acc> coefficients = finish_channel<Acc>(args, c, totals, true);
  if (stored != nullptr) stored[c] = coefficients;
}

// Before on-chip kernels that rely on it: counters begin at zero, and the batch has been counted, because a cumulative
// momentum is 1 / number of batches, which all blocks read. One block.
__global__ void __launch_bounds__(kMaxThreads) prepare_kernel(const KernelArgs args) {
  if (args.num_batches_tracked != nullptr && threadIdx.x == 0) ++*args.num_batches_tracked;
  if (args.counters == nullptr) return;
  for (int64_t c = threadIdx.x; c < args.num_channels; c += blockDim.x) args.counters[c] = 0;
}

}  // namespace bnext::cuda
