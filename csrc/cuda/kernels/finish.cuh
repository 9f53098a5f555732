// From the totals of a channel to its results and to the coefficients of the apply pass. All of it in float64: it is
// little work, and what it rounds every element would inherit. Each of these functions is for a thread that knows all
// of a channel.
#pragma once

#include "../device/math.cuh"
#include "../device/overlap.cuh"
#include "block_sums.cuh"

namespace bnext::cuda {

// Which of KernelArgs::input and KernelArgs::output are what.
namespace forward {
enum Input : int { kWeight, kBias, kRunningMean, kRunningVar, kNumInputs };
enum Output : int { kMean, kInvstd, kStatsMean, kStatsVar, kNewMean, kNewVar, kNumOutputs };
}  // namespace forward
namespace backward {
enum Input : int { kWeight, kMean, kInvstd, kGradMean, kGradVar, kNumInputs };
enum Output : int { kDbias, kDweight, kDvar, kDmean, kNumOutputs };
}  // namespace backward
static_assert(forward::kNumInputs <= kMostInputs && backward::kNumInputs == kMostInputs, "each has a place");
static_assert(forward::kNumOutputs == kMostOutputs && backward::kNumOutputs <= kMostOutputs, "each has a place");
__device__ constexpr int count_inputs(bool backward) {
  return backward ? static_cast<int>(backward::kNumInputs) : static_cast<int>(forward::kNumInputs);
}
__device__ constexpr int count_outputs(bool backward) {
  return backward ? static_cast<int>(backward::kNumOutputs) : static_cast<int>(forward::kNumOutputs);
}

// What vectors have of a channel, by role; 0 where there is none, and 1 for a weight.
struct Inputs {
  double value[kMostInputs];
};

__device__ inline double read_input(const KernelArgs& args, int role, Asked bits) {
  return read_channel(args.input[role], bits, role == static_cast<int>(forward::kWeight) ? 1 : 0);
}

// A thread's number from the last one on: for work that should not come to the first ones, who finish channels.
__device__ inline int count_from_last() { return static_cast<int>(blockDim.x - 1 - threadIdx.x); }

// What vectors have of the block's channels, to shared memory, [role][channel]: a thread for each number, so that all
// of it is one trip to memory. A thread asks for its first number, as early as it likes, and leaves it, and what others
// it may have. channel_of(i): which one of the tensors', or less than 0; seen(role, i, number): whatever else there is
// to do with it. (Where a number goes is found out twice: kept, it would be two registers, which are spilled.)
template <typename F>
__device__ inline Asked ask_for_input(const KernelArgs& args, bool backward, F channel_of, int n = count_from_last()) {
  Asked bits = {};
  if (n < count_inputs(backward) * args.slab_channels) {
    const int role = static_cast<int>(args.by_slab.divide(n));
    ask_channel(bits, args.input[role], channel_of(n - role * args.slab_channels));
  }
  return bits;
}
template <typename F, typename G>
__device__ inline void leave_inputs(const KernelArgs& args, bool backward, Asked first, double* to, F channel_of,
                                    G seen) {
  const int channels = args.slab_channels;
#pragma unroll 1
  for (int n = count_from_last(); n < count_inputs(backward) * channels; n += blockDim.x) {
    const int role = static_cast<int>(args.by_slab.divide(n)), i = n - role * channels;
    const bool is_first = n < static_cast<int>(blockDim.x);
    if (channel_of(i) < 0) continue;
    to[n] = read_input(args, role, is_first ? first : ask_for_input(args, backward, channel_of, n));
    seen(role, i, to[n]);
  }
}
__device__ inline Inputs inputs_of(bool backward, int channels, const double* left, int i) {
  Inputs inputs = {};
#pragma unroll
  for (int role = 0; role < kMostInputs; ++role) {
    if (role < count_inputs(backward)) inputs.value[role] = left[role * channels + i];
  }
  return inputs;
}

// What the elements of a channel are mapped with, and what there is to be stored of it, by role; but for the new
// running statistics, which are work that only those do who store.
template <typename Acc>
struct Finished {
  Coefficients<Acc> coefficients;
  double output[kMostOutputs];
};

__device__ inline void add_running_statistics(const KernelArgs& args, const Inputs& inputs,
                                              double (&output)[kMostOutputs]) {
  const double old_mean = inputs.value[forward::kRunningMean], old_var = inputs.value[forward::kRunningVar];
  output[forward::kNewMean] = old_mean;
  output[forward::kNewVar] = old_var;
  const double momentum = args.cumulative && args.num_batches_tracked != nullptr
                              ? 1.0 / static_cast<double>(load_from_l2(args.num_batches_tracked) + !args.batch_counted)
                              : args.momentum;
  const double new_mean = momentum * output[forward::kStatsMean] + (1 - momentum) * old_mean;
  const double new_var = momentum * (output[forward::kStatsVar] * args.unbiased) + (1 - momentum) * old_var;
  const double limit = args.running_limit;
  if (limit == 0 || (fabs(new_mean) <= limit && fabs(new_var) <= limit)) {
    output[forward::kNewMean] = new_mean;
    output[forward::kNewVar] = new_var;
  }
}

// Stores every step-th of them, from one on: threads share them between them. A loop, because it is little work but
// much code.
template <typename Acc>
__device__ inline void store_outputs(const KernelArgs& args, bool backward, int64_t channel, const Inputs& inputs,
                                     Finished<Acc> found, int first, int step) {
  if (!backward && args.output[forward::kNewMean].data != nullptr) {
    add_running_statistics(args, inputs, found.output);
  }
#pragma unroll 1
  for (int role = first; role < count_outputs(backward); role += step) {
    if (args.output[role].data == nullptr) continue;
    double output = found.output[0];
#pragma unroll
    for (int other = 1; other < kMostOutputs; ++other) output = role == other ? found.output[other] : output;
    store_channel(args.output[role], channel, output);
  }
}

// y = scale_x * (x - centre) + shift: centred, so that nothing cancels where the mean is large. What rounding takes
// from the mean to make it `centre` goes into the shift.
template <typename Acc>
__device__ inline Finished<Acc> finish_forward(const KernelArgs& args, const ChannelTotals& totals,
                                               const Inputs& inputs) {
  // Rounding may leave a sum of squares a little below zero; NaN stays.
  const double mean = totals.value[1], squares = totals.value[2] < 0 ? 0 : totals.value[2];
  const double var = squares * args.inverse_positions, invstd = reciprocal_root(var + args.eps);
  const double scale = inputs.value[forward::kWeight] * invstd, bias = inputs.value[forward::kBias];
  const Acc centre = static_cast<Acc>(mean);
  return {{Acc(0), static_cast<Acc>(scale), centre, static_cast<Acc>(bias - scale * (mean - centre))},
          {mean, invstd, mean, var}};
}

// dx = scale_dy * dy + (scale_x * (x - centre) + shift).
template <typename Acc>
__device__ inline Finished<Acc> finish_backward(const KernelArgs& args, const ChannelTotals& totals,
                                                const Inputs& inputs) {
  const double invstd = inputs.value[backward::kInvstd], mean = inputs.value[backward::kMean];
  const double scale = inputs.value[backward::kWeight] * invstd;
  const double sum_dy = totals.value[0];
  // The mean was rounded when it was saved. In training it is the batch mean, so sum(x - mean) / m is what rounding
  // took from it; in eval it is a constant.
  const double lost = args.training ? totals.value[2] * args.inverse_positions : 0;
  const double sum_dy_xmu = totals.value[1] - lost * sum_dy;
  const double grad_var = inputs.value[backward::kGradVar];
  const double scale_invstd = scale * invstd, dweight = sum_dy_xmu * invstd;
  const double dvar = grad_var - 0.5 * scale_invstd * invstd * sum_dy_xmu;
  // The term of the paper with sum(x - mean) is zero: mean is the batch mean, or a constant.
  const double dmean = inputs.value[backward::kGradMean] - scale * sum_dy;
  // 2 * dvar / m without invstd * invstd * invstd, which is out of range long before this is.
  const double scale_x = (2 * grad_var - scale_invstd * dweight) * args.inverse_positions;
  return {{static_cast<Acc>(scale), static_cast<Acc>(scale_x), static_cast<Acc>(mean),
           static_cast<Acc>(dmean * args.inverse_positions - scale_x * lost)},
          {sum_dy, dweight, dvar, dmean}};
}

template <typename Acc>
__device__ inline Finished<Acc> finish_channel(const KernelArgs& args, bool backward, const ChannelTotals& totals,
                                               const Inputs& inputs) {
  return backward ? finish_backward<Acc>(args, totals, inputs) : finish_forward<Acc>(args, totals, inputs);
}

// Eval: everything follows from vectors. In Acc, because float64 is slow on some devices.
template <typename Acc>
__device__ inline Finished<Acc> finish_constant(const KernelArgs& args, bool backward, const Inputs& inputs) {
  if (backward) {
    const Acc scale =
        static_cast<Acc>(inputs.value[backward::kWeight]) * static_cast<Acc>(inputs.value[backward::kInvstd]);
    return {{scale, Acc(0), static_cast<Acc>(inputs.value[backward::kMean]), Acc(0)}, {}};
  }
  const Acc mean = static_cast<Acc>(inputs.value[forward::kRunningMean]);
  const Acc var = static_cast<Acc>(inputs.value[forward::kRunningVar]);
  const Acc invstd = Acc(1) / square_root(var + static_cast<Acc>(args.eps));
  const Acc scale = static_cast<Acc>(inputs.value[forward::kWeight]) * invstd;
  return {{Acc(0), scale, mean, static_cast<Acc>(inputs.value[forward::kBias])}, {mean, invstd, mean, var}};
}

// ---- from partial sums -------------------------------------------------------------------------------------------

// Sums over blocks. Statistics are around the mean of the first one, which all have to know.
struct PartialSums {
  double point, value[kNumSums];

