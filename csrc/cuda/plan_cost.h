// What plans cost. The form of the model fits what an H100 measured (docs/kernels.md): a launch, the bytes, and the time in which
// blocks stop to add up, as far as no others move data meanwhile. A model to compare plans with, not a promise.
#pragma once

#include "plan.h"

namespace bnext::cuda {

// Of these clusters, how many run at once; 0 for one block, which is none.
int active_clusters(const DeviceInfo& device, int cluster);

// Microseconds in which a grid's team tells its blocks what they have found, in each turn: by plan.shares_out.
double meeting_time(const Plan& plan, const DeviceInfo& device);

// Half of the blocks that run at once: on which share of the SMs, with how many threads on each. `turns`: how often each block,
// or one after the other in its place, stops to add up.
struct Half {
  double sms, threads, turns;
};

// Microseconds in which two halves of the blocks move what takes `traffic` at memory's full speed, if one begins
// plan.late_us late, which is set: when the other one stops for the first time, or has read all that it reads before that.
// From then on either memory always has something to do, or a half waits for nothing but its own stops. Where both would take
// as long they get into each other's way, as much as in the simulation of tests/simt/overlap.py.
double overlapped_time(Plan& plan, const Half& half, double traffic, double stop);

// What plans are compared by: predicted microseconds, with a handicap for grids.
double compared_time(const Plan& plan);

// Predicted microseconds. Leaves in the plan which blocks should begin late.
double predict_time(Plan& plan, const Request& request, const DeviceInfo& device);

}  // namespace bnext::cuda
