// Plans for the family that shares a channel between as many blocks as it takes, of a grid that runs all at once.
#pragma once

#include "plan.h"

namespace bnext::cuda {

// The best one by the model. `streaming` is the streaming plan of the same request. Where there is none, the result has an
// error that says why.
Plan plan_grid(const Request& request, const DeviceInfo& device, const Limits& limits, const Plan& streaming);

// A cooperative launch waits until all of its blocks fit, and so for every kernel of another stream that has an SM: where
// such kernels are about (NCCL's, say), it may stall. So it is taken only where the model, itself a guess, has it ahead by
// more than another family would lose by being wrong about a constant or two.
constexpr double kGridMargin = 0.9;

}  // namespace bnext::cuda
