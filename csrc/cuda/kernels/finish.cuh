// From the totals of a channel to its results and to the coefficients of the apply pass. All of it in float64: it is
// little work, and what it rounds every element would inherit. A group of lanes does it for each channel: all lanes
// work out the same, but each loads, and each stores, another vector's number. So it is one trip to memory, and one
// piece of code.
#pragma once

#include "../device/math.cuh"
#include "../device/overlap.cuh"
#include "block_sums.cuh"

namespace bnext::cuda {

// The roles of a group's first lanes: which of KernelArgs::input and KernelArgs::output are theirs.
namespace forward {
enum Input : int { kWeight, kBias, kRunningMean, kRunningVar };
enum Output : int { kMean, kInvstd, kStatsMean, kStatsVar, kNewMean, kNewVar };
static_assert(kNewVar < count_outputs(false), "each has a place");
}  // namespace forward
namespace backward {
enum Input : int { kWeight, kMean, kInvstd, kGradMean, kGradVar };
enum Output : int { kDbias, kDweight, kDvar, kDmean };
static_assert(kDmean < count_outputs(true), "each has a place");
}  // namespace backward

// What the lane's role has to load, or 0; a weight that is not there is 1.
__device__ inline double load_input(const KernelArgs& args, int64_t channel, int lane) {
  const bool weight = lane == static_cast<int>(forward::kWeight);
  return lane < kRoles ? load_channel(args.input[lane], channel, weight ? 1 : 0) : 0;
}

// What the lane with a role has, for all lanes of the group. (Where a whole warp finishes a channel, a group can be a
// part of it, and the first one is the channel's. The others have no vectors' numbers, and nobody uses what they find.)
__device__ inline double of_role(const KernelArgs& args, double value, int role) {
  return __shfl_sync(kFullWarp, value, (threadIdx.x & ~static_cast<unsigned>(args.group_lanes - 1)) + role);
}

// What the lane's role has to store, of what there is to be stored by role.
__device__ inline double pick_output(int lane, const double (&output)[kRoles]) {
  double value = output[0];
#pragma unroll
  for (int role = 1; role < kRoles; ++role) value = lane == role ? output[role] : value;
  return value;
}

// The functions that finish a channel call leave(coefficients), what its elements are mapped with, as soon as they know
// them: others wait for those. They return what the lane's role has to store.

// y = scale_x * (x - centre) + shift: centred, so that nothing cancels where the mean is large. What rounding takes
// from the mean to make it `centre` goes into the shift.
template <typename Acc, typename F>
__device__ inline double finish_forward(const KernelArgs& args, const ChannelTotals& totals, double input, int lane,
                                        F leave) {
  // Rounding may leave a sum of squares a little below zero; NaN stays.
  const double mean = totals.value[1], squares = totals.value[2] < 0 ? 0 : totals.value[2];
  const double var = squares * args.inverse_positions, invstd = reciprocal_root(var + args.eps);
  const double scale = of_role(args, input, forward::kWeight) * invstd, bias = of_role(args, input, forward::kBias);
  const Acc centre = static_cast<Acc>(mean);
  leave(Coefficients<Acc>{Acc(0), static_cast<Acc>(scale), centre, static_cast<Acc>(bias - scale * (mean - centre))});
  const double old_mean = of_role(args, input, forward::kRunningMean);
  const double old_var = of_role(args, input, forward::kRunningVar);
  double output[kRoles] = {mean, invstd, mean, var, old_mean, old_var};
  if (args.output[forward::kNewMean].data == nullptr) return pick_output(lane, output);
  const double momentum = args.cumulative && args.num_batches_tracked != nullptr
                              ? 1.0 / static_cast<double>(load_from_l2(args.num_batches_tracked) + !args.batch_counted)
                              : args.momentum;
  const double new_mean = momentum * mean + (1 - momentum) * old_mean;
  const double new_var = momentum * (var * args.unbiased) + (1 - momentum) * old_var;
  const double limit = args.running_limit;
  if (limit == 0 || (fabs(new_mean) <= limit && fabs(new_var) <= limit)) {
    output[forward::kNewMean] = new_mean;
    output[forward::kNewVar] = new_var;
  }
  return pick_output(lane, output);
}

// dx = scale_dy * dy + (scale_x * (x - centre) + shift).
template <typename Acc, typename F>
__device__ inline double finish_backward(const KernelArgs& args, const ChannelTotals& totals, double input, int lane,
                                         F leave) {
  const double invstd = of_role(args, input, backward::kInvstd), mean = of_role(args, input, backward::kMean);
  const double scale = of_role(args, input, backward::kWeight) * invstd;
  const double sum_dy = totals.value[0];
  // The mean was rounded when it was saved. In training it is the batch mean, so sum(x - mean) / m is what rounding
  // took from it; in eval it is a constant.
  const double lost = args.training ? totals.value[2] * args.inverse_positions : 0;
  const double sum_dy_xmu = totals.value[1] - lost * sum_dy;
  const double grad_var = of_role(args, input, backward::kGradVar);
  const double scale_invstd = scale * invstd, dweight = sum_dy_xmu * invstd;
  const double dvar = grad_var - 0.5 * scale_invstd * invstd * sum_dy_xmu;
  // The term of the paper with sum(x - mean) is zero: mean is the batch mean, or a constant.
  const double dmean = of_role(args, input, backward::kGradMean) - scale * sum_dy;
  // 2 * dvar / m without invstd * invstd * invstd, which is out of range long before this is.
  const double scale_x = (2 * grad_var - scale_invstd * dweight) * args.inverse_positions;
  leave(Coefficients<Acc>{static_cast<Acc>(scale), static_cast<Acc>(scale_x), static_cast<Acc>(mean),
                          static_cast<Acc>(dmean * args.inverse_positions - scale_x * lost)});
  return pick_output(lane, {sum_dy, dweight, dvar, dmean});
}

// Eval: everything follows from vectors. In Acc, because float64 is slow on some devices.
template <typename Acc, typename F>
__device__ inline double finish_constant(const KernelArgs& args, bool backward, double input, int lane, F leave) {
  if (backward) {
    const Acc scale = static_cast<Acc>(of_role(args, input, backward::kWeight)) *
                      static_cast<Acc>(of_role(args, input, backward::kInvstd));
    leave(Coefficients<Acc>{scale, Acc(0), static_cast<Acc>(of_role(args, input, backward::kMean)), Acc(0)});
    return 0;
  }
  const Acc mean = static_cast<Acc>(of_role(args, input, forward::kRunningMean));
  const Acc var = static_cast<Acc>(of_role(args, input, forward::kRunningVar));
  const Acc invstd = Acc(1) / square_root(var + static_cast<Acc>(args.eps));
  const Acc scale = static_cast<Acc>(of_role(args, input, forward::kWeight)) * invstd;
  const Acc bias = static_cast<Acc>(of_role(args, input, forward::kBias));
  leave(Coefficients<Acc>{Acc(0), scale, mean, bias});
  return pick_output(lane, {mean, invstd, mean, var});
}

__device__ inline void store_output(const KernelArgs& args, int64_t channel, int lane, double output) {
  if (lane < kRoles) store_channel(args.output[lane], channel, output);
}

// ---- from partial sums -------------------------------------------------------------------------------------------

// This thread's share of the partial sums of channel c: of its splits every `sharers`-th. A folded row has several
// columns of channel c, num_channels apart, and all of them are added up. A few reads at once: each is a trip to L2.
// Statistics are around the mean of the first block, which all have to know.
struct PartialSums {
  double point, value[kNumSums];
};

__device__ inline PartialSums add_partials(const KernelArgs& args, int64_t c, int sharer, int sharers) {
  const bool backward = args.backward;
  constexpr int kReads = kPartialsAtOnce;
  const int64_t stride = args.tile_channels * args.num_splits;
  const double* of_channel = args.partials + c * args.num_splits;
  const int splits = static_cast<int>(args.num_splits);
  const double first_mean = backward ? 0 : load_from_l2(of_channel + stride);
  PartialSums sums = {is_finite(first_mean) ? first_mean : 0, {0, 0, 0}};
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
      for (int i = 0; i < kReads; ++i) {
        const double count = part[0][i], distance = part[1][i] - sums.point;
        sums.value[0] += backward ? part[0][i] : count;
        sums.value[1] += backward ? part[1][i] : count * distance;
        sums.value[2] += backward ? part[2][i] : part[2][i] + count * distance * distance;
      }
    }
    of_channel += args.num_channels * args.num_splits;
  }
  return sums;
}

