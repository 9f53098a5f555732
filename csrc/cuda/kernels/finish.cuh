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

// Calls f(pointer to the partial sums) for this thread's share of channel c: wide channels c, c + num_channels, and so on,
// each with all its splits.
template <typename F>
__device__ inline void for_each_partial(const KernelArgs& args, int64_t c, F f) {
  for (int64_t wide = c; wide < args.wide_channels; wide += args.num_channels) {
    const double* of_channel = args.partials + wide * args.num_splits;
    for (int64_t split = threadIdx.x; split < args.num_splits; split += blockDim.x) f(of_channel + split);
  }
}

// Adds up the partial sums of channel c; every thread of the block gets the totals. `scratch` has one number per warp.
__device__ inline ChannelTotals merge_partials(const KernelArgs& args, int64_t c, double* scratch) {
  const int64_t stride = args.wide_channels * args.num_splits;  // from one of the sums to the next
  ChannelTotals totals;
  double sum[kNumSums] = {0, 0, 0};
  if (args.backward) {
    for_each_partial(args, c, [&](const double* p) {
#pragma unroll
      for (int k = 0; k < kNumSums; ++k) sum[k] += read_number(p + k * stride);
    });
#pragma unroll
    for (int k = 0; k < kNumSums; ++k) totals.value[k] = block_sum(sum[k], scratch);
    return totals;
  }
  // Chan: first the mean of all, then every part's squares moved to it. No difference of large numbers anywhere.
  for_each_partial(args, c, [&](const double* p) { sum[0] += read_number(p) * read_number(p + stride); });
  const double mean = block_sum(sum[0], scratch) / args.num_positions;
  for_each_partial(args, c, [&](const double* p) {
    const double distance = read_number(p + stride) - mean;
    sum[1] += read_number(p + 2 * stride) + read_number(p) * distance * distance;
  });
  totals.value[0] = mean;
  totals.value[1] = block_sum(sum[1], scratch);
  totals.value[2] = 0;
  return totals;
}

// The same by one warp, for planes with few splits, where a trip to L2 counts: without barriers, kReads splits for each
// lane at once, and statistics in one round. It moves squares to the first block's mean, and from there to the common one.
// That block has 1/num_splits of the elements, so what is taken away again is at most num_splits times what stays, of
// which float64 does not notice a few hundred.
template <bool kBackward>
__device__ inline ChannelTotals merge_by_warp(const KernelArgs& args, int64_t c) {
  constexpr int kReads = 5;
  const int64_t stride = args.wide_channels * args.num_splits;
  const double* of_channel = args.partials + c * args.num_splits;
  const int splits = static_cast<int>(args.num_splits);
  double pivot = kBackward ? 0 : read_number(of_channel + stride), sum[kNumSums] = {0, 0, 0};
  for (int first = threadIdx.x % kWarpSize; first < splits; first += kReads * kWarpSize) {
    double part[kNumSums][kReads];
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const int split = first + i * kWarpSize;
#pragma unroll
      for (int k = 0; k < kNumSums; ++k) part[k][i] = split < splits ? read_number(of_channel + k * stride + split) : 0;
    }
    if (!is_finite(pivot)) pivot = 0;  // NaN and Inf reach the result through the sums
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const double distance = part[1][i] - pivot;
      sum[0] += kBackward ? part[0][i] : part[0][i] * distance;
      sum[1] += kBackward ? part[1][i] : part[2][i] + part[0][i] * distance * distance;
      if (kBackward) sum[2] += part[2][i];
    }
  }
  if (!is_finite(pivot)) pivot = 0;  // of lanes that had nothing to add
#pragma unroll
  for (int k = 0; k < kNumSums; ++k) sum[k] = warp_sum(sum[k]);
  if (kBackward) return {{sum[0], sum[1], sum[2]}};
  const double distance = sum[0] / args.num_positions;
  return {{pivot + distance, sum[1] - distance * sum[0], 0}};
}

// What coefficients follow from, beside a channel's sums.
struct ChannelInputs {
  double weight, bias;                       // forward has these,
  double mean, invstd, grad_mean, grad_var;  // backward these, and weight
};

__device__ inline ChannelInputs load_inputs(const KernelArgs& args, int64_t c) {
  const double weight = load_channel(args.weight, c, 1);
  if (!args.backward) return {weight, load_channel(args.bias, c, 0), 0, 0, 0, 0};
  return {weight,
          0,
          load_channel(args.mean, c, 0),
          load_channel(args.invstd, c, 1),
          load_channel(args.grad_mean, c, 0),
          load_channel(args.grad_var, c, 0)};
}

// The same by one warp in one trip to memory, a number for each lane. They meet in lane 0, which alone may use the result
// of gather_inputs.
template <bool kBackward>
__device__ inline double load_input_of_lane(const KernelArgs& args, int64_t c) {
  const int lane = threadIdx.x % kWarpSize;
  ChannelVector vector = {};
  if (lane == 0) vector = args.weight;
  if (lane == 1) vector = kBackward ? args.mean : args.bias;
  if (kBackward && lane == 2) vector = args.invstd;
  if (kBackward && lane == 3) vector = args.grad_mean;
  if (kBackward && lane == 4) vector = args.grad_var;
  return load_channel(vector, c, lane == 0 ? 1 : 0);
}

