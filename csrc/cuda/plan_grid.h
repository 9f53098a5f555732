// Plans for the family that shares a channel between as many blocks as it takes, of a grid that runs all at once.
// By name only, whatever the model says, until a GPU has shown that it pays: a cooperative launch waits until all of its
// blocks fit, and so for every kernel of another stream that has an SM. If such a kernel itself waits for this stream (one
// that spins until data arrives, say), both wait for ever, where every other family would have finished.
#pragma once

#include "plan.h"

namespace bnext::cuda {

// The best one by the model. `streaming` is the streaming plan of the same request. Where there is none, the result has an
// error that says why.
Plan plan_grid(const Request& request, const DeviceInfo& device, const Limits& limits, const Plan& streaming);

}  // namespace bnext::cuda
