// Plans for the families that keep a channel on chip between its reduction and its output.
#pragma once

#include "plan.h"

namespace bnext::cuda {

// The best plan of Limits.family, resident or cluster, or of either for kAuto. `plan` is the streaming plan of the same
// request. Where there is none, the result has an error that says why.
Plan plan_on_chip(const Request& request, const DeviceInfo& device, const Limits& limits, const Plan& streaming);

}  // namespace bnext::cuda
