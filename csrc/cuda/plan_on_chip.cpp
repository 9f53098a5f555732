#include "plan_on_chip.h"

#include <numeric>

#include "plan_cost.h"
#include "plan_steps.h"

namespace bnext::cuda {
namespace {

// Planes where each channel by itself begins inside a pack, but g neighbours together do not: rows of columns, one row
// for each of the outer positions. False where the walk stays as it is.
bool take_runs(const Request& r, Plan& plan) {
  const Geometry& g = r.geometry;
  const int64_t vec = kPackBytes / dtype_bytes(g.dtype), S = g.size[2];
  const int64_t run = vec / std::gcd(vec, S), run_packs = run * S / vec;
  if (g.walk != Walk::kPlanes || !g.unit_stride || !r.dense_channels || run == 1 || S == 1) return false;
  if (g.num_channels % run != 0 || run_packs > kMaxThreads) return false;
  plan.walk = Walk::kRows;
  plan.whole_packs = true;
  plan.run_length = static_cast<int>(S);
  plan.wide_channels = g.num_channels * S;
  plan.size[0] = 1;
  plan.size[1] = g.size[0];
  plan.size[2] = g.size[1];
  plan.num_items = g.size[0] * g.size[1];
  // Some runs side by side, where one is less than a cache line.
  const int64_t runs = std::min(ceil_div(kLineBytes, run_packs * kPackBytes), g.num_channels / run);
  plan.block_packs = static_cast<int>(runs * run_packs);
  plan.slab_channels = static_cast<int>(runs * run);
  plan.num_slabs = ceil_div(g.num_channels, plan.slab_channels);
  return true;
}

// Slabs of at most row_bytes, or whole folded rows.
bool take_rows(const Geometry& g, int64_t row_bytes, Plan& plan) {
  const int64_t packs = plan.wide_channels / plan.vec;
  const int64_t most = plan.fold > 1 ? packs : std::min(packs, row_bytes / kPackBytes);
  if (most > kMaxThreads) return false;
  plan.num_slabs = ceil_div(packs, most);
  plan.block_packs = static_cast<int>(ceil_div(packs, plan.num_slabs));
  plan.slab_channels = static_cast<int>(plan.fold > 1 ? g.num_channels : plan.block_packs * plan.vec);
  return true;
}

// Batches that a thread can keep in registers.
int most_kept(const Plan& plan, int arch) {
  const int element_bytes = static_cast<int>(dtype_bytes(plan.dtype));
  return most_kept_batches(element_bytes, plan.walk == Walk::kRows, plan.whole_packs, plan.tensors_read, arch);
}

// Steps of plan.threads threads, and how many of them stay on chip: in slots, and, where not all fit there, the first
// ones in registers, `most` batches of them.
void hold(int64_t shared_bytes, int most, Plan& plan) {
  const int64_t at_once = plan.walk == Walk::kRows ? plan.threads / plan.block_packs : plan.threads;
  plan.block_rows = plan.walk == Walk::kRows ? static_cast<int>(at_once) : 1;
  plan.num_steps = static_cast<int>(ceil_div(plan.chunk, at_once));
  const int64_t slot = int64_t{plan.tensors_read} * plan.threads * kPackBytes;
  const int64_t fit = std::max<int64_t>(0, (shared_bytes - make_layout(plan, 0).bytes) / slot);
  // A slab that comes after another has its batches in other places, so every place is for a whole batch.
  const int64_t all = plan.persistent ? round_up(plan.num_steps, kOnChipBatch) : plan.num_steps;
  plan.held_steps = static_cast<int>(fit >= all ? all : fit / kOnChipBatch * kOnChipBatch);
  plan.layout = make_layout(plan, plan.held_steps * slot);
  // Where places are used again, the one that is copied to has to be free.
  const int held = on_chip_batches(plan.held_steps);
  const bool all_held = plan.held_steps >= plan.num_steps;
  plan.batches_ahead = std::min(kMostGroups, all_held ? held : held - 1);
  // When they are mapped, all copies that are ahead have been asked for, each behind a batch in the slots. More may be
  // kept than have no slot: then the next slab's copies begin the earlier.
  const int not_needed = on_chip_batches(plan.num_steps) - plan.batches_ahead;
  plan.kept_batches = all_held ? 0 : std::min(most, not_needed);
}

// Whether a grid's blocks share out a slab's channels. Planes have one, which each block does for itself.
void share_out(const DeviceInfo& device, const Limits& limits, Plan& plan) {
  if (plan.walk == Walk::kPlanes) return;
  const double each_all = meeting_time(plan, device);
  plan.shares_out = true;
  plan.shares_out = limits.share_out || meeting_time(plan, device) < each_all;
}

// What a block asks L2 for, of the slab that comes when those that run now are done: up to one line of each tensor for
// each thread that has nothing else to do, as far as the slab goes on, and L2 has room beside what is read again.
// Nothing where an SM has so many blocks that others move data anyway.
void ask_early(const DeviceInfo& device, Plan& plan) {
  constexpr int kMostBlocks = 3;  // of an SM: more lose by it, in the simulation of tests/simt/overlap.py
  const bool rows = plan.walk == Walk::kRows;
  plan.line_packs = static_cast<int>(kLineBytes / kPackBytes);
  if (rows) {
    // A narrow slab's row is in one line, or, where rows begin anywhere, in two.
    const bool lines = plan.wide_channels * dtype_bytes(plan.dtype) % kLineBytes == 0;
    if (!lines && plan.block_packs <= plan.line_packs) plan.line_packs /= 2;
    plan.line_packs = std::min(plan.line_packs, plan.block_packs);
  }
  const int64_t at_once = first_teams(plan, device), blocks = at_once * plan.num_splits;
  if (at_once < 1 || at_once >= plan.num_slabs || blocks > int64_t{kMostBlocks} * device.num_sms) return;
  plan.early_slabs = at_once;
  const double now = static_cast<double>(at_once) / static_cast<double>(plan.num_slabs);  // of all slabs
  const double room = device.costs.l2_share * static_cast<double>(device.l2_bytes) - bytes_again(plan) * now;
  const double line = static_cast<double>(plan.tensors_read * plan.line_packs * kPackBytes);
  const int64_t there = ceil_div(plan.chunk * plan.block_packs, plan.line_packs);
  const auto most = static_cast<double>(std::min<int64_t>(there, plan.threads - (rows ? 0 : kWarpSize)));
  plan.early_lines = static_cast<int>(std::clamp(room / line / static_cast<double>(blocks), 0.0, most));
}

// Adds up f(items of a block) over the blocks that share a channel: the last ones may have fewer, or none.
template <typename F>
int64_t sum_of_blocks(const Plan& plan, F f) {
  const int64_t full = plan.num_items / plan.chunk, rest = plan.num_items % plan.chunk;
  return full * f(plan.chunk) + (rest > 0 ? f(rest) : 0);
}

static_assert(kMaxOnChipThreads / kGridBlocksPerSm >= kMaxThreads, "the widest rows fit");

// Teams that a grid may have at once.
constexpr int kTeams[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64};

// Blocks that share a slab, and what each of them may have.
struct Team {
  Family family = Family::kResident;
  int64_t blocks = 1, at_once = 0;  // at_once: of a grid, how many teams there are
  int64_t shared_bytes = 0;
  bool persistent = false;  // not of a grid: as many teams as run at once, and not one for each slab
  bool keeps = false;       // packs in registers
  int threads = 0;
};

// Finishes a plan whose walk and slab are chosen.
void finish_plan(const Request& r, const DeviceInfo& device, const Limits& limits, const Team& team, Plan& plan) {
  const int num_tensors = plan.tensors_read;
  const bool grid = team.family == Family::kGrid;
  plan.family = team.family;
  plan.cluster = team.family == Family::kCluster ? static_cast<int>(team.blocks) : 1;
  plan.num_splits = team.blocks;
  plan.chunk = ceil_div(plan.num_items, team.blocks);
  plan.threads = team.threads;
  const int64_t shared_bytes = std::min(limits.shared_bytes, team.shared_bytes);
  plan.num_teams = grid ? team.at_once : plan.num_slabs;
  plan.persistent = team.persistent || plan.num_teams < plan.num_slabs;
  hold(shared_bytes, team.keeps ? most_kept(plan, device.arch) : 0, plan);
  if (team.persistent) {
    plan.num_teams = std::clamp<int64_t>(teams_at_once(plan, device), 1, plan.num_slabs);
    plan.persistent = plan.num_teams < plan.num_slabs;
    if (!plan.persistent) hold(shared_bytes, 0, plan);  // for one slab each
  }
  plan.num_blocks = plan.num_teams * team.blocks;
  if (grid) {
    share_out(device, limits, plan);
    const int64_t channels = plan.num_teams * kTurnsOfLetters * plan.slab_channels;  // that have letters
    plan.coefficient_offset = channels * team.blocks * letter_bytes(kNumSums * sizeof(double));
    plan.workspace_bytes = plan.coefficient_offset;
    if (plan.shares_out) plan.workspace_bytes += channels * letter_bytes(coefficient_bytes(plan.dtype, 1));
  }
  // What comes first in each block, behind what registers keep, has to go again.
  const int64_t batch_items = int64_t{kOnChipBatch} * (plan.walk == Walk::kRows ? plan.block_rows : plan.threads);
  const int64_t kept_items = plan.kept_batches * batch_items;
  const int lost = on_chip_batches(plan.num_steps) - plan.kept_batches - on_chip_batches(plan.held_steps);
  const int64_t again = sum_of_blocks(
      plan, [&](int64_t own) { return std::clamp<int64_t>(own - kept_items, 0, std::max(0, lost) * batch_items); });
  const int64_t item_packs = plan.walk == Walk::kRows ? plan.wide_channels / plan.vec : plan.wide_channels;
  plan.bytes_moved = (num_tensors + 1) * plan.tensor_bytes + again * item_packs * num_tensors * kPackBytes;
  plan.held = 1 - static_cast<double>(again) / static_cast<double>(plan.num_items);
  ask_early(device, plan);
  plan.microseconds = predict_time(plan, r, device);
  // Where a block looks for a later slab, its number goes beyond the last one.
  const int64_t most_slabs = plan.num_slabs + std::max(plan.early_slabs, plan.persistent ? plan.num_teams : 0);
  if (plan.num_blocks > kMaxBlocks || most_slabs > kMaxBlocks) {
    plan.error = "it needs more than 2^31 - 1 blocks";
  } else if (plan.cluster > 1 && active_clusters(device, plan.cluster) == 0) {
    plan.error = "the device runs no clusters of " + std::to_string(plan.cluster) + " such blocks";
  } else if (grid && !device.cooperative) {
    plan.error = "the device has no cooperative launch";
  } else if (plan.num_items < team.blocks) {
    plan.error = "a channel has less to read than a team has blocks";
  } else if (plan.batches_ahead < 1) {
    plan.error = "next to nothing of it fits on chip";
  } else if (plan.num_steps > limits.batches * kUnroll) {
    plan.error = "a thread would have too many packs for sums in float32";
  }
}

// A plan before it is decided how much stays on chip, with the walk of the streaming plan.
Plan begin_on_chip(const Request& r, const Plan& streaming) {
  Plan plan = streaming;
  if (streaming.vec == 1) {
    plan.error = "the elements do not fill packs of 16 bytes";
    return plan;
  }
  plan.on_chip = true;
  plan.reduce = plan.finish = plan.apply = plan.fused = false;
  plan.finish_shared_bytes = 0;
  plan.overlaps = false;
  plan.slab_channels = 1;
  plan.coefficient_offset = plan.workspace_bytes = 0;
  plan.tensors_read = r.pass == Pass::kForward ? 1 : 2;
  plan.tensors_written = 1;
  plan.error.clear();
  return plan;
}

// The best plan so far, of all walks, families and blocks that are tried.
struct Search {
  const Request& request;
  const DeviceInfo& device;
  const Limits& limits;
  Plan best;

