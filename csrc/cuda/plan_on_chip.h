// Plans for the families that keep a channel on chip between its reduction and its output.
#pragma once

#include "plan.h"

namespace bnext::cuda {

// Blocks that a grid has on an SM at most. Two that take turns keep memory busy; more would each hold less.
constexpr int kGridBlocksPerSm = 2;
// What each of so many can have of its shared memory. Their threads are parts of kMaxOnChipThreads, so registers are
// enough.
int64_t grid_shared_bytes(const DeviceInfo& device, int blocks_per_sm);

// The best plan of Limits.family, or for kAuto of those that keep a channel on chip. `streaming` is the plan of that
// family for the same request. Where there is none, the result has an error that says why.
Plan plan_on_chip(const Request& request, const DeviceInfo& device, const Limits& limits, const Plan& streaming);

}  // namespace bnext::cuda