__device__ inline ChannelTotals partial_totals(const KernelArgs& args, const PartialSums& sums) {
  const double *v = sums.value, inverse = args.inverse_positions;
  return args.backward ? ChannelTotals{{v[0], v[1], v[2]}} : Moments{sums.point, v[0], v[1], v[2]}.totals(inverse);
}

// A channel's totals from all its partial sums, for lane `lane` of so many neighbouring ones.
__device__ inline ChannelTotals group_partial_totals(const KernelArgs& args, int64_t channel, int lane, int lanes) {
  PartialSums sums = add_partials(args, channel, lane, lanes);
  group_sum(lanes, sums.value);
  return partial_totals(args, sums);
}

// For a group of lanes that has a channel's totals.
template <typename Acc, typename F>
__device__ inline double finish_group(const KernelArgs& args, bool backward, const ChannelTotals& totals, double input,
                                      int lane, F leave) {
  return backward ? finish_backward<Acc>(args, totals, input, lane, leave)
                  : finish_forward<Acc>(args, totals, input, lane, leave);
}

// One block for each channel. Its warps add up what they have in shared memory, and the first one finishes. Without a
// second bound ptxas aims at 32 registers on some architectures, and spills.
template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads, 4) finish_kernel(const __grid_constant__ KernelArgs args) {
  const int64_t c = blockIdx.x;
  const int lane = threadIdx.x % kWarpSize, num_warps = blockDim.x / kWarpSize;
  if (args.coefficients != nullptr) start_next_kernel();  // else the next one is not of this pass
  const double input = load_input(args, c, lane);
  wait_for_kernels();
  if (args.source == Source::kConstants) {
    store_output(args, c, lane, finish_constant<Acc>(args, false, input, lane, [](const Coefficients<Acc>&) {}));
    return;
  }
  PartialSums sums = add_partials(args, c, threadIdx.x, blockDim.x);
  double* scratch = shared_at<double>(0);
#pragma unroll
  for (int k = 0; k < kNumSums; ++k) {
    sums.value[k] = warp_sum(sums.value[k]);
    if (lane == 0) scratch[k * num_warps + threadIdx.x / kWarpSize] = sums.value[k];
  }
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
#pragma unroll
  for (int k = 0; k < kNumSums; ++k) sums.value[k] = warp_sum(lane < num_warps ? scratch[k * num_warps + lane] : 0);
  const ChannelTotals totals = partial_totals(args, sums);
  const double output =
      finish_group<Acc>(args, args.backward, totals, input, lane, [&](const Coefficients<Acc>& found) {
        auto* stored = static_cast<Coefficients<Acc>*>(args.coefficients);
        if (stored != nullptr && lane == 0) stored[c] = found;
      });
  store_output(args, c, lane, output);
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
