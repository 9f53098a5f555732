// Arithmetic that plans of all families share.
#pragma once

#include <algorithm>
#include <cassert>

#include "plan.h"

namespace bnext::cuda {

constexpr int kMinThreads = 64;
constexpr int64_t kLineBytes = 128;                     // of a cache
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // gridDim.x
constexpr int64_t kSharedUnit = 256;                    // in which an SM hands out its memory, or a smaller one

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t acc_bytes(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

// In the workspace: the partial sums of so many blocks for each channel, and the coefficients of so many channels.
inline int64_t partial_bytes(int64_t channels, int64_t blocks) {
  return kNumSums * channels * blocks * static_cast<int64_t>(sizeof(double));
}
inline int64_t coefficient_bytes(DType dtype, int64_t channels) {
  return channels * (dtype == DType::kFloat64 ? sizeof(Coefficients<double>) : sizeof(Coefficients<float>));
}

// Of streaming kernels, threads that an SM has room for at once.
inline int streaming_threads(const DeviceInfo& device) {
  return std::min(device.threads_per_sm, kStreamingBlocksPerSm * kMaxThreads);
}

// How many lanes of a warp add up a channel's numbers: those of the block's parts, and, where blocks leave theirs in
// the workspace, those of all blocks. Planes have one channel, and a warp for it.
inline int group_lanes_of(const Plan& plan) {
  if (plan.walk == Walk::kPlanes) return kWarpSize;
  const int places = count_channel_places(plan.vec, plan.run_length, plan.block_packs, plan.slab_channels);
  const int64_t numbers = int64_t{places} * count_parts(plan.threads, plan.block_packs);
  const bool through_memory = !plan.on_chip || plan.family == Family::kGrid;
  return count_group_lanes(plan.threads, plan.slab_channels,
                           through_memory ? std::max(numbers, plan.num_splits) : numbers);
}

// How many groups of lanes share a channel's sums. Where a channel has many places (runs of channels), one group would
// go round long, and the other warps would wait for it: a second stage, with a barrier before it, is worth it from some
// rounds on. Sums of a grid, and of streaming, go through the workspace anyway.
inline int64_t slices_of(const Plan& plan) {
  constexpr int64_t kRounds = 4;
  if (!plan.on_chip || plan.family == Family::kGrid || plan.walk != Walk::kRows) return 1;
  if (group_lanes_of(plan) < kWarpSize) return 1;
  const int places = count_channel_places(plan.vec, plan.run_length, plan.block_packs, plan.slab_channels);
  const int numbers = places * count_parts(plan.threads, plan.block_packs);
  return std::min<int64_t>(ceil_div(numbers, kRounds * kWarpSize), plan.threads / kWarpSize / plan.slab_channels);
}

// Bytes that are moved once, and those that are read again because they have no place on chip.
inline double bytes_once(const Plan& plan) {
  return static_cast<double>((plan.tensors_read + plan.tensors_written) * plan.tensor_bytes);
}
inline double bytes_again(const Plan& plan) { return static_cast<double>(plan.bytes_moved) - bytes_once(plan); }

// What a block asks L2 for of a later slab, of all tensors together.
inline double early_bytes(const Plan& plan) {
  return static_cast<double>(plan.early_lines) * plan.line_packs * kPackBytes * plan.tensors_read;
}

// What a block of this plan has in its shared memory behind `slots` bytes.
inline SharedLayout make_layout(const Plan& plan, int64_t slots) {
  const bool rows = plan.walk == Walk::kRows;
  const int64_t acc = acc_bytes(plan.dtype), parts = count_parts(plan.threads, plan.block_packs);
  const int64_t places = rows ? count_part_places(plan.vec, plan.run_length, plan.block_packs) : 1;
  assert(!has_two_sides(plan.vec, plan.run_length) || !parts_are_warps(plan.block_packs));
  SharedLayout layout;
  layout.parts = slots;
  layout.counts = layout.parts + kNumSums * parts * places * acc;
  layout.totals = round_up(layout.counts + parts * 4, kPackBytes);
  const int64_t slices = slices_of(plan), channels = plan.slab_channels;
  const bool several = slices * plan.cluster > 1;  // else the block's totals are those of all
  layout.results = layout.totals + (several ? slices * kNumSums * channels * 8 : 0);
  layout.inputs = layout.results + (plan.on_chip ? kNumSums * channels * 8 : 0);
  layout.coefficients = round_up(layout.inputs + (plan.persistent ? 2 : 1) * input_bytes(channels), kPackBytes);
  const bool by_element = rows && one_channel_a_column(plan.slab_channels, plan.block_packs, plan.vec);
  const int64_t coefficients = by_element ? int64_t{plan.vec} * odd_packs(plan.block_packs) : channels;
  layout.bytes = layout.coefficients + coefficient_bytes(plan.dtype, coefficients);
  return layout;
}

}  // namespace bnext::cuda
