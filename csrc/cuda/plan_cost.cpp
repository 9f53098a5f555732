#include "plan_cost.h"

#include <algorithm>
#include <cmath>

#include "plan_steps.h"

namespace bnext::cuda {
namespace {

constexpr double kBusySpeed = 4814.0 / 132;   // GB/s of an SM of an H200, for Costs::busy_threads
constexpr double kGridHandicap = 1.03;        // its launch waits for what other streams have running
constexpr double kPersistentHandicap = 1.02;  // its blocks cannot go where other streams leave room

constexpr int kLargeCluster = 16;
constexpr int kMaxBlocksPerSm = 32;

int blocks_per_sm(const Plan& plan, const DeviceInfo& device) {
  const int64_t bytes = round_up(plan.layout.bytes + kReservedSharedBytes, kSharedUnit);
  const int64_t by_memory = device.shared_bytes_per_sm / bytes;
  const int by_threads = device.threads_per_sm / plan.threads;
  const int by_registers = device.registers_per_sm / (plan.threads * registers_of(plan, device.arch));
  return static_cast<int>(
      std::clamp<int64_t>(by_memory, 1, std::clamp(std::min(by_threads, by_registers), 1, kMaxBlocksPerSm)));
}

// Bytes that memory moves in a microsecond.
double memory_speed(const DeviceInfo& device) { return device.costs.memory_share * device.memory_gb_per_s * 1e3; }

// Microseconds for `bytes` of memory traffic, `again` of which were read before; `recent` of those may still be in L2.
double traffic_time(const DeviceInfo& device, double bytes, double again, double recent) {
  const double hits =
      std::min(again, recent > 0 ? again * std::min(1.0, device.costs.l2_share * device.l2_bytes / recent) : 0);
  return (bytes - hits + device.costs.l2_time * hits) / memory_speed(device);
}

bool has_halves(const Plan& plan) { return dtype_bytes(plan.dtype) == 2; }

double reduction_time(const Plan& plan, const Costs& costs) {
  if (plan.walk == Walk::kPlanes) return costs.reduction_us;
  const double time = has_two_sides(plan.vec, plan.run_length) ? costs.runs_reduction_us : costs.rows_reduction_us;
  return has_halves(plan) ? costs.halves * time : time;
}

double busy_threads(const Plan& plan, const DeviceInfo& device) {
  const bool backward = plan.pass == Pass::kBackward, few = plan.walk == Walk::kPlanes && !has_halves(plan);
  const Costs& costs = device.costs;
  const double forward_threads = few ? costs.busy_threads_planes : costs.busy_threads;
  const double backward_threads = few ? costs.busy_threads_planes_backward : costs.busy_threads_backward;
  return (backward ? backward_threads : forward_threads) * device.memory_gb_per_s / device.num_sms / kBusySpeed;
}

// Of the time in which a block reads a slab that is not the first.
double early_share(const Plan& plan, const DeviceInfo& device) {
  if (plan.early_lines == 0) return 0;
  const double of_block = static_cast<double>(plan.tensors_read * plan.tensor_bytes) /
                          static_cast<double>(plan.num_slabs * plan.num_splits);
  return (1 - device.costs.l2_time) * std::min(1.0, early_bytes(plan) / of_block);
}

// Of a plan's blocks: at_once of them on each of so many SMs, which have `blocks` each in all.
Places make_places(const Plan& plan, const DeviceInfo& device, double sms, double at_once, double blocks) {
  const auto threads = static_cast<double>(plan.threads);
  return {sms / device.num_sms, at_once, threads, blocks, busy_threads(plan, device), early_share(plan, device)};
}

// Of memory's speed, what some blocks on each SM of a share of the SMs reach: all that they ask for while that is
// little, and the last tenth only with many more of them.
double speed(const Places& at, double sms, double blocks) {
  const double asked = sms * at.sms * blocks * at.threads / at.busy_threads;
  return asked / std::sqrt(1 + asked * asked);
}

double streaming_time(const Plan& plan, const Request& r, const DeviceInfo& device) {
  const double inputs = (r.pass == Pass::kForward ? 1 : 2) * static_cast<double>(plan.tensor_bytes);
  const double bytes = static_cast<double>(plan.bytes_moved), again = plan.reduce && plan.apply ? inputs : 0;
  const int launches = plan.reduce + plan.finish + plan.apply;
  const double on_sm = static_cast<double>(plan.num_blocks) / device.num_sms;
  const double at_once = std::min<double>(on_sm, std::max(1, streaming_threads(device) / plan.threads));
  const Places at = make_places(plan, device, device.num_sms, at_once, on_sm);
  const Costs& costs = device.costs;
  double stops = plan.reduce ? reduction_time(plan, costs) : 0;
  if (plan.apply)
    stops += !plan.reduce ? costs.apply_us : plan.walk == Walk::kRows ? costs.rows_handover_us : costs.handover_us;
  return launches * costs.launch_us + traffic_time(device, bytes, again, again) / speed(at, 1, at_once) + stops;
}

// For all blocks, with no stops between them. SMs that have one more than others are alone at the end, unless all
// blocks run at once, and share memory's speed among themselves.
double moving_time(const Places& at, double traffic) {
  const double full = std::floor(at.blocks), rest = at.blocks - full;
  if (at.blocks <= at.at_once) return traffic / speed(at, 1, at.blocks);
  double time = 0;
  if (full > 0) time += full / speed(at, 1, std::min(full, at.at_once));
  if (rest > 0) time += rest / speed(at, rest, 1);
  return traffic / at.blocks * time;
}

double turns_of(const Places& at) { return std::max(1.0, at.blocks / at.at_once); }

// Bytes at memory's full speed. Of those that are read again, L2 has to keep what belongs to the blocks that run at
// once.
double on_chip_traffic(const Plan& plan, const DeviceInfo& device, const Places& at) {
  const double again = bytes_again(plan);
  const double time = traffic_time(device, static_cast<double>(plan.bytes_moved), again, again / turns_of(at));
  const bool narrow = plan.walk == Walk::kRows && plan.run_length == 1 && plan.num_slabs > 1 &&
                      plan.block_packs * kPackBytes < kLineBytes;
  if (!narrow) return time;
  return time * (1 + (device.costs.narrow_rows - 1) *
                         std::clamp(bytes_once(plan) / static_cast<double>(device.l2_bytes) - 0.5, 0.0, 1.0));
}

// Of so many teams that run first, the second half begins late.
void set_late_half(Plan& plan, int64_t teams) {
  plan.late_from = ceil_div(teams, 2) * plan.num_splits;
  plan.num_late = teams * plan.num_splits - plan.late_from;
}

double blocks_time(Plan& plan, const DeviceInfo& device) {
  const int per_sm = blocks_per_sm(plan, device);
  const int sms = plan.cluster == 1 ? device.num_sms
                                    : std::min(device.num_sms, active_clusters(device, plan.cluster) * plan.cluster);
  if (sms == 0) return HUGE_VAL;
  const double on_sm = static_cast<double>(plan.num_slabs * plan.num_splits) / sms;
  const Places at = make_places(plan, device, sms, std::min<double>(per_sm, on_sm), on_sm);
  if (on_sm > 1) set_late_half(plan, first_teams(plan, device));
  const Costs& costs = device.costs;
  const double exchange = plan.cluster >= kLargeCluster ? costs.large_cluster_us
                          : plan.cluster > 1            ? costs.cluster_us
                                                        : 0;
  return on_chip_time(plan, at, on_chip_traffic(plan, device, at), reduction_time(plan, costs) + exchange);
}

double grid_time(Plan& plan, const DeviceInfo& device) {
  const int64_t per_sm = ceil_div(plan.num_blocks, device.num_sms);
  const double turns = static_cast<double>(plan.num_slabs) / static_cast<double>(plan.num_teams);
  const double at_once = static_cast<double>(per_sm), sms = static_cast<double>(plan.num_blocks) / at_once;
  const Places at = make_places(plan, device, sms, at_once, at_once * turns);
  if (at.blocks > 1) set_late_half(plan, first_teams(plan, device));
  return on_chip_time(plan, at, on_chip_traffic(plan, device, at),
                      reduction_time(plan, device.costs) + meeting_time(plan, device));
}

}  // namespace

int registers_of(const Plan& plan, int arch) {
  const bool backward = plan.pass == Pass::kBackward, alone = plan.family == Family::kGrid || plan.kept_batches > 0;
  const int of_sm = 65536, unit = 8;  // of an SM, wherever launch bounds say what it should have room for
  const int threads = count_on_chip_threads(backward, static_cast<int>(dtype_bytes(plan.dtype)),
                                            plan.walk == Walk::kRows, plan.whole_packs, plan.persistent, alone, arch);
  if (threads == kMaxOnChipThreads && !alone && !plan.persistent) return arch >= 100 ? 112 : 96;
  return of_sm / threads / unit * unit;
}

int active_clusters(const DeviceInfo& device, int cluster) {
  for (int i = 0; i < kNumClusterSizes; ++i) {
    if (kClusterSizes[i] == cluster) return device.active_clusters[i];
  }
  return 0;
}

int64_t teams_at_once(const Plan& plan, const DeviceInfo& device) {
  return blocks_per_sm(plan, device) *
         int64_t{plan.cluster == 1 ? device.num_sms : active_clusters(device, plan.cluster)};
}

int64_t first_teams(const Plan& plan, const DeviceInfo& device) {
  return plan.family == Family::kGrid ? plan.num_teams : std::min(plan.num_teams, teams_at_once(plan, device));
}

double on_chip_time(Plan& plan, const Places& at, double traffic, double stop) {
  constexpr double kCorner = 3.5, kMadeUp = 0.85;
  const double all = moving_time(at, traffic), turns = turns_of(at);
  const double reads =
      static_cast<double>(plan.tensors_read * plan.tensor_bytes) / static_cast<double>(plan.bytes_moved);
  // Of the stops, what shorter reads make up for where blocks move so long in all: never quite all, in the simulation.
  auto saved = [&](double move) { return kMadeUp * (turns - 1) * std::min(stop, at.early * reads * move / turns); };
  const double together = all + std::ceil(turns) * stop - saved(all);
  if (plan.num_late == 0) return together;
  const double half = traffic / 2 / (at.at_once > 1 ? speed(at, 1, at.at_once / 2) : speed(at, 0.5, 1));
  const double late = std::min(stop, half / turns * reads);
  // In one turn the early half writes while the late one stops.
  const double alone = half + turns * stop - saved(half);  // a half that waits for nothing else
  const double time = turns == 1 ? std::max(all + std::max(0.0, stop - traffic / 2 * (1 - reads)), late + alone)
                                 : std::pow(std::pow(all, kCorner) + std::pow(alone, kCorner), 1 / kCorner) + stop;
  if (time < together) {
    plan.late_us = late;
    return time;
  }
  set_late_half(plan, 0);
  return together;
}

// See finish_on_chip: one or two meetings, in which a first trip to L2 is included, others one after the other, and
// what all blocks together read and add up.
double meeting_time(const Plan& plan, const DeviceInfo& device) {
  const Costs& costs = device.costs;
  const int64_t splits = plan.num_splits, channels = plan.slab_channels, reads = kLettersAtOnce;
  if (plan.shares_out) {
    const int64_t shares = ceil_div(channels, splits * (plan.threads / kWarpSize));
    return 2 * costs.meeting_us + costs.trip_us * static_cast<double>(shares * ceil_div(splits, reads * kWarpSize) - 1);
  }
  const int64_t lanes = group_lanes_of(plan);
  const int64_t trips = ceil_div(channels * lanes, plan.threads) * ceil_div(splits, reads * lanes);
  const double letters = static_cast<double>(channels * splits * ceil_div(plan.num_blocks, device.num_sms));
  const bool fast = device.arch == 80 || device.arch == 90 || device.arch == 100;
  return costs.meeting_us + costs.trip_us * static_cast<double>(trips - 1) +
         letters * (fast ? costs.partial_us : costs.slow_partial_us);
}

double compared_time(const Plan& plan) {
  return plan.microseconds * (plan.family == Family::kGrid ? kGridHandicap : plan.persistent ? kPersistentHandicap : 1);
}

double predict_floor(int64_t bytes, const DeviceInfo& device) {
  return device.costs.launch_us + traffic_time(device, static_cast<double>(bytes), 0, 0);
}

double predict_time(Plan& plan, const Request& r, const DeviceInfo& device) {
  if (!plan.on_chip) return streaming_time(plan, r, device);
  return device.costs.launch_us * (1 + plan.counts_behind) +
         (plan.family == Family::kGrid ? grid_time(plan, device) : blocks_time(plan, device));
}

}  // namespace bnext::cuda