template <bool kBackward>
__device__ inline ChannelInputs gather_inputs(double of_lane) {
  auto from = [&](int lane) { return __shfl_xor_sync(kFullWarp, of_lane, lane); };
  const double second = from(1);
  if (!kBackward) return {of_lane, second, 0, 0, 0, 0};
  const double invstd = from(2), grad_mean = from(3), grad_var = from(4);
  return {of_lane, 0, second, invstd, grad_mean, grad_var};
}

// What a pass says of a channel. Statistics: mean, invstd, var. Backward: dbias, dweight, dvar, dmean.
template <typename Acc>
struct Finished {
  Coefficients<Acc> coefficients;
  double result[4];
};

// y = scale_x * (x - centre) + shift: centred, so that nothing cancels where the mean is large. What rounding takes from
// the mean to make it `centre` goes into the shift.
template <typename Acc>
__device__ inline Finished<Acc> finish_forward(const KernelArgs& args, const ChannelTotals& totals,
                                               const ChannelInputs& inputs) {
  // Rounding may leave a sum of squares a little below zero; NaN stays.
  const double mean = totals.value[0], squares = totals.value[1] < 0 ? 0 : totals.value[1];
  const double var = squares / args.num_positions;
  const double invstd = 1 / square_root(var + args.eps);
  const double scale = inputs.weight * invstd;
  const Acc centre = static_cast<Acc>(mean);
  const double shift = inputs.bias - scale * (mean - centre);
  return {{Acc(0), static_cast<Acc>(scale), centre, static_cast<Acc>(shift)}, {mean, invstd, var, 0}};
}

// dx = scale_dy * dy + (scale_x * (x - centre) + shift).
template <typename Acc>
__device__ inline Finished<Acc> finish_backward(const KernelArgs& args, const ChannelTotals& totals,
                                                const ChannelInputs& inputs) {
  const double m = args.num_positions;
  const double invstd = inputs.invstd;
  const double scale = inputs.weight * invstd;
  const double sum_dy = totals.value[0];
  // The mean was rounded when it was saved. In training it is the batch mean, so sum(x - mean) / m is what rounding took
  // from it; in eval it is a constant.
  const double lost = args.training ? totals.value[2] / m : 0;
  const double sum_dy_xmu = totals.value[1] - lost * sum_dy;
  const double dvar = inputs.grad_var - 0.5 * scale * invstd * invstd * sum_dy_xmu;
  // The term of the paper with sum(x - mean) is zero: mean is the batch mean, or a constant.
  const double dmean = inputs.grad_mean - scale * sum_dy;
  const double scale_x = 2 * dvar / m;
  return {{static_cast<Acc>(scale), static_cast<Acc>(scale_x), static_cast<Acc>(inputs.mean),
           static_cast<Acc>(dmean / m - scale_x * lost)},
          {sum_dy, sum_dy_xmu * invstd, dvar, dmean}};
}

__device__ inline void store_statistics(const KernelArgs& args, int64_t c, const double (&result)[4]) {
  const double mean = result[0], var = result[2];
  store_channel(args.mean, c, mean);
  store_channel(args.invstd, c, result[1]);
  store_channel(args.stats_mean, c, mean);
  store_channel(args.stats_var, c, var);
  if (args.running_mean.data == nullptr) return;
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

__device__ inline void store_gradients(const KernelArgs& args, int64_t c, const double (&result)[4]) {
  store_channel(args.dbias, c, result[0]);
  store_channel(args.dweight, c, result[1]);
  store_channel(args.dvar, c, result[2]);
  store_channel(args.dmean, c, result[3]);
}

template <typename Acc>
__device__ inline Coefficients<Acc> finish_channel(const KernelArgs& args, int64_t c, const ChannelTotals& totals,
                                                   bool write) {
  const ChannelInputs inputs = load_inputs(args, c);
  if (args.backward) {
    const Finished<Acc> finished = finish_backward<Acc>(args, totals, inputs);
    if (write) store_gradients(args, c, finished.result);
    return finished.coefficients;
  }
  const Finished<Acc> finished = finish_forward<Acc>(args, totals, inputs);
  if (write) store_statistics(args, c, finished.result);
  return finished.coefficients;
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
  const ChannelTotals totals = merge_partials(args, c, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x != 0) return;
  const Coefficients<Acc> coefficients = finish_channel<Acc>(args, c, totals, true);
  if (stored != nullptr) stored[c] = coefficients;
}

// In on-chip kernels, where nobody reads it: with a cumulative momentum, a kernel before them counts.
__device__ inline void count_batch(const KernelArgs& args) {
  const bool counts = args.num_batches_tracked != nullptr && !args.cumulative;
  if (counts && blockIdx.x == 0 && threadIdx.x == 0) ++*args.num_batches_tracked;
}

// Before on-chip kernels that rely on it: counters begin at zero, and where the momentum is cumulative the batch has been
// counted, because it is then 1 / number of batches, which all blocks read. One block.
__global__ void __launch_bounds__(kMaxThreads) prepare_kernel(const KernelArgs args) {
  if (args.cumulative && args.num_batches_tracked != nullptr && threadIdx.x == 0) ++*args.num_batches_tracked;
  if (args.counters == nullptr) return;
  for (int64_t c = threadIdx.x; c < args.num_channels; c += blockDim.x) args.counters[c] = 0;
}

}  // namespace bnext::cuda
