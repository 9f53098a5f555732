#include "plan_on_chip.h"

#include <cmath>
#include <numeric>

#include "plan_cost.h"
#include "plan_steps.h"

namespace bnext::cuda {
namespace {

constexpr double kClusterUs = 1;    // more of a reduction: a cluster's barrier and remote reads
constexpr double kStaggered = 0.6;  // of a reduction in later waves, where another block of the SM moves data meanwhile
constexpr double kApplyUs = 1;      // an apply kernel's block, from its start to its first store
constexpr double kStepUs = 0.1;     // of a step that is held: memory waits while it is mapped. H100: 0.1 to 0.2
constexpr double kBusyThreads = 256;  // of an SM: with fewer, memory waits for threads all the time
constexpr double kNarrowRows = 1.05;  // reading rows by halves of a cache line

// Registers of a thread, or a few more: what ptxas takes.
constexpr int kRegisters = 80, kRegistersForHalves = 96;
constexpr int kMaxBlocksPerSm = 32;
constexpr int64_t kReservedSharedBytes = 1 << 10;  // of each block, by the driver

int blocks_per_sm(const Plan& plan, const DeviceInfo& device) {
  const int64_t by_memory = device.shared_bytes_per_sm / (plan.layout.bytes + kReservedSharedBytes);
  const int registers = dtype_bytes(plan.dtype) == 2 ? kRegistersForHalves : kRegisters;
  const int by_threads = device.threads_per_sm / plan.threads;
  const int by_registers = device.registers_per_sm / (plan.threads * registers);
  return static_cast<int>(
      std::clamp<int64_t>(by_memory, 1, std::clamp(std::min(by_threads, by_registers), 1, kMaxBlocksPerSm)));
}

int active_clusters(const DeviceInfo& device, int cluster) {
  for (int i = 0; i < kNumClusterSizes; ++i) {
    if (kClusterSizes[i] == cluster) return device.active_clusters[i];
  }
  return 0;
}

// ---- from a request to blocks ------------------------------------------------------------------------------------

// Planes where each channel by itself begins inside a pack, but g neighbours together do not: rows of columns, one row
// for each of the outer positions. False where the walk stays as it is.
bool take_runs(const Request& r, Plan& plan) {
  const Geometry& g = r.geometry;
  const int64_t vec = kPackBytes / dtype_bytes(g.dtype), S = g.size[2];
  const int64_t run = vec / std::gcd(vec, S), run_packs = run * S / vec;
  if (g.walk != Walk::kPlanes || !g.unit_stride || !r.dense_channels || run == 1 || S == 1) return false;
  if (g.num_channels % run != 0 || run_packs > kMaxThreads) return false;
  plan.walk = Walk::kRows;
  plan.whole_packs = true;
  plan.run_length = static_cast<int>(S);
  plan.wide_channels = g.num_channels * S;
  plan.size[0] = 1;
  plan.size[1] = g.size[0];
  plan.size[2] = g.size[1];
  plan.num_items = g.size[0] * g.size[1];
  // Some runs side by side, where one is less than a cache line.
  const int64_t runs = std::min(ceil_div(128, run_packs * kPackBytes), g.num_channels / run);
  plan.block_packs = static_cast<int>(runs * run_packs);
  plan.slab_channels = static_cast<int>(runs * run);
  plan.num_slabs = ceil_div(g.num_channels, plan.slab_channels);
  return true;
}

// Slabs of at most row_bytes, or whole folded rows.
bool take_rows(const Geometry& g, int64_t row_bytes, Plan& plan) {
  const int64_t packs = plan.wide_channels / plan.vec;
  const int64_t most = plan.fold > 1 ? packs : std::min(packs, row_bytes / kPackBytes);
  if (most > kMaxThreads) return false;
  plan.num_slabs = ceil_div(packs, most);
  plan.block_packs = static_cast<int>(ceil_div(packs, plan.num_slabs));
  plan.slab_channels = static_cast<int>(plan.fold > 1 ? g.num_channels : plan.block_packs * plan.vec);
  return true;
}

// Steps of plan.threads threads, and how many of them stay on chip.
void hold(const DeviceInfo& device, const Limits& limits, int num_tensors, Plan& plan) {
  const int64_t at_once = plan.walk == Walk::kRows ? plan.threads / plan.block_packs : plan.threads;
  plan.block_rows = plan.walk == Walk::kRows ? static_cast<int>(at_once) : 1;
  plan.num_steps = static_cast<int>(ceil_div(plan.chunk, at_once));
  const int64_t slot = int64_t{num_tensors} * plan.threads * kPackBytes;
  const int64_t shared_bytes = std::min(limits.shared_bytes, device.shared_bytes_opt_in);
  const int64_t fit = std::max<int64_t>(0, (shared_bytes - make_layout(plan, 0).bytes) / slot);
  plan.held_steps = static_cast<int>(fit >= plan.num_steps ? plan.num_steps : fit / kOnChipBatch * kOnChipBatch);
  plan.layout = make_layout(plan, plan.held_steps * slot);
  // Where places are used again, the one that is copied to has to be free.
  const int held = on_chip_batches(plan.held_steps);
  plan.batches_ahead = plan.held_steps < plan.num_steps ? std::min(kMostGroups, held - 1) : kMostGroups;
  set_step(plan, at_once);
}

// Finishes a plan whose walk and slab are chosen, for clusters of `cluster` blocks of `threads`.
void finish_plan(const Request& r, const DeviceInfo& device, const Limits& limits, int cluster, int threads,
                 Plan& plan) {
  const int num_tensors = r.pass == Pass::kForward ? 1 : 2;
  plan.family = cluster > 1 ? Family::kCluster : Family::kResident;
  plan.cluster = cluster;
  plan.num_splits = cluster;
  plan.chunk = ceil_div(plan.num_items, cluster);
  plan.num_blocks = plan.num_slabs * cluster;
  plan.threads = threads;
  hold(device, limits, num_tensors, plan);
  // What comes first in each block has to go again.
  const int lost = (on_chip_batches(plan.num_steps) - on_chip_batches(plan.held_steps)) * kOnChipBatch;
  const int64_t lost_items = int64_t{lost} * (plan.walk == Walk::kRows ? plan.block_rows : plan.threads);
  const int64_t again = add_blocks(plan, [&](int64_t own) { return std::min(own, lost_items); });
  const int64_t item_packs = plan.walk == Walk::kRows ? plan.wide_channels / plan.vec : plan.wide_channels;
  plan.bytes_moved = (num_tensors + 1) * plan.tensor_bytes + again * item_packs * num_tensors * kPackBytes;
  plan.held = 1 - static_cast<double>(again) / static_cast<double>(plan.num_items);
  plan.microseconds = predict_time(plan, r, device);
  if (plan.num_blocks > kMaxBlocks) {
    plan.error = "it needs more than 2^31 - 1 blocks";
  } else if (cluster > 1 && (device.arch < 90 || active_clusters(device, cluster) == 0)) {
    plan.error = "the device runs no clusters of " + std::to_string(cluster) + " such blocks";
  } else if (plan.num_items < cluster) {
    plan.error = "a channel has less to read than a cluster has blocks";
  } else if (plan.batches_ahead < 1) {
    plan.error = "next to nothing of it fits on chip";
  } else if (plan.num_steps > limits.batches * kOnChipBatch) {
    plan.error = "a thread would have too many batches for sums in float32";
  }
}

// A plan before it is decided how much stays on chip, with the walk of the streaming plan.
Plan begin_on_chip(const Request& r, const Plan& streaming) {
  Plan plan = streaming;
  if (streaming.vec == 1) {
    plan.error = "the elements do not fill packs of 16 bytes";
    return plan;
  }
  plan.on_chip = true;
  plan.reduce = plan.finish = plan.apply = plan.fused = false;
  plan.finish_shared_bytes = 0;
  plan.overlaps = false;
  plan.slab_channels = 1;
  plan.coefficient_offset = plan.workspace_bytes = 0;
  plan.tensors_read = r.pass == Pass::kForward ? 1 : 2;
  plan.tensors_written = 1;
  plan.error.clear();
  return plan;
}

}  // namespace

double predict_floor(int64_t bytes, const DeviceInfo& device) {
  return kLaunchUs + traffic_time(device, static_cast<double>(bytes), 0, 0);
}

double predict_time(Plan& plan, const Request& r, const DeviceInfo& device) {
  const double bytes = static_cast<double>(plan.bytes_moved), one = static_cast<double>(plan.tensor_bytes);
  const double reduction = plan.walk == Walk::kRows ? kRowsReductionUs : kReductionUs;
  const double inputs = (r.pass == Pass::kForward ? 1 : 2) * one;
  // A reduction for each wave of blocks. Where an SM has several, later waves have it while another block moves data.
  auto set_waves = [&](int sms, int blocks) {
    plan.waves = std::ceil(static_cast<double>(plan.num_blocks) / (double(sms) * blocks));
    return 1 + (plan.waves - 1) * (blocks > 1 ? kStaggered : 1);
  };
  if (!plan.on_chip) {
    const int launches = plan.reduce + plan.finish + plan.apply;
    const double again = plan.reduce && plan.apply ? inputs : 0;
    const double of_waves = set_waves(device.num_sms, std::max(1, streaming_threads(device) / plan.threads));
    const double stops = (plan.reduce ? reduction : 0) + (plan.apply ? kApplyUs : 0);
    return launches * kLaunchUs + traffic_time(device, bytes, again, again) + of_waves * stops;
  }
  const int blocks = blocks_per_sm(plan, device);
  const int sms = plan.cluster == 1 ? device.num_sms
                                    : std::min(device.num_sms, active_clusters(device, plan.cluster) * plan.cluster);
  if (sms == 0) return HUGE_VAL;
  const double num_blocks = static_cast<double>(plan.num_blocks), at_once = std::min(num_blocks, double(sms) * blocks);
  const double again = bytes - (plan.tensors_read + plan.tensors_written) * one;
  // All of memory's speed, if enough SMs ask; an SM that has more blocks than others is waited for. Between two reads of a
  // byte lies all that blocks at once read.
  const double shared = traffic_time(device, bytes, again, inputs * at_once / num_blocks);
  const double on_sm = std::ceil(num_blocks / sms);  // blocks of the SM that has most
  const double threads = plan.threads * std::min<double>(blocks, on_sm), idle = std::max(1.0, kBusyThreads / threads);
  const double of_sm = shared * on_sm / num_blocks * device.num_sms * kBusyShare * idle;
  const bool narrow =
      plan.walk == Walk::kRows && plan.run_length == 1 && plan.num_slabs > 1 && plan.block_packs * kPackBytes < 128;
  return kLaunchUs * (1 + plan.count) + std::max(shared, of_sm) * (narrow ? kNarrowRows : 1) +
         set_waves(sms, blocks) * (reduction + plan.held_steps * kStepUs + (plan.cluster > 1 ? kClusterUs : 0));
}

Plan plan_on_chip(const Request& r, const DeviceInfo& device, const Limits& limits, const Plan& streaming) {
  Plan base = begin_on_chip(r, streaming);
  base.family = limits.family == Family::kCluster ? Family::kCluster : Family::kResident;
  if (!base.error.empty()) return base;
  base.count = r.pass == Pass::kForward && r.cumulative;
  Plan best;
  best.error = "rows are too wide for a block";
  auto consider_blocks = [&](const Plan& walk, int cluster) {
    if (limits.family == (cluster == 1 ? Family::kCluster : Family::kResident)) return;
    if (limits.cluster != 0 && limits.cluster != cluster) return;
    int fewest = kMinThreads;
    while (fewest < walk.block_packs) fewest *= 2;
    for (int threads = fewest; threads <= std::max(fewest, std::min(limits.threads, kMaxOnChipThreads)); threads *= 2) {
      Plan plan = walk;
      finish_plan(r, device, limits, cluster, threads, plan);
      const bool first_legal = plan.error.empty() && !best.error.empty();
      const bool same_kind = plan.error.empty() == best.error.empty();
      if (first_legal || (same_kind && (!best.on_chip || plan.microseconds < best.microseconds))) best = plan;
      if (plan.num_steps <= kOnChipBatch) break;  // one batch: more threads would have nothing to do
    }
  };
  auto consider = [&](const Plan& walk) {
    consider_blocks(walk, 1);
    for (int cluster : kClusterSizes) consider_blocks(walk, cluster);
  };
  Plan walk = base;
  if (take_runs(r, walk)) {
    consider(walk);
  } else if (base.walk == Walk::kPlanes) {
    walk.num_slabs = r.geometry.num_channels;
    consider(walk);
  } else {
    for (int64_t row_bytes : {128, 64}) {
      if (take_rows(r.geometry, row_bytes, walk)) consider(walk);
      walk = base;
    }
  }
  if (!best.on_chip) {
    base.error = best.error;
    return base;
  }
  return best;
}

}  // namespace bnext::cuda
