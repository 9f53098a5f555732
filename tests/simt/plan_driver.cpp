// make_plan for tests, through ctypes. The structs are mirrored in tests/test_cuda_plan.py.
#include <cstdio>
#include <vector>

#include "cuda/kernels/kernel_args.h"
#include "cuda/plan.h"
#include "cuda/plan_cache.h"
#include "cuda/plan_cost.h"
#include "cuda/plan_names.h"
#include "layout.h"

namespace {

using namespace bnext;
using namespace bnext::cuda;

struct Query {
  int64_t size[4], stride[4];
  int64_t dtype, backward, training, output, reads_x, sums, misaligned;
  int64_t family, cumulative, no_grid, no_clusters, no_overlap, persistent_limit, registers_limit, no_late, no_early;
  int64_t team, exact_threads;
  int64_t arch, num_sms, threads_per_sm, shared_bytes_per_block, l2_bytes;
  int64_t shared_bytes_opt_in, shared_bytes_per_sm, active_clusters[kNumClusterSizes];
  int64_t cooperative, overlaps;
  double memory_gb_per_s;
  // results
  int64_t walk, vec, fold, threads, num_items, chunk, num_splits, wide_channels, num_slabs, block_packs, block_rows;
  int64_t num_blocks, reduce, finish, apply, fused, finish_threads;
  int64_t finish_shared_bytes, coefficient_offset, workspace_bytes, bytes_moved, has_error, acc_bytes, same_again;
  int64_t family_chosen, on_chip, counts_behind, cluster, num_steps, held_steps, run_length, slab_channels;
  int64_t shared_bytes, tensor_bytes, kept_batches, batches_ahead, num_teams, persistent, shares_out, late_from,
      num_late, registers, overlapping, early_lines, early_slabs, line_packs;
  double held, microseconds, late_us;
  char text[512];
};

}  // namespace

