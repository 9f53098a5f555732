// What plans cost. The form of it fits what an H100 measured (docs/kernels.md): a launch, the bytes, and for each wave of
// blocks the time in which it moves none. Constants that only one family needs are in its file.
#pragma once

#include <algorithm>

#include "plan.h"

namespace bnext::cuda {

constexpr double kLaunchUs = 2.3;     // a kernel, from the last block of the one before to full speed. H100: 2.3
constexpr double kMemoryShare = 0.9;  // of the speed in data sheets. H100: 0.9
// From the last load of a block to its first store, and from its start to its first load. An H100 took 3 and 8 before this
// code was made shorter; these are guesses.
constexpr double kReductionUs = 1.5;
constexpr double kRowsReductionUs = 2.5;
constexpr double kBusyShare = 0.6;  // of the SMs: as many as it takes to keep memory busy
constexpr double kL2Time = 0.6;     // of a byte from L2, with a byte from memory as 1
constexpr double kL2Share = 0.5;    // of L2 that still holds what was read a while ago

// Bytes that memory moves in a microsecond.
inline double memory_speed(const DeviceInfo& device) { return kMemoryShare * device.memory_gb_per_s * 1e3; }

// Microseconds for `bytes` of memory traffic, `again` of which were read before; `recent` of those may still be in L2.
inline double traffic_time(const DeviceInfo& device, double bytes, double again, double recent) {
  const double hits = std::min(again, recent > 0 ? again * std::min(1.0, kL2Share * device.l2_bytes / recent) : 0);
  return (bytes - hits + kL2Time * hits) / memory_speed(device);
}

}  // namespace bnext::cuda
