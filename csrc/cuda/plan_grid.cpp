#include "plan_grid.h"

#include "plan_cost.h"
#include "plan_on_chip.h"
#include "plan_steps.h"

namespace bnext::cuda {
namespace {

// Guesses, each of them: no GPU has been asked. Three trips to L2 of 0.6 to 0.7 us each are the fence before a block's
// arrival, the arrival, and the poll that sees it.
constexpr double kSignalUs = 2;
// What a merge takes even where nobody has to wait, three trips more and some float64: the channel's parameters, the poll,
// and the partial sums of all blocks. Where a block does wait, the first two are part of that.
constexpr double kMergeUs = 2.2;
// Of memory that is busy: 48 KiB in flight on an SM of an H200 at its share of speed.
constexpr double kLatencyUs = 1.3;
constexpr double kCooperativeUs = 1;  // more than another launch: all SMs have to be free before the first block starts

constexpr int kAsyncArch = 80;    // the first with copies that take no registers
constexpr int kFewestPlaces = 3;  // batches that there should be slots for, rather than more threads

int64_t batch_bytes(const Plan& plan) { return int64_t{kOnChipBatch} * plan.tensors_read * plan.threads * kPackBytes; }

// As many batches as fit, of as many threads as leave room for some.
int choose_ring(int64_t shared_bytes, const Limits& limits, Plan& plan) {
  for (plan.threads = std::min(limits.threads, kMaxOnChipThreads);; plan.threads /= 2) {
    plan.ring_batches = 0;
    const int fit = static_cast<int>((shared_bytes - make_layout(plan, 0).bytes) / batch_bytes(plan));
    if (fit >= kFewestPlaces || plan.threads / 2 < kMinThreads) return fit;
  }
}

// Microseconds in which `groups` groups of blocks do a channel each.
double round_time(const Plan& plan, const Request& r, const DeviceInfo& device, double groups) {
  const double channels = static_cast<double>(r.geometry.num_channels), blocks = groups * plan.num_splits;
  const double once = (plan.tensors_read + plan.tensors_written) * static_cast<double>(plan.tensor_bytes);
  const double bytes = static_cast<double>(plan.bytes_moved) * groups / channels;
  const double again = bytes - once * groups / channels;
  // Packs that two planes share are moved for both.
  const double lanes = static_cast<double>(plan.size[2] * plan.vec) / static_cast<double>(r.geometry.size[2]);
  // Between two reads of an element, all blocks move the rest of their channel, and some of the next.
  double memory = traffic_time(device, bytes, again, bytes + again) * (plan.whole_packs ? 1 : lanes);
  const double sm_speed = memory_speed(device) / device.num_sms;
  const double ahead_us = static_cast<double>(plan.batches_ahead * batch_bytes(plan)) / sm_speed;
  memory *= std::max(1.0, kLatencyUs / ahead_us);
  // Threads have less to do than memory, but stand still to add up and to wait; memory goes on with what was asked for.
  const double work = memory * kBusyShare * device.num_sms / blocks;
  const int held = on_chip_batches(plan.held_steps), lag = plan.ring_batches - plan.batches_ahead - held;
  const double streamed = static_cast<double>(plan.num_steps - plan.held_steps) / kOnChipBatch;
  const double reads = static_cast<double>(plan.tensors_read) / (plan.tensors_read + plan.tensors_written);
  const double hidden = (lag + streamed * reads) * memory / (held + streamed);
  const double wait = std::max(0.0, kSignalUs - hidden);
  // Before sm_80 a copy is a load that its thread waits for.
  if (device.arch < kAsyncArch) return memory + work + kReductionUs + kMergeUs + kSignalUs;
  const double idle = std::max(0.0, std::max(kReductionUs, wait + kMergeUs) - ahead_us);
  return std::max(memory + idle, work + kReductionUs + kMergeUs + wait);
}

double grid_time(const Plan& plan, const Request& r, const DeviceInfo& device) {
  const int64_t channels = r.geometry.num_channels, rest = channels % plan.num_groups;
  const double rounds = static_cast<double>(channels / plan.num_groups);
  // Nothing hides what comes after the last channel's sums.
  double time = 2 * kLaunchUs + kCooperativeUs + kReductionUs + kSignalUs + kMergeUs;
  time += rounds * round_time(plan, r, device, static_cast<double>(plan.num_groups));
  return rest == 0 ? time : time + round_time(plan, r, device, static_cast<double>(rest));
}

// A channel for `plan.num_splits` blocks that hold all of it but `streamed` batches each, with slots for `places`.
void finish_plan(const Request& r, const DeviceInfo& device, int streamed, int places, Plan& plan) {
  plan.held_steps = plan.num_steps - streamed * kOnChipBatch;
  const int held = on_chip_batches(plan.held_steps);
  const double speed = memory_speed(device) / device.num_sms;
  const int needed = static_cast<int>(ceil_div(static_cast<int64_t>(kLatencyUs * speed), batch_bytes(plan)));
  // Less than a channel's: between two reductions of a block is one merge, see leave_sums.
  const int lag = std::clamp(places - held - needed, 0, held - 1);
  plan.batches_ahead = std::min(kMostGroups, places - held - lag);
  plan.ring_batches = plan.batches_ahead + held + lag;
  plan.layout = make_layout(plan, plan.ring_batches * batch_bytes(plan));
  // What has no slots are the first items of every block.
  const int64_t streamed_items = int64_t{plan.num_steps - plan.held_steps} * plan.threads;
  const int64_t again = add_blocks(plan, [&](int64_t own) { return std::min(own, streamed_items); });
  plan.bytes_moved = (plan.tensors_read + plan.tensors_written) * plan.tensor_bytes +
                     again * r.geometry.num_channels * plan.tensors_read * kPackBytes;
  plan.held = 1 - static_cast<double>(again) / static_cast<double>(plan.num_items);
  plan.microseconds = grid_time(plan, r, device);
}

}  // namespace

Plan plan_grid(const Request& r, const DeviceInfo& device, const Limits& limits, const Plan& streaming) {
  Plan base = begin_on_chip(r, streaming);
  base.family = Family::kGrid;
  if (!base.error.empty()) return base;
  base.prepare = true;
  const int blocks = device.num_sms;
  const int places = choose_ring(std::min(limits.shared_bytes, device.shared_bytes_opt_in), limits, base);
  if (base.walk == Walk::kRows) {
    base.error = "only planes are shared by a grid";
  } else if (r.geometry.num_channels > kMaxBlocks / 2) {
    base.error = "a thread cannot count so many channels";
  } else if (!device.cooperative) {
    base.error = "the device has no cooperative launch";
  } else if (places < 2) {
    base.error = "nothing of it fits on chip";
  }
  if (!base.error.empty()) return base;
  set_step(base, base.threads);
  Plan best = base;
  best.error = "no number of blocks suits it: too little to read, or too many batches for sums in float32";
  const int64_t channels = r.geometry.num_channels;
  int64_t groups_before = 0;
  for (int64_t splits = limits.cluster != 0 ? limits.cluster : blocks; splits >= 1 && splits <= blocks; --splits) {
    Plan plan = base;
    plan.num_splits = splits;
    if (plan.num_items < splits) continue;
    plan.num_groups = std::min(channels, blocks / splits);
    if (plan.num_groups == groups_before) continue;  // more blocks for as many groups have been looked at
    groups_before = plan.num_groups;
    plan.num_blocks = splits * plan.num_groups;
    plan.chunk = ceil_div(plan.num_items, splits);
    plan.num_steps = static_cast<int>(ceil_div(plan.chunk, plan.threads));
    if (plan.num_steps > limits.batches * kOnChipBatch) break;
    plan.counter_offset = round_up(kNumSums * channels * splits * 8, kPackBytes);
    plan.workspace_bytes = plan.counter_offset + channels * static_cast<int64_t>(sizeof(int));
    const int batches = on_chip_batches(plan.num_steps);
    for (int streamed = std::max(0, batches - places + 1); streamed < batches; ++streamed) {
      finish_plan(r, device, streamed, places, plan);
      if (!best.error.empty() || plan.microseconds < best.microseconds) best = plan;
    }
    if (limits.cluster != 0) break;
  }
  return best;
}

}  // namespace bnext::cuda
