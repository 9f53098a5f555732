#include "plan_cost.h"

#include <algorithm>
#include <cmath>

#include "plan_steps.h"

namespace bnext::cuda {
namespace {

constexpr double kLaunchUs = 2.3;     // a kernel, from the last block of the one before to full speed. H100: 2.3
constexpr double kMemoryShare = 0.9;  // of the speed in data sheets. H100: 0.9
// From the last load of a block to its first store, and from its start to its first load. An H100 took 3 and 8 before this
// code was made shorter; these are guesses.
constexpr double kReductionUs = 1.5;
constexpr double kRowsReductionUs = 2.5;
constexpr double kBusyShare = 0.6;  // of the SMs: as many as it takes to keep memory busy
constexpr double kL2Time = 0.6;     // of a byte from L2, with a byte from memory as 1
constexpr double kL2Share = 0.5;    // of L2 that still holds what was read a while ago

constexpr double kClusterUs = 1;    // more of a reduction: a cluster's barrier and remote reads
constexpr double kMeetingUs = 2.5;  // of a grid's team: a fence, an arrival, a look at it, and the slowest block
constexpr double kTripUs = 0.7;     // to L2
// Three partial sums for an SM: 24 bytes from L2, and some float64, of which most architectures do 2 in a clock.
constexpr double kPartialUs = 0.0006, kSlowPartialUs = 0.002;
constexpr double kGridHandicap = 1.1;  // its launch waits for what other streams have running
constexpr double kStaggered = 0.6;  // of a reduction in later waves, where another block of the SM moves data meanwhile
constexpr double kApplyUs = 1;      // an apply kernel's block, from its start to its first store
constexpr double kStepUs = 0.1;     // of a step that is held: memory waits while it is mapped. H100: 0.1 to 0.2
constexpr double kBusyThreads = 256;  // of an SM: with fewer, memory waits for threads all the time
constexpr double kNarrowRows = 1.05;  // reading rows by halves of a cache line

// Registers of a thread, or a few more: what ptxas takes.
constexpr int kRegisters = 80, kRegistersForHalves = 96;
constexpr int kMaxBlocksPerSm = 32;

int blocks_per_sm(const Plan& plan, const DeviceInfo& device) {
  const int64_t by_memory = device.shared_bytes_per_sm / (plan.layout.bytes + kReservedSharedBytes);
  const int registers = dtype_bytes(plan.dtype) == 2 ? kRegistersForHalves : kRegisters;
  const int by_threads = device.threads_per_sm / plan.threads;
  const int by_registers = device.registers_per_sm / (plan.threads * registers);
  return static_cast<int>(
      std::clamp<int64_t>(by_memory, 1, std::clamp(std::min(by_threads, by_registers), 1, kMaxBlocksPerSm)));
}

// Bytes that memory moves in a microsecond.
double memory_speed(const DeviceInfo& device) { return kMemoryShare * device.memory_gb_per_s * 1e3; }

// Microseconds for `bytes` of memory traffic, `again` of which were read before; `recent` of those may still be in L2.
double traffic_time(const DeviceInfo& device, double bytes, double again, double recent) {
  const double hits = std::min(again, recent > 0 ? again * std::min(1.0, kL2Share * device.l2_bytes / recent) : 0);
  return (bytes - hits + kL2Time * hits) / memory_speed(device);
}

double reduction_time(const Plan& plan) { return plan.walk == Walk::kRows ? kRowsReductionUs : kReductionUs; }

double streaming_time(Plan& plan, const DeviceInfo& device, double inputs) {
  const double bytes = static_cast<double>(plan.bytes_moved), again = plan.reduce && plan.apply ? inputs : 0;
  const int launches = plan.reduce + plan.finish + plan.apply;
  const int blocks = std::max(1, streaming_threads(device) / plan.threads);
  const double stops = (plan.reduce ? reduction_time(plan) : 0) + (plan.apply ? kApplyUs : 0);
  const auto waves = static_cast<double>(ceil_div(plan.num_blocks, int64_t{device.num_sms} * blocks));
  return launches * kLaunchUs + traffic_time(device, bytes, again, again) +
         (1 + (waves - 1) * (blocks > 1 ? kStaggered : 1)) * stops;
}

// All of memory's speed, if enough SMs ask; an SM that has more than others is waited for. at_once: share of the blocks that run
// at once; what those read again is all that L2 has to keep. sm_load: what the busiest SM has, with 1 as the mean over the device.
double on_chip_traffic(const Plan& plan, const DeviceInfo& device, double at_once, double sm_load, double sm_threads) {
  const double bytes = static_cast<double>(plan.bytes_moved);
  const double again = bytes - (plan.tensors_read + plan.tensors_written) * static_cast<double>(plan.tensor_bytes);
  const double shared = traffic_time(device, bytes, again, again * at_once);
  const double of_sm = shared * sm_load * kBusyShare * std::max(1.0, kBusyThreads / sm_threads);
  const bool narrow = plan.walk == Walk::kRows && plan.run_length == 1 && plan.num_slabs > 1 &&
                      plan.block_packs * kPackBytes < kLineBytes;
  return std::max(shared, of_sm) * (narrow ? kNarrowRows : 1);
}

// Of the blocks of an SM; or where it has one, of the SMs.
Half half_of(int64_t blocks_per_sm, double sms, double sm_threads, double turns) {
  return blocks_per_sm > 1 ? Half{sms, sm_threads / 2, turns} : Half{sms / 2, sm_threads, turns};
}

double blocks_time(Plan& plan, const DeviceInfo& device, double stop) {
  const int blocks = blocks_per_sm(plan, device);
  const int sms = plan.cluster == 1 ? device.num_sms
                                    : std::min(device.num_sms, active_clusters(device, plan.cluster) * plan.cluster);
  if (sms == 0) return HUGE_VAL;
  const int64_t at_once = int64_t{sms} * blocks, on_sm = ceil_div(plan.num_blocks, sms);  // of the SM that has most
  const double turns = static_cast<double>(plan.num_blocks) / static_cast<double>(at_once);
  const double sm_threads = static_cast<double>(plan.threads * std::min<int64_t>(blocks, on_sm));
  const double sm_load = static_cast<double>(on_sm) / static_cast<double>(plan.num_blocks) * device.num_sms;
  const double traffic = on_chip_traffic(plan, device, std::min(1.0, 1 / turns), sm_load, sm_threads);
  if (plan.cluster > 1) stop += kClusterUs;
  if (turns <= 1 || at_once == plan.cluster) return traffic + std::ceil(turns) * stop;
  plan.late_from = round_up(at_once / 2, plan.cluster);
  plan.num_late = at_once - plan.late_from;
  const double share = static_cast<double>(sms) / device.num_sms;
  return overlapped_time(plan, half_of(blocks, share, sm_threads, turns), traffic, stop);
}

double grid_time(Plan& plan, const DeviceInfo& device, double stop) {
  const double teams = static_cast<double>(plan.num_teams), slabs = static_cast<double>(plan.num_slabs);
  const int64_t blocks = ceil_div(plan.num_blocks, device.num_sms);
  const double turns = std::ceil(slabs / teams), all_blocks = static_cast<double>(plan.num_blocks);
  const double sm_load = turns * teams / slabs * static_cast<double>(blocks) / all_blocks * device.num_sms;
  const double sm_threads = static_cast<double>(plan.threads * blocks);
  const double traffic = on_chip_traffic(plan, device, teams / slabs, sm_load, sm_threads);
  stop += meeting_time(plan, device);
  if (plan.num_teams == 1 || turns == 1) return traffic + turns * stop;
  plan.late_from = ceil_div(plan.num_teams, 2) * plan.num_splits;
  plan.num_late = plan.num_blocks - plan.late_from;
  const double share = std::min(1.0, all_blocks / device.num_sms);
  return overlapped_time(plan, half_of(blocks, share, sm_threads, turns), traffic, stop);
}

}  // namespace

int active_clusters(const DeviceInfo& device, int cluster) {
  for (int i = 0; i < kNumClusterSizes; ++i) {
    if (kClusterSizes[i] == cluster) return device.active_clusters[i];
  }
  return 0;
}

double overlapped_time(Plan& plan, const Half& half, double traffic, double stop) {
  constexpr double kCorner = 6;
  const double slower = kBusyShare / half.sms * std::max(1.0, kBusyThreads / half.threads);
  const double moves = traffic / 2 * std::max(1.0, slower);
  const double reads = moves / half.turns * plan.tensors_read / (plan.tensors_read + plan.tensors_written);
  plan.late_us = std::min(stop, reads);
  return std::pow(std::pow(traffic, kCorner) + std::pow(moves + half.turns * stop, kCorner), 1 / kCorner) + stop;
}

// See finish_on_chip: one or two meetings, trips to L2 one after the other, and what all blocks together read and add up.
double meeting_time(const Plan& plan, const DeviceInfo& device) {
  const int64_t splits = plan.num_splits, channels = plan.slab_channels, reads = kPartialsAtOnce;
  if (plan.shares_out) {
    const int64_t shares = ceil_div(channels, splits * (plan.threads / kWarpSize));
    return 2 * kMeetingUs + kTripUs * static_cast<double>(shares * (1 + ceil_div(splits, reads * kWarpSize)) + 1);
  }
  const int64_t lanes = count_group_lanes(plan.threads, static_cast<int>(channels));
  const int64_t trips = ceil_div(channels * lanes, plan.threads) * (1 + ceil_div(splits, reads * lanes));
  const double partials = static_cast<double>(channels * splits * ceil_div(plan.num_blocks, device.num_sms));
  const bool fast = device.arch == 80 || device.arch == 90 || device.arch == 100;
  return kMeetingUs + kTripUs * static_cast<double>(trips) + partials * (fast ? kPartialUs : kSlowPartialUs);
}

double compared_time(const Plan& plan) {
  return plan.microseconds * (plan.family == Family::kGrid ? kGridHandicap : 1);
}

double predict_floor(int64_t bytes, const DeviceInfo& device) {
  return kLaunchUs + traffic_time(device, static_cast<double>(bytes), 0, 0);
}

double predict_time(Plan& plan, const Request& r, const DeviceInfo& device) {
  const double inputs = (r.pass == Pass::kForward ? 1 : 2) * static_cast<double>(plan.tensor_bytes);
  if (!plan.on_chip) return streaming_time(plan, device, inputs);
  plan.late_from = plan.num_late = 0;
  plan.late_us = 0;
  const double stop = reduction_time(plan) + plan.held_steps * kStepUs;
  return kLaunchUs * (1 + plan.count) +
         (plan.family == Family::kGrid ? grid_time(plan, device, stop) : blocks_time(plan, device, stop));
}

}  // namespace bnext::cuda
