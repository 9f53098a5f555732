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

// Bytes that memory moves in a microsecond.
double memory_speed(const DeviceInfo& device) { return kMemoryShare * device.memory_gb_per_s * 1e3; }

// Microseconds for `bytes` of memory traffic, `again` of which were read before; `recent` of those may still be in L2.
double traffic_time(const DeviceInfo& device, double bytes, double again, double recent) {
  const double hits = std::min(again, recent > 0 ? again * std::min(1.0, kL2Share * device.l2_bytes / recent) : 0);
  return (bytes - hits + kL2Time * hits) / memory_speed(device);
}

}  // namespace

int active_clusters(const DeviceInfo& device, int cluster) {
  for (int i = 0; i < kNumClusterSizes; ++i) {
    if (kClusterSizes[i] == cluster) return device.active_clusters[i];
  }
  return 0;
}

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
  const bool narrow = plan.walk == Walk::kRows && plan.run_length == 1 && plan.num_slabs > 1 &&
                      plan.block_packs * kPackBytes < kLineBytes;
  return kLaunchUs * (1 + plan.count) + std::max(shared, of_sm) * (narrow ? kNarrowRows : 1) +
         set_waves(sms, blocks) * (reduction + plan.held_steps * kStepUs + (plan.cluster > 1 ? kClusterUs : 0));
}

}  // namespace bnext::cuda