  Search(const Request& r, const DeviceInfo& d, const Limits& l) : request(r), device(d), limits(l) {
    const bool asked = l.team != 0 || l.exact_threads != 0 || l.row_bytes != 0;
    best.error =
        asked ? "no plan has the team, the threads and the rows that are asked for" : "rows are too wide for a block";
  }

  // A legal plan is better than one that is not, and a faster one than a slower one.
  void try_plan(const Plan& plan) {
    const bool legal = plan.error.empty(), best_is_legal = best.error.empty();
    const bool faster = !best.on_chip || compared_time(plan) < compared_time(best);
    if (legal == best_is_legal ? faster : legal) best = plan;
  }

  // With as many threads as the model likes best, but not more than `most`, where rows fit.
  void try_team(const Plan& walk, Team team, int most) {
    if (limits.family != Family::kAuto && limits.family != team.family) return;
    if (limits.team != 0 && limits.team != team.blocks) return;
    int fewest = kMinThreads;
    while (fewest < walk.block_packs) fewest *= 2;
    for (team.threads = fewest; team.threads <= std::max(fewest, std::min(limits.threads, most)); team.threads *= 2) {
      if (limits.exact_threads != 0 && limits.exact_threads != team.threads) continue;
      Plan plan = walk;
      finish_plan(request, device, limits, team, plan);
      try_plan(plan);
      if (plan.num_steps <= kOnChipBatch) break;  // one batch: more threads would have nothing to do
    }
  }

