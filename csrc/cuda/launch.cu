// Fills in the kernels' arguments, picks the template instance, launches. Choices are plan.cpp's.
#include "launch.h"

#include "kernels/on_chip.cuh"
#include "kernels/streaming.cuh"
#include "plan_steps.h"

namespace bnext::cuda {
namespace {

// How blocks are walked through, and how they add up.
void set_block(KernelArgs& args, const Geometry& g, const Plan& plan) {
  const bool rows = plan.walk == Walk::kRows;
  args.block_packs = plan.block_packs;
  args.block_rows = plan.block_rows;
  args.layout = plan.layout;
  args.step = rows ? plan.block_rows : plan.threads;
  if (plan.vec > 1) {  // else there may be more items than an int can count
    args.by_row = make_divider(plan.size[2]);
    args.by_group = make_divider(plan.size[1]);
  } else {
    args.by_long_row = make_long_divider(plan.size[2]);
    args.by_long_group = make_long_divider(plan.size[1]);
  }
  args.by_tile = make_divider(rows && !plan.on_chip ? plan.num_slabs : plan.num_splits);
  args.by_packs = make_divider(plan.block_packs);
  args.by_step = make_divider(args.step);
  args.slab_channels = plan.slab_channels;
  args.run_length = plan.run_length;
  args.tile_channels = plan.on_chip ? g.num_channels : plan.wide_channels;
  if (args.tile_channels > g.num_channels) args.by_channels = make_divider(g.num_channels);
  args.by_run = make_divider(plan.run_length);
  args.by_slab = make_divider(plan.slab_channels);
  args.parts_are_warps = parts_are_warps(plan.block_packs);
  args.two_sided = has_two_sides(plan.vec, plan.run_length);
  args.part_places = rows ? count_part_places(plan.vec, plan.run_length, plan.block_packs) : 1;
  args.channel_places =
      rows ? count_channel_places(plan.vec, plan.run_length, plan.block_packs, plan.slab_channels) : 1;
  args.by_places = make_divider(args.channel_places);
  args.num_parts = count_parts(plan.threads, plan.block_packs);
  args.group_lanes = group_lanes_of(plan);
  while (1 << args.group_shift < args.group_lanes) ++args.group_shift;
  args.slices = static_cast<int>(slices_of(plan));
  args.lane_parts = args.slices * args.group_lanes / args.channel_places;
  args.lane_places = args.slices * args.group_lanes % args.channel_places;
}

constexpr double kClocksPerMicrosecond = 1700;  // of SMs since Turing: 1400 to 2600

// What both passes have in common.
KernelArgs common_args(const Geometry& g, const Plan& plan, void* workspace) {
  KernelArgs args{};
  set_block(args, g, plan);
  for (int d = 0; d < 3; ++d) args.size[d] = plan.size[d];
  args.depth = plan.size[0] > 1 ? 3 : plan.size[1] > 1 ? 2 : 1;
  args.num_items = plan.num_items;
  args.chunk = plan.chunk;
  args.num_splits = plan.num_splits;
  args.plane_size = g.size[2];
  args.num_channels = g.num_channels;
  args.wide_channels = plan.wide_channels;
  args.cluster_size = plan.cluster;
  args.num_teams = static_cast<int>(plan.num_teams);
  args.num_slabs = static_cast<int>(plan.num_slabs);
  args.shares_out = plan.shares_out;
  args.num_steps = plan.num_steps;
  args.held_steps = plan.held_steps;
  args.kept_batches = plan.kept_batches;
  args.batches_ahead = plan.batches_ahead;
  args.early_lines = plan.early_lines;
  args.early_slabs = static_cast<int>(plan.early_slabs);
  args.line_packs = plan.line_packs;
  args.late_from = static_cast<unsigned>(plan.late_from);
  args.num_late = static_cast<unsigned>(plan.num_late);
  args.late_clocks = static_cast<int>(plan.late_us * kClocksPerMicrosecond);
  args.num_positions = static_cast<double>(g.num_positions());
  args.inverse_positions = 1 / args.num_positions;
  args.unbiased = args.num_positions / (args.num_positions - 1);
  if (plan.family == Family::kGrid) args.sum_letters = workspace;
  if (plan.reduce) args.partials = static_cast<double*>(workspace);
  void* coefficients = static_cast<char*>(workspace) + plan.coefficient_offset;
  if (plan.shares_out) args.coefficient_letters = coefficients;
  if (plan.finish && plan.apply) args.coefficients = coefficients;
  return args;
}

// The view as the plan sees it: a folded row is `fold` rows long, and runs of channels are the columns of rows.
View plan_view(const View& view, const Plan& plan) {
  if (view.data == nullptr) return View{};
  if (plan.run_length > 1) return View{view.data, 1, {0, view.stride[0], view.stride[1]}};
  View folded = view;
  folded.stride[2] *= plan.fold;
  return folded;
}

// The same counted in packs, where all packs are whole. A stride that is not a multiple of a pack belongs to a
// dimension of size 1: nobody goes along it, and rounding it down does no harm. In rows channels are neighbours, and so
// are packs of them.
View count_packs(View view, const Plan& plan) {
  if (!plan.whole_packs) return view;
  for (int64_t& stride : view.stride) stride /= plan.vec;
  if (plan.walk == Walk::kPlanes) view.stride_c /= plan.vec;
  return view;
}

// From a view's strides to how far it goes on.
void set_views(KernelArgs& args, const Plan& plan, const View& first, const View& second = {}, const View& third = {}) {
  const View* views[] = {&first, &second, &third};
  for (int k = 0; k < 3; ++k) {
    const View view = args.view[k] = count_packs(plan_view(*views[k], plan), plan);
    const int64_t pack = plan.whole_packs ? 1 : plan.vec;
    const int64_t inner = plan.walk == Walk::kRows || plan.vec == 1 ? view.stride[2] : pack;
    args.move[k][2] = inner;
    args.move[k][1] = view.stride[1] - plan.size[2] * inner;
    args.move[k][0] = view.stride[0] - plan.size[1] * view.stride[1];
  }
}

struct Stages {
  KernelArgs reduce, finish, apply;  // on-chip kernels take the last
};

LaunchShape launch_shape(int64_t blocks, int threads, int64_t shared_bytes) {
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  shape.threads = static_cast<unsigned>(threads);
  shape.shared_bytes = static_cast<size_t>(shared_bytes);
  return shape;
}

LaunchShape on_chip_shape(int64_t blocks, int threads, int64_t shared_bytes, int cluster = 1) {
  LaunchShape shape = launch_shape(blocks, threads, shared_bytes);
  shape.cluster = static_cast<unsigned>(cluster);
  shape.sm_shared_bytes = kAllShared;
  return shape;
}

template <typename T, int kVec, bool kRows, bool kWhole, Blocks kBlocks>
cudaError_t run_on_chip(const KernelArgs& args, const Plan& plan, cudaStream_t stream) {
  LaunchShape shape = on_chip_shape(plan.num_blocks, plan.threads, plan.layout.bytes, plan.cluster);
  shape.cooperative = kBlocks == Blocks::kGrid;
  if (plan.pass == Pass::kBackward) {
    return launch_kernel<&on_chip_backward_kernel<T, kVec, kRows, kWhole, kBlocks>>(shape, stream, args);
  }
  cudaError_t error = cudaSuccess;
  if (plan.counts_behind) error = prepare_kernel<&count_kernel>(shape.sm_shared_bytes);  // as in run_stages
  if (error == cudaSuccess) {
    error = launch_kernel<&on_chip_forward_kernel<T, kVec, kRows, kWhole, kBlocks>>(shape, stream, args);
  }
  if (error != cudaSuccess || !plan.counts_behind) return error;
  return launch_kernel<&count_kernel>(on_chip_shape(1, kWarpSize, 0), stream, args);
}

template <typename T, int kVec, bool kRows, bool kWhole>
cudaError_t run_reduce(const LaunchShape& shape, const KernelArgs& args, const Plan& plan, cudaStream_t stream) {
  if (plan.pass == Pass::kForward) {
    return launch_kernel<&streaming_statistics_kernel<T, kVec, kRows, kWhole>>(shape, stream, args);
  }
  return args.view[2].data != nullptr
             ? launch_kernel<&streaming_backward_reduce_kernel<T, kVec, kRows, kWhole, true>>(shape, stream, args)
             : launch_kernel<&streaming_backward_reduce_kernel<T, kVec, kRows, kWhole, false>>(shape, stream, args);
}

template <typename T, int kVec, bool kRows, bool kWhole>
cudaError_t run_stages(const Stages& stages, const Plan& plan, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  bool first = true;
  auto shape = [&](int64_t blocks, int threads, int64_t shared_bytes) {
    LaunchShape shape = launch_shape(blocks, threads, shared_bytes);
    shape.overlaps = plan.overlaps && !first;  // what comes before the pass is not ours
    first = false;
    return shape;
  };
  // Before the first launch: a kernel may fail to load, and those before it would have left their marks by then.
  if (plan.finish) error = prepare_kernel<&finish_kernel<accumulate_t<T>>>(kSomeShared);
  const bool two = stages.apply.view[2].data != nullptr;
  if (plan.apply && error == cudaSuccess) {
    error = two ? prepare_kernel<&streaming_apply_kernel<T, kVec, kRows, kWhole, 2>>(kSomeShared)
                : prepare_kernel<&streaming_apply_kernel<T, kVec, kRows, kWhole, 1>>(kSomeShared);
  }
  if (plan.reduce && error == cudaSuccess) {
    error = run_reduce<T, kVec, kRows, kWhole>(shape(plan.num_blocks, plan.threads, plan.layout.bytes), stages.reduce,
                                               plan, stream);
  }
  if (plan.finish && error == cudaSuccess) {
    error = launch_kernel<&finish_kernel<accumulate_t<T>>>(
        shape(stages.finish.num_channels, plan.finish_threads, plan.finish_shared_bytes), stream, stages.finish);
  }
  if (plan.apply && error == cudaSuccess) {
    const LaunchShape last = shape(plan.num_blocks, plan.threads, plan.layout.bytes);
    error = two ? launch_kernel<&streaming_apply_kernel<T, kVec, kRows, kWhole, 2>>(last, stream, stages.apply)
                : launch_kernel<&streaming_apply_kernel<T, kVec, kRows, kWhole, 1>>(last, stream, stages.apply);
  }
  return error;
}

template <typename T, int kVec, bool kRows, bool kWhole>
cudaError_t run_family(const Stages& stages, const Plan& plan, cudaStream_t stream) {
  if constexpr (kVec > 1) {
    const KernelArgs& args = stages.apply;
    if (plan.family == Family::kGrid) return run_on_chip<T, kVec, kRows, kWhole, Blocks::kGrid>(args, plan, stream);
    if (plan.on_chip) {
      // Instances are the same for all architectures: those that the latest has a use for.
      if constexpr (most_kept_batches(sizeof(T), kRows, kWhole, 1, kClusterArch) > 0) {
        if (plan.kept_batches > 0) return run_on_chip<T, kVec, kRows, kWhole, Blocks::kKeeping>(args, plan, stream);
      }
      return plan.persistent ? run_on_chip<T, kVec, kRows, kWhole, Blocks::kPersistent>(args, plan, stream)
                             : run_on_chip<T, kVec, kRows, kWhole, Blocks::kOneTile>(args, plan, stream);
    }
  }
  return run_stages<T, kVec, kRows, kWhole>(stages, plan, stream);
}

template <typename T>
cudaError_t run_dtype(const Stages& stages, const Plan& plan, cudaStream_t stream) {
  constexpr int kVec = kPackBytes / sizeof(T);
  const bool rows = plan.walk == Walk::kRows;
  if (plan.vec == 1) {
    return rows ? run_family<T, 1, true, true>(stages, plan, stream)
                : run_family<T, 1, false, true>(stages, plan, stream);
  }
  if (rows) return run_family<T, kVec, true, true>(stages, plan, stream);
  return plan.whole_packs ? run_family<T, kVec, false, true>(stages, plan, stream)
                          : run_family<T, kVec, false, false>(stages, plan, stream);
}

cudaError_t run_plan(const Stages& stages, const Plan& plan, cudaStream_t stream) {
  if (!plan.error.empty()) return cudaErrorInvalidConfiguration;
  switch (plan.dtype) {
    case DType::kFloat64:
      return run_dtype<double>(stages, plan, stream);
    case DType::kFloat32:
      return run_dtype<float>(stages, plan, stream);
    case DType::kBFloat16:
      return run_dtype<BFloat16>(stages, plan, stream);
    case DType::kFloat16:
      return run_dtype<Float16>(stages, plan, stream);
  }
  return cudaErrorInvalidValue;
}

// The same for all stages but for the tensors and where apply has its coefficients from.
Stages make_stages(const KernelArgs& args, const Plan& plan) {
  Stages stages{args, args, args};
  if (plan.reduce) {
    stages.apply.source = plan.fused ? Source::kPartials : Source::kFinished;
    stages.finish.source = Source::kPartials;
  }
  return stages;
}

}  // namespace

cudaError_t launch(const ForwardProblem& problem, const Plan& plan, void* workspace, cudaStream_t stream) {
  KernelArgs args = common_args(problem.geometry, plan, workspace);
  args.training = problem.training;
  args.cumulative = problem.cumulative;
  args.batch_counted = plan.reduce;
  args.momentum = problem.momentum;
  args.eps = problem.eps;
  args.running_limit = problem.running_limit;
  args.input[forward::kWeight] = problem.weight;
  args.input[forward::kBias] = problem.bias;
  args.input[forward::kRunningMean] = problem.running_mean;
  args.input[forward::kRunningVar] = problem.running_var;
  args.output[forward::kMean] = problem.mean;
  args.output[forward::kInvstd] = problem.invstd;
  args.output[forward::kStatsMean] = problem.stats_mean;
  args.output[forward::kStatsVar] = problem.stats_var;
  if (problem.training) {
    args.output[forward::kNewMean] = problem.running_mean;
    args.output[forward::kNewVar] = problem.running_var;
    args.num_batches_tracked = problem.num_batches_tracked;
  }
  Stages stages = make_stages(args, plan);
  set_views(stages.reduce, plan, problem.x);
  set_views(stages.apply, plan, problem.y, problem.x);
  return run_plan(stages, plan, stream);
}

cudaError_t launch(const BackwardProblem& problem, const Plan& plan, void* workspace, cudaStream_t stream) {
  KernelArgs args = common_args(problem.geometry, plan, workspace);
  args.backward = true;
  args.training = problem.training;
  args.input[backward::kWeight] = problem.weight;
  args.input[backward::kMean] = problem.mean;
  args.input[backward::kInvstd] = problem.invstd;
  args.input[backward::kGradMean] = problem.grad_mean;
  args.input[backward::kGradVar] = problem.grad_var;
  args.output[backward::kDbias] = problem.dbias;
  args.output[backward::kDweight] = problem.dweight;
  args.output[backward::kDvar] = problem.dvar;
  args.output[backward::kDmean] = problem.dmean;
  Stages stages = make_stages(args, plan);
  const View none, &x = problem.x, &dy = problem.dy, &dx = problem.dx;
  // In eval, one pass does it all.
  const bool writes_dx = plan.reduce && !plan.apply;
  set_views(stages.reduce, plan, dy, plan.reads_x ? x : none, writes_dx ? dx : none);
  problem.training ? set_views(stages.apply, plan, dx, x, dy) : set_views(stages.apply, plan, dx, dy);
  return run_plan(stages, plan, stream);
}

// A block that fills an SM's memory may have as many threads as launch bounds allow, and they are the same for all
// on-chip kernels: one of them stands for all.
int ask_active_clusters(int cluster, int64_t shared_bytes) {
  return count_clusters<&on_chip_backward_kernel<float, 4, false, true, Blocks::kOneTile>>(
      on_chip_shape(cluster, kMaxOnChipThreads, shared_bytes, cluster));
}

// The same for grids: one of `blocks` blocks on an SM, which share those threads between them.
int ask_active_blocks(int blocks, int64_t shared_bytes) {
  return count_blocks<&on_chip_backward_kernel<float, 4, false, true, Blocks::kGrid>>(
      on_chip_shape(blocks, kMaxOnChipThreads / blocks, shared_bytes));
}

bool can_overlap() { return compiled_arch<&finish_kernel<float>>() >= kClusterArch; }

}  // namespace bnext::cuda