  // A block's totals, or zeros.
  __device__ void add(bool backward, double v0, double v1, double v2) {
    const double distance = v1 - point;
    value[0] += v0;
    value[1] += backward ? v1 : v0 * distance;
    value[2] += backward ? v2 : v2 + v0 * distance * distance;
  }
};
// From a first block's mean, if it is a number.
__device__ inline PartialSums begin_partials(double mean) { return {is_finite(mean) ? mean : 0, {0, 0, 0}}; }

// This thread's share of the partial sums of channel c: of its splits every `sharers`-th. A folded row has several
// columns of channel c, num_channels apart, and all of them are added up. A few reads at once: each is a trip to L2.
__device__ inline PartialSums add_partials(const KernelArgs& args, bool backward, int64_t c, int sharer, int sharers) {
  constexpr int kReads = kPartialsAtOnce;
  const int64_t stride = args.tile_channels * args.num_splits;
  const double* of_channel = args.partials + c * args.num_splits;
  const int splits = static_cast<int>(args.num_splits);
  PartialSums sums = begin_partials(backward ? 0 : load_from_l2(of_channel + stride));
  for (int64_t column = c; column < args.tile_channels; column += args.num_channels) {
#pragma unroll 1
    for (int first = sharer; first < splits; first += kReads * sharers) {
      double part[kNumSums][kReads];
#pragma unroll
      for (int i = 0; i < kReads; ++i) {
        const int split = first + i * sharers;
#pragma unroll
        for (int k = 0; k < kNumSums; ++k) {
          part[k][i] = split < splits ? load_from_l2(of_channel + k * stride + split) : 0;
        }
      }
#pragma unroll
      for (int i = 0; i < kReads; ++i) sums.add(backward, part[0][i], part[1][i], part[2][i]);
    }
    of_channel += args.num_channels * args.num_splits;
  }
  return sums;
}

__device__ inline ChannelTotals partial_totals(const KernelArgs& args, bool backward, const PartialSums& sums) {
  const double *v = sums.value, inverse = args.inverse_positions;
  return backward ? ChannelTotals{{v[0], v[1], v[2]}} : Moments{sums.point, v[0], v[1], v[2]}.totals(inverse);
}

// A channel's totals from all its partial sums, for lane `lane` of so many neighbouring ones.
__device__ inline ChannelTotals group_partial_totals(const KernelArgs& args, bool backward, int64_t channel, int lane,
                                                     int lanes) {
  PartialSums sums = add_partials(args, backward, channel, lane, lanes);
  group_sum(lanes, sums.value);
  return partial_totals(args, backward, sums);
}

// One block for each channel. Its warps add up what they have in shared memory, and the first one finishes. Without a
// second bound ptxas aims at 32 registers on some architectures, and spills.
template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads, 4) finish_kernel(const __grid_constant__ KernelArgs args) {
  const int64_t c = blockIdx.x;
  const int lane = threadIdx.x % kWarpSize, num_warps = blockDim.x / kWarpSize;
  if (args.coefficients != nullptr) start_next_kernel();  // else the next one is not of this pass
  double* inputs = shared_at<double>(0);
  double* scratch = inputs + kMostInputs;
  const int role = threadIdx.x;
  if (role < count_inputs(args.backward)) {
    Asked bits = {};
    ask_channel(bits, args.input[role], c);
    inputs[role] = read_input(args, role, bits);
  }
  wait_for_kernels();
  if (args.source == Source::kConstants) {
    __syncthreads();
    const Inputs own = inputs_of(false, 1, inputs, 0);
    store_outputs(args, false, c, own, finish_constant<Acc>(args, false, own), role, blockDim.x);
    return;
  }
  PartialSums sums = add_partials(args, args.backward, c, threadIdx.x, blockDim.x);
#pragma unroll
  for (int k = 0; k < kNumSums; ++k) {
    sums.value[k] = warp_sum(sums.value[k]);
    if (lane == 0) scratch[k * num_warps + threadIdx.x / kWarpSize] = sums.value[k];
  }
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
#pragma unroll
  for (int k = 0; k < kNumSums; ++k) sums.value[k] = warp_sum(lane < num_warps ? scratch[k * num_warps + lane] : 0);
  const Inputs own = inputs_of(args.backward, 1, inputs, 0);
  const auto found = finish_channel<Acc>(args, args.backward, partial_totals(args, args.backward, sums), own);
  auto* stored = static_cast<Coefficients<Acc>*>(args.coefficients);
  if (stored != nullptr && lane == 0) stored[c] = found.coefficients;
  store_outputs(args, args.backward, c, own, found, lane, kWarpSize);
}

// By one thread of a kernel in which nobody reads it: in one that finishes channels, not where the momentum is
// cumulative.
__device__ inline void count_batch(const KernelArgs& args, bool if_cumulative) {
  const bool counts = args.num_batches_tracked != nullptr && (if_cumulative || !args.cumulative);
  if (counts && blockIdx.x == 0 && threadIdx.x == 0) increment(args.num_batches_tracked);
}

// After on-chip kernels where the momentum is cumulative: it is 1 / number of batches, which all their blocks read. Not
// before them, so that nothing is counted if their launch is refused.
__global__ void __launch_bounds__(kWarpSize) count_kernel(const __grid_constant__ KernelArgs args) {
  count_batch(args, true);
}

}  // namespace bnext::cuda