  void try_blocks(const Plan& walk, bool persistent, bool keeps) {
    const int64_t shared_bytes = device.shared_bytes_opt_in;
    try_team(walk, {Family::kResident, 1, 0, shared_bytes, persistent, keeps}, kMaxOnChipThreads);
    if (limits.family == Family::kAuto && !limits.clusters) return;
    for (int cluster : kClusterSizes) {
      try_team(walk, {Family::kCluster, cluster, 0, shared_bytes, persistent, keeps}, kMaxOnChipThreads);
    }
  }

  void try_grids(const Plan& walk, int per_sm, bool keeps) {
    const int64_t all = int64_t{per_sm} * device.num_sms, shared_bytes = grid_shared_bytes(device, per_sm);
    for (int64_t most : kTeams) {
      // Fewer teams where they take as many turns.
      const int64_t turns = ceil_div(walk.num_slabs, most), teams = ceil_div(walk.num_slabs, turns);
      const int64_t blocks = limits.team != 0 ? limits.team : std::min(all / teams, walk.num_items);
      if (teams * blocks > all || blocks < 1) return;
      try_team(walk, {Family::kGrid, blocks, teams, shared_bytes, false, keeps}, kMaxOnChipThreads / per_sm);
      if (turns == 1) return;
    }
  }

