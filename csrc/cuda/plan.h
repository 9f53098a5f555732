// Chooses how a pass runs on a device: kernel family, blocks, threads, packs, workspace. A pure function of the request
// and the device, comparable and printable. Plain C++: no CUDA, no torch, no tensors.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>

#include "../problem.h"
#include "kernels/kernel_args.h"

namespace bnext::cuda {

// Blocks that a cluster may have, one block alone aside.
constexpr int kClusterSizes[] = {2, 4, 8, 16};
constexpr int kNumClusterSizes = std::size(kClusterSizes);

// Constants of the model by which plans are compared. The first two are those of plain operations on an H200; the
// others, where nothing else is said, fit 329 passes that it timed. (`python -m benchmarks.fit` fits them to others.)
struct Costs {
  double launch_us = 2.3;     // a kernel, from the last block of the one before to full speed
  double memory_share = 0.9;  // of the speed in data sheets
  // R: microseconds in which a block moves nothing, from its start to its first load and from its last load to its
  // first store. Runs of channels and rows take `halves` times as long with halves.
  double reduction_us = 3.7, runs_reduction_us = 2.7, rows_reduction_us = 4.1, halves = 1.9;
  double cluster_us = 1.1, large_cluster_us = 2.7;  // more of a reduction: a cluster's barrier, remote reads
  // Of a grid's team: letters' way to L2, a trip from there, and the slowest block. (In kernels that were timed, a
  // fence and one and a half trips more.)
  double meeting_us = 2.5;
  double trip_us = 0.7;  // to L2
  // A letter of sums for an SM: 32 bytes from L2, and some float64, of which most architectures do 2 in a clock.
  // Guesses.
  double partial_us = 0.0006, slow_partial_us = 0.002;
  // Streaming: from the last load of the reduce kernel to the apply kernel's first stores, beside their launches and R.
  // That of planes is an H100's, of the kernels before these.
  double handover_us = 5, rows_handover_us = 10;
  double apply_us = 1;     // an apply kernel's block, from its start to its first store. A guess
  double l2_time = 0.4;    // of a byte from L2, with a byte from memory as 1
  double l2_share = 0.25;  // of L2 that still holds what was read a while ago
  // Reading rows by halves of a cache line, where L2 has lost a line before its other half is asked for.
  double narrow_rows = 1.37;
  // Threads on each SM with which an H200's memory moves 0.7 of what it can; in the backward pass each asks for two
  // tensors. Planes of float32 ask for their bytes with the fewest instructions. Elsewhere they are taken to be as many
  // as an SM has of memory's speed.
  double busy_threads = 310, busy_threads_backward = 240;
  double busy_threads_planes = 200, busy_threads_planes_backward = 70;
};

struct DeviceInfo {
  int arch = 90;  // 10 * major + minor
  int num_sms = 132;
  int threads_per_sm = 2048;
  int64_t shared_bytes_per_block = 48 << 10;  // without opting in to more
  int64_t l2_bytes = 50 << 20;
  int64_t shared_bytes_opt_in = 227 << 10;  // of a block that asks for it
  int64_t shared_bytes_per_sm = 228 << 10;
  int registers_per_sm = 64 << 10;
  // Of each of kClusterSizes, how many can run at once when each block needs an SM for itself; 0: none can.
  int active_clusters[kNumClusterSizes] = {66, 32, 16, 8};
  bool cooperative = true;  // a launch may ask for all blocks at once
  bool overlaps = true;     // a kernel may begin before the one before it has ended
  double memory_gb_per_s = 4800;
  Costs costs = {};
};

// kAuto leaves the choice to make_plan. The others but streaming keep a channel on chip: in one block, in a cluster, or
// in any number of blocks. They are for passes that would else read their tensors twice; all others are for streaming,
// whatever the limits say.
enum class Family : uint8_t { kAuto, kStreaming, kResident, kCluster, kGrid };
constexpr Family kLastFamily = Family::kGrid;

// Whether a plan does what it may do. kAlways: wherever it can.
enum class Choice : uint8_t { kNever, kWhereFaster, kAlways };

enum class Pass : uint8_t { kForward, kBackward };

// All that a plan depends on.
struct Request {
  Geometry geometry;
  Pass pass = Pass::kForward;
  bool training = true;
  bool output = true;   // y or dx is wanted
  bool sums = true;     // sums over the positions are needed
  bool reads_x = true;  // the reduction reads x. Backward: not when only sum(dy) is needed
  // Every plane (row) of every tensor begins at a multiple of 16 bytes.
  bool aligned = true;
  // A tensor's last element is 2^32 packs of 16 bytes, or more, behind its first: kernels that take packs count them.
  bool far = false;
  // Rows follow each other without a gap, and the first begins at a multiple of 16 bytes.
  bool dense_rows = true;
  // Planes of neighbouring channels follow each other without a gap, and outer steps are multiples of 16 bytes, so that
  // some channels together begin and end at 16 bytes where one does not.
  bool dense_channels = true;
  bool cumulative = false;  // momentum depends on num_batches_tracked
};

bool operator==(const Request& a, const Request& b);
Request make_request(const ForwardProblem& problem);
Request make_request(const BackwardProblem& problem);

// Upper bounds that a caller may lower: tests run small blocks, benchmarks other families.
struct Limits {
  Family family = Family::kAuto;
  bool grid = true;      // kAuto may choose it: its launch waits until the device has room for all of it
  bool clusters = true;  // kAuto may choose them
  // Blocks and clusters are persistent: they go on to further slabs, instead of making room for others that begin anew.
  // They hold their SMs until all slabs are done. (A grid's always are.)
  Choice persistent = Choice::kWhereFaster;
  // Threads keep packs in registers that have no room in shared memory: those of persistent blocks, and of grids.
  // kAlways: of these, only such as do, wherever the kernels can.
  Choice registers = Choice::kWhereFaster;
  bool overlap = true;  // kernels of a pass may begin before those before them have ended
  bool late = true;   // half of the first blocks may begin late. Without, the plan and its predicted time stay the same
  bool early = true;  // blocks may ask L2 for a later slab while they add up. The same without
  int threads = 512;  // in a block: a power of two from 64. Streaming takes at most 256
  int batches = 32;   // of kUnroll packs that a thread may have of a channel, in all families. It bounds the length of
                      // the sums in float32, and with it their error: 32 additions in streaming, 64 on chip
  int fused_splits = 64;   // blocks of a channel up to which each apply block adds up the partial sums by itself
  bool share_out = false;  // a grid's blocks share out a slab's channels, also where it would be faster not to
  int64_t shared_bytes = int64_t{1} << 30;  // of an on-chip block
  // Where 0 is for any: blocks that share a channel or a slab, threads of a block (a power of two), and, on chip, bytes
  // of a slab's rows. Streaming heeds the first two only where it is asked for by name, and takes what it can that is
  // nearest.
  int team = 0, exact_threads = 0, row_bytes = 0;
};

bool operator==(const Limits& a, const Limits& b);

struct Plan {
  Family family = Family::kStreaming;
  Walk walk = Walk::kPlanes;
  DType dtype = DType::kFloat32;
  Pass pass = Pass::kForward;
  bool whole_packs = true;  // every pack lies in one plane or row, and is aligned in every tensor
  int vec = 1;              // elements in one access: 16 bytes of them, or one
  int64_t fold = 1;         // rows taken as one, where a row does not fill packs
  int threads = 0;
  int64_t size[3] = {1, 1, 1};  // as in KernelArgs
  int64_t num_items = 0, chunk = 0, num_splits = 1;
  int64_t wide_channels = 0, num_slabs = 1;
  int block_packs = 1, block_rows = 1, slab_channels = 1, run_length = 1;
  int64_t num_blocks = 0;  // of the reduce and of the apply kernel
  // Which kernels run, in this order. `fused`: apply does what finish would have done.
  bool reduce = false, finish = false, apply = false, fused = false;
  bool reads_x = true;    // as in Request
  bool overlaps = false;  // kernels begin before those before them have ended, and wait for them then
  int finish_threads = 32;
  int64_t finish_shared_bytes = 0;  // the other kernels: layout.bytes
  int64_t coefficient_offset = 0, workspace_bytes = 0;
  // On chip: one kernel for all, and a tiny one behind it where all its blocks read how many batches there were.
  bool on_chip = false, counts_behind = false;
  int cluster = 1;                    // blocks that see each other's memory
  int64_t num_teams = 1;              // of num_splits blocks each
  bool persistent = false;            // there are fewer teams than slabs: each has one slab after the other
  bool shares_out = false;            // as in KernelArgs
  int num_steps = 0, held_steps = 0;  // as in KernelArgs
  int kept_batches = 0, batches_ahead = 0;
  int early_lines = 0, line_packs = 1;  // as in KernelArgs
  int64_t early_slabs = 0;
  int64_t late_from = 0, num_late = 0;  // blocks that begin late_us after the others
  double late_us = 0;
  double held = 0;  // share of the data that stays on chip
  SharedLayout layout;
  int tensors_read = 0, tensors_written = 0;  // whole activations, each as often as it is moved
  int64_t tensor_bytes = 0, bytes_moved = 0;
  double microseconds = 0;  // by the model of plan_cost.cpp
  // Not empty: the pass cannot run, and why.
  std::string error;
};

bool operator==(const SharedLayout& a, const SharedLayout& b);
bool operator==(const Plan& a, const Plan& b);
inline bool operator!=(const Plan& a, const Plan& b) { return !(a == b); }

Plan make_plan(const Request& request, const DeviceInfo& device, const Limits& limits = {});

// Predicted microseconds of one kernel that moves this many bytes once: what no plan can beat.
double predict_floor(int64_t bytes, const DeviceInfo& device);

// One line for people: what runs, how many bytes it moves, and how long that takes by the model.
std::string to_string(const Plan& plan);

const char* family_name(Family family);
// How its blocks walk: "planes", "rows", or "runs" of channels.
const char* walk_name(const Plan& plan);
// False when no family has this name.
bool parse_family(const std::string& name, Family* family);

}  // namespace bnext::cuda
