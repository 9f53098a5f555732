// What plans cost: a launch, the bytes, and the time in which blocks stop to add up, as far as no others move data
// meanwhile. Its constants, Costs in plan.h, are fitted to what an H200 measured (docs/kernels.md), where the model is
// off by 12 % in the mean. A model to compare plans with, not a promise.
#pragma once

#include "plan.h"

namespace bnext::cuda {

// Registers of a thread of the on-chip kernel for a plan: what ptxas takes, or a few more.
int registers_of(const Plan& plan, int arch);

// How many clusters of this size run at once. 0 for a size of 1: one block is no cluster.
int active_clusters(const DeviceInfo& device, int cluster);

// Microseconds in which a grid's team tells its blocks what they have found, in each turn: by plan.shares_out.
double meeting_time(const Plan& plan, const DeviceInfo& device);

// How many persistent teams of this plan run at once. There should not be more: a second wave would take as long as the
// first. (Grids have limits of their own.)
int64_t teams_at_once(const Plan& plan, const DeviceInfo& device);

// How many of a plan's teams, of any family, begin at once.
int64_t first_teams(const Plan& plan, const DeviceInfo& device);

// Where on-chip blocks run: on a share `sms` of the SMs, each of which has `at_once` of them side by side, with so many
// threads each, and `blocks` tiles in all, on average, in as many blocks or in fewer. With `busy_threads` on each of
// all SMs, memory moves 0.7 of what it can. `early`: of the time in which a further tile is read, the share that L2
// saves, because it has been asked for what comes first.
struct Places {
  double sms, at_once, threads, blocks, busy_threads, early;
};

// Microseconds in which these blocks move what takes `traffic` at memory's full speed, and stop in each slab for `stop`
// to add up. If the plan has blocks that begin late, it is told how late: as long as a stop, or as the others take to
// read what they read before it, whichever is less; or, where nothing is to be gained, that none should. From then on
// either memory always has something to do, or a half waits for nothing but its own stops. Where both would take as
// long they get into each other's way, as in the simulation of tests/simt/overlap.py. What L2 fetches while a block
// stops makes its next reads shorter, and memory's work no less.
double on_chip_time(Plan& plan, const Places& at, double traffic, double stop);

// What plans are compared by: predicted microseconds, with a handicap for grids and persistent blocks.
double compared_time(const Plan& plan);

// Predicted microseconds. Leaves in the plan which blocks should begin late, and by how much.
double predict_time(Plan& plan, const Request& request, const DeviceInfo& device);

}  // namespace bnext::cuda