  void try_walk(const Plan& walk) {
    const bool can_keep = limits.registers != Choice::kNever && most_kept(walk, device.arch) > 0;
    const bool must_keep = can_keep && limits.registers == Choice::kAlways;
    const bool grids = limits.family != Family::kAuto || (limits.grid && device.cooperative);
    if (limits.persistent != Choice::kAlways) try_blocks(walk, false, false);
    for (bool keeps : {false, true}) {
      if (keeps ? !can_keep : must_keep) continue;
      if (limits.persistent != Choice::kNever) try_blocks(walk, true, keeps);
      for (int per_sm = 1; grids && per_sm <= kGridBlocksPerSm; ++per_sm) try_grids(walk, per_sm, keeps);
    }
  }
};

}  // namespace

int64_t grid_shared_bytes(const DeviceInfo& device, int blocks_per_sm) {
  return std::min(device.shared_bytes_opt_in, device.shared_bytes_per_sm / blocks_per_sm - kReservedSharedBytes);
}

Plan plan_on_chip(const Request& r, const DeviceInfo& device, const Limits& limits, const Plan& streaming) {
  Plan base = begin_on_chip(r, streaming);
  base.family = limits.family == Family::kAuto ? Family::kResident : limits.family;
  base.counts_behind = r.pass == Pass::kForward && r.cumulative;
  if (!base.error.empty()) return base;
  Search search(r, device, limits);
  Plan walk = base;
  if (take_runs(r, walk)) {
    search.try_walk(walk);
  } else if (base.walk == Walk::kPlanes) {
    walk.num_slabs = r.geometry.num_channels;
    search.try_walk(walk);
  } else {
    for (int64_t row_bytes : {kLineBytes, kLineBytes / 2}) {
      if (limits.row_bytes != 0 && limits.row_bytes != row_bytes) continue;
      if (take_rows(r.geometry, row_bytes, walk)) search.try_walk(walk);
      walk = base;
    }
  }
  if (!search.best.on_chip) {
    base.error = search.best.error;
    return base;
  }
  return search.best;
}

}  // namespace bnext::cuda