extern "C" {

int64_t plan_query_bytes() { return sizeof(Query); }
int64_t plan_unroll() { return kUnroll; }
int64_t plan_registers(int64_t backward, int64_t dtype, int64_t rows, int64_t whole_packs, int64_t persistent,
                       int64_t keeps, int64_t arch) {
  Plan p;
  p.family = Family::kResident;
  p.persistent = persistent != 0;
  p.kept_batches = keeps != 0;
  p.pass = backward != 0 ? Pass::kBackward : Pass::kForward;
  p.dtype = static_cast<DType>(dtype);
  p.walk = rows != 0 ? Walk::kRows : Walk::kPlanes;
  p.whole_packs = whole_packs != 0;
  return registers_of(p, static_cast<int>(arch));
}
int64_t plan_batches() { return Limits{}.batches; }

void plan_run(Query* q) {
  View x;
  // Never read: only its alignment counts.
  void* data = reinterpret_cast<void*>(static_cast<uintptr_t>(q->misaligned != 0 ? 256 + 8 : 256));
  Request r;
  r.geometry = make_geometry({q->size[0], q->size[1], q->size[2], q->size[3]}, static_cast<DType>(q->dtype),
                             {{data, {q->stride[0], q->stride[1], q->stride[2], q->stride[3]}}}, {&x});
  if (q->backward != 0) {
    BackwardProblem p;
    p.geometry = r.geometry;
    p.x = p.dy = x;
    p.training = q->training != 0;
    if (q->output != 0) p.dx = x;
    if (q->reads_x != 0) p.dweight.data = data;
    if (q->sums != 0) p.dbias.data = data;
    r = make_request(p);
  } else {
    ForwardProblem p;
    p.geometry = r.geometry;
    p.x = x;
    p.training = q->training != 0;
    if (q->output != 0) p.y = x;
    p.cumulative = q->cumulative != 0;
    p.num_batches_tracked = static_cast<int64_t*>(data);
    r = make_request(p);
  }
  DeviceInfo device;
  device.arch = static_cast<int>(q->arch);
  device.num_sms = static_cast<int>(q->num_sms);
  device.threads_per_sm = static_cast<int>(q->threads_per_sm);
  device.shared_bytes_per_block = q->shared_bytes_per_block;
  device.l2_bytes = q->l2_bytes;
  device.shared_bytes_opt_in = q->shared_bytes_opt_in;
  device.shared_bytes_per_sm = q->shared_bytes_per_sm;
  for (int i = 0; i < kNumClusterSizes; ++i) device.active_clusters[i] = static_cast<int>(q->active_clusters[i]);
  device.cooperative = q->cooperative != 0;
  device.overlaps = q->overlaps != 0;
  device.memory_gb_per_s = q->memory_gb_per_s;
  Limits limits;
  limits.family = static_cast<Family>(q->family);
  limits.grid = q->no_grid == 0;
  limits.clusters = q->no_clusters == 0;
  limits.overlap = q->no_overlap == 0;
  limits.persistent = static_cast<Choice>(q->persistent_limit);
  limits.registers = static_cast<Choice>(q->registers_limit);
  limits.late = q->no_late == 0;
  limits.early = q->no_early == 0;
  limits.team = static_cast<int>(q->team);
  limits.exact_threads = static_cast<int>(q->exact_threads);
  const Plan p = make_plan(r, device, limits);
  q->walk = static_cast<int64_t>(p.walk);
  q->vec = p.vec;
  q->fold = p.fold;
  q->threads = p.threads;
  q->num_items = p.num_items;
  q->chunk = p.chunk;
  q->num_splits = p.num_splits;
  q->wide_channels = p.wide_channels;
  q->num_slabs = p.num_slabs;
  q->block_packs = p.block_packs;
  q->block_rows = p.block_rows;
  q->num_blocks = p.num_blocks;
  q->reduce = p.reduce;
  q->finish = p.finish;
  q->apply = p.apply;
  q->fused = p.fused;
  q->finish_threads = p.finish_threads;
  q->finish_shared_bytes = p.finish_shared_bytes;
  q->coefficient_offset = p.coefficient_offset;
  q->workspace_bytes = p.workspace_bytes;
  q->bytes_moved = p.bytes_moved;
  q->has_error = !p.error.empty();
  q->acc_bytes = p.dtype == DType::kFloat64 ? 8 : 4;
  Plan other = make_plan(r, device, limits);
  q->same_again = p == other;
  other.threads += 1;
  q->same_again = q->same_again != 0 && p != other;
  q->family_chosen = static_cast<int64_t>(p.family);
  q->on_chip = p.on_chip;
  q->counts_behind = p.counts_behind;
  q->cluster = p.cluster;
  q->num_steps = p.num_steps;
  q->held_steps = p.held_steps;
  q->run_length = p.run_length;
  q->slab_channels = p.slab_channels;
  q->shared_bytes = p.layout.bytes;
  q->tensor_bytes = p.tensor_bytes;
  q->kept_batches = p.kept_batches;
  q->batches_ahead = p.batches_ahead;
  q->num_teams = p.num_teams;
  q->persistent = p.persistent;
  q->shares_out = p.shares_out;
  q->late_from = p.late_from;
  q->num_late = p.num_late;
  q->registers = p.on_chip ? registers_of(p, device.arch) : 0;
  q->overlapping = p.overlaps;
  q->early_lines = p.early_lines;
  q->early_slabs = p.early_slabs;
  q->line_packs = p.line_packs;
  q->late_us = p.late_us;
  q->held = p.held;
  q->microseconds = p.microseconds;
  std::snprintf(q->text, sizeof q->text, "%s", to_string(p).c_str());
}

// Of blocks that move bytes_moved, two tensors of tensor_bytes among them before they stop, for `stop`. Half of them
// begin late_us late.
double plan_on_chip_time(double at_once, double threads, double blocks, double busy_threads, double early,
                         double traffic, double stop, int64_t tensor_bytes, int64_t bytes_moved, double* late_us) {
  Plan plan;
  plan.tensors_read = 2;
  plan.tensor_bytes = tensor_bytes;
  plan.bytes_moved = bytes_moved;
  plan.num_late = blocks > 1;
  const double time = on_chip_time(plan, {1, at_once, threads, blocks, busy_threads, early}, traffic, stop);
  *late_us = plan.late_us;
  return time;
}

// Asks for the plans of so many shapes, and for the same ones again; each on two devices that differ, and with no
// persistent blocks. How many were still where they had been. -1: a plan was not what make_plan says.
int64_t plan_cache_keeps(int64_t shapes) {
  const DeviceInfo large, small{75, 40, 1024, 48 << 10, 4 << 20, 64 << 10, 64 << 10, 64 << 10, {0, 0, 0, 0}};
  Limits one_slab;
  one_slab.persistent = Choice::kNever;
  std::vector<const Plan*> first;
  int64_t kept = 0;
  for (int round = 0; round < 2; ++round) {
    for (int64_t i = 0; i < 3 * shapes; ++i) {
      Request request;
      request.geometry.num_channels = 8 * (1 + i / 3);
      request.geometry.size[1] = 8;
      request.geometry.size[2] = 784;
      const DeviceInfo& info = i % 3 == 1 ? small : large;
      const Limits& limits = i % 3 == 2 ? one_slab : Limits{};
      const Plan& plan = cached_plan(request, i % 3 == 1, info, limits);
      if (plan != make_plan(request, info, limits)) return -1;
      if (round == 0) first.push_back(&plan);
      kept += round == 1 && first[i] == &plan;
    }
  }
  return kept;
}

int64_t plan_cache_size() { return static_cast<int64_t>(count_cached_plans()); }

int64_t plan_allows_late(int64_t read_again) {
  if (read_again != 0) read_environment();
  return limits_of_environment().late;
}

int64_t plan_streaming_shared_bytes() { return kStreamingSharedBytes; }

int64_t plan_divide_long(int64_t n, int64_t divisor) {
  return static_cast<int64_t>(make_long_divider(divisor).divide(static_cast<uint64_t>(n)));
}
int64_t plan_divide(int64_t n, int64_t divisor) { return make_divider(divisor).divide(static_cast<uint32_t>(n)); }

int64_t plan_knows_family(const char* name) {
  Family family;
  return parse_family(name, &family) && std::string(family_name(family)) == name;
}

}  // extern "C"
