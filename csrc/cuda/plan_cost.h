// What plans cost. The form of the model fits what an H100 measured (docs/kernels.md): a launch, the bytes, and for each wave
// of blocks the time in which it moves none. A model to compare plans with, not a promise.
#pragma once

#include "plan.h"

namespace bnext::cuda {

// Of these clusters, how many run at once; 0 for one block, which is none.
int active_clusters(const DeviceInfo& device, int cluster);

// Microseconds in which a grid's team tells its blocks what they have found, in each turn: by plan.shares_out.
double meeting_time(const Plan& plan, const DeviceInfo& device);

// What plans are compared by: predicted microseconds, with a handicap for grids.
double compared_time(const Plan& plan);

// Predicted microseconds. Leaves the waves that it counts in the plan.
double predict_time(Plan& plan, const Request& request, const DeviceInfo& device);

}  // namespace bnext::cuda
