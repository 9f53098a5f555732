#include "plan.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <tuple>

#include "plan_cost.h"
#include "plan_on_chip.h"
#include "plan_steps.h"

namespace bnext::cuda {
namespace {

// Contiguous bytes of a row that a block reads: a whole cache line and no more, because a block leaves 24 bytes of
// partial sums for each channel, which should be little beside the rows that it has read for them.
constexpr int64_t kRowBytes = kLineBytes;
// Partial sums that an apply block of rows adds up by itself: 24 bytes each, from L2.
constexpr int64_t kFusedPartials = 512;

bool begins_aligned(const View& view) {
  return view.data == nullptr || reinterpret_cast<uintptr_t>(view.data) % kPackBytes == 0;
}

// Every row, or every plane, begins at a multiple of 16 bytes.
bool stays_aligned(const Geometry& g, const View& view) {
  if (view.data == nullptr) return true;
  const int64_t vec = kPackBytes / dtype_bytes(g.dtype);
  bool aligned = begins_aligned(view);
  const bool rows = g.walk == Walk::kRows;
  for (int d = 0; d < (rows ? 3 : 2); ++d) aligned = aligned && (g.size[d] == 1 || view.stride[d] % vec == 0);
  return aligned && (rows || g.num_channels == 1 || view.stride_c % vec == 0);
}

// Rows lie one behind the other.
bool rows_follow(const Geometry& g, const View& view) {
  if (view.data == nullptr) return true;
  return begins_aligned(view) && g.size[0] == 1 && g.size[1] == 1 &&
         (g.size[2] == 1 || view.stride[2] == g.num_channels);
}

// Planes of neighbouring channels lie one behind the other, and what comes after all channels begins at 16 bytes.
bool channels_follow(const Geometry& g, const View& view) {
  if (view.data == nullptr) return true;
  const int64_t vec = kPackBytes / dtype_bytes(g.dtype);
  bool follow = begins_aligned(view) && view.stride_c == g.size[2];
  for (int d = 0; d < 2; ++d) follow = follow && (g.size[d] == 1 || view.stride[d] % vec == 0);
  return follow;
}

bool reaches_far(const Geometry& g, const View& view) {
  if (view.data == nullptr) return false;
  int64_t last = (g.num_channels - 1) * view.stride_c;
  for (int d = 0; d < kReduceDims; ++d) last += (g.size[d] - 1) * view.stride[d];
  return last / (kPackBytes / dtype_bytes(g.dtype)) >= int64_t{1} << 32;
}

void describe_views(Request& request, std::initializer_list<const View*> views) {
  request.aligned = request.dense_rows = request.dense_channels = true;
  for (const View* view : views) {
    request.aligned = request.aligned && stays_aligned(request.geometry, *view);
    request.far = request.far || reaches_far(request.geometry, *view);
    request.dense_rows = request.dense_rows && rows_follow(request.geometry, *view);
    request.dense_channels = request.dense_channels && channels_follow(request.geometry, *view);
  }
}

// Elsewhere what is said of blocks is meant for other families.
bool asks_for_streaming(const Limits& limits) { return limits.family == Family::kStreaming; }

// The fewest threads, a power of two, that still take all items in one batch; or as many as are asked for.
template <typename Fits>
int choose_threads(const Limits& limits, Fits fits) {
  if (asks_for_streaming(limits) && limits.exact_threads != 0) return std::min(limits.exact_threads, kMaxThreads);
  int threads = std::min(limits.threads, kMaxThreads);
  while (threads > kMinThreads && fits(threads / 2)) threads /= 2;
  return threads;
}

// Which kernels run and what they move.
void plan_stages(const Request& r, Plan& plan) {
  const bool one_pass = r.pass == Pass::kBackward && !r.training;  // eval: dx does not wait for the sums
  plan.reduce = r.pass == Pass::kForward ? r.training : r.sums;
  plan.reads_x = r.reads_x;
  plan.apply = r.output && !(one_pass && plan.reduce);
  const bool backward = r.pass == Pass::kBackward;
  if (plan.reduce) {
    plan.tensors_read += backward ? 1 + r.reads_x : 1;
    plan.tensors_written += one_pass && r.output;
  }
  if (plan.apply) {
    plan.tensors_read += backward && r.training ? 2 : 1;
    plan.tensors_written += 1;
  }
}

// How many blocks share a channel, or a slab: as many as run at once, or a few times that where threads would have too
// many batches to sum; each with at least a batch. A wave that is nearly empty would take as long as a full one.
void split_items(const DeviceInfo& device, const Limits& limits, int64_t columns, int64_t parallel_items, Plan& plan) {
  const int64_t full = int64_t{device.num_sms} * std::max(1, streaming_threads(device) / plan.threads);
  const int64_t batch = parallel_items * kUnroll;
  const int64_t fewest = std::max<int64_t>(1, ceil_div(plan.num_items, batch * limits.batches));
  const int64_t waves = ceil_div(columns * fewest, full);
  const int64_t wanted = asks_for_streaming(limits) && limits.team != 0 ? limits.team : waves * full / columns;
  const int64_t splits = std::min(std::max(fewest, wanted), ceil_div(plan.num_items, batch));
  // Whole steps of the block; only the last block may have fewer.
  plan.chunk = ceil_div(ceil_div(plan.num_items, splits), parallel_items) * parallel_items;
  plan.num_splits = ceil_div(plan.num_items, plan.chunk);
  plan.num_blocks = columns * plan.num_splits;
}

// Kernels that take packs count a channel's items in an int, as far as a batch behind the last one, and packs from a
// tensor's first one in 32 bits.
bool takes_packs(const Request& r, int64_t num_items) {
  constexpr int64_t kBatch = std::max(kMaxThreads * kUnrollOne, kMaxOnChipThreads * kOnChipBatch);
  return r.geometry.unit_stride && num_items < (int64_t{1} << 31) - kBatch && !r.far;
}

void plan_planes(const Request& r, const DeviceInfo& device, const Limits& limits, Plan& plan) {
  const Geometry& g = r.geometry;
  // A plane that begins inside a pack may touch one pack more.
  auto items_of_plane = [&](int64_t vec) { return ceil_div(g.size[2] + (r.aligned ? 0 : vec - 1), vec); };
  const int64_t vec = kPackBytes / dtype_bytes(g.dtype), planes = g.size[0] * g.size[1];
  plan.vec = takes_packs(r, planes * items_of_plane(vec)) ? static_cast<int>(vec) : 1;
  plan.whole_packs = plan.vec == 1 || (r.aligned && g.size[2] % plan.vec == 0);
  plan.size[0] = g.size[0];
  plan.size[1] = g.size[1];
  plan.size[2] = items_of_plane(plan.vec);
  plan.num_items = planes * plan.size[2];
  plan.threads = choose_threads(limits, [&](int threads) { return plan.num_items <= int64_t{threads} * kUnroll; });
  plan.wide_channels = g.num_channels;
  split_items(device, limits, g.num_channels, plan.threads, plan);
}

void plan_rows(const Request& r, const DeviceInfo& device, const Limits& limits, Plan& plan) {
  const Geometry& g = r.geometry;
  const int64_t vec = kPackBytes / dtype_bytes(g.dtype);
  for (int d = 0; d < 3; ++d) plan.size[d] = g.size[d];
  if (takes_packs(r, g.num_positions())) {
    const int64_t fold = vec / std::gcd(vec, g.num_channels);
    if (fold == 1 && r.aligned) {
      plan.vec = static_cast<int>(vec);
    } else if (r.dense_rows && g.size[2] % fold == 0 && g.num_channels * fold <= kMaxBlocks) {
      plan.vec = static_cast<int>(vec);
      plan.fold = fold;
      plan.size[2] /= fold;
    }
  }
  plan.wide_channels = g.num_channels * plan.fold;
  plan.num_items = plan.size[0] * plan.size[1] * plan.size[2];
  const int64_t packs = plan.wide_channels / plan.vec;
  const int64_t row_packs = std::min(packs, kRowBytes / (plan.vec * dtype_bytes(g.dtype)));
  static_assert(kRowBytes / 2 <= kMinThreads, "a block has a thread for each pack, or element, of its rows");
  plan.threads = choose_threads(limits, [&](int threads) { return plan.num_items <= threads / row_packs * kUnroll; });
  plan.num_slabs = ceil_div(packs, row_packs);
  plan.block_packs = static_cast<int>(ceil_div(packs, plan.num_slabs));  // slabs of about the same width
  plan.block_rows = plan.threads / plan.block_packs;
  split_items(device, limits, plan.num_slabs, plan.block_rows, plan);
  plan.slab_channels = plan.block_packs * plan.vec;
}

std::string format(const char* how, double number) {
  char text[32];
  std::snprintf(text, sizeof text, how, number);
  return text;
}

// Three digits, or all of a larger number's.
std::string format(double number) { return format(number < 999.5 ? "%.3g" : "%.0f", number); }

std::string with_unit(double bytes) {
  const char* unit = "B";
  for (const char* larger : {"kB", "MB", "GB", "TB"}) {
    if (bytes < 1000) break;
    bytes /= 1000;
    unit = larger;
  }
  return format("%.4g ", bytes) + unit;
}

// Which kernels run, with their blocks.
std::string stages_text(const Plan& plan) {
  const std::string grid = " " + std::to_string(plan.num_blocks) + " x " + std::to_string(plan.threads);
  if (plan.on_chip) {
    std::string text = grid;
    if (plan.cluster > 1) text += " in clusters of " + std::to_string(plan.cluster);
    if (plan.family == Family::kGrid) {
      text += " in " + std::to_string(plan.num_teams) + (plan.num_teams == 1 ? " team" : " teams");
    }
    if (plan.persistent) {
      text += ", " + format(static_cast<double>(plan.num_slabs) / static_cast<double>(plan.num_teams)) + " slabs each";
    }
    text += ", ";
    text += plan.held < 1 ? format("%.3g %%", 100 * plan.held) : "all";
    text += " on chip (" + with_unit(static_cast<double>(plan.layout.bytes)) + " shared";
    const double kept = plan.kept_batches * kOnChipBatch * kPackBytes * plan.threads;
    if (kept > 0) text += ", " + with_unit(kept * plan.tensors_read) + " in registers";
    text += " per block)";
    if (plan.early_lines > 0) text += ", " + with_unit(early_bytes(plan)) + " of a later slab early";
    if (plan.num_late > 0) text += ", half of the first ones " + format("%.2g", plan.late_us) + " us late";
    if (plan.counts_behind) text += ", then count";
    return text;
  }
  std::string text;
  const char* separator = "";
  if (plan.reduce) {
    text += " reduce" + grid + " (" + std::to_string(plan.num_splits) + " blocks per channel)";
    separator = ",";
  }
  if (plan.finish) {
    text += separator + std::string(" finish (") + std::to_string(plan.finish_threads) + " threads per channel)";
    separator = ",";
  }
  if (plan.apply) text += separator + std::string(plan.fused ? " finish and apply" : " apply") + grid;
  if (plan.overlaps) text += ", overlapping";
  return text.empty() ? " nothing" : text;
}

Plan plan_streaming(const Request& r, const DeviceInfo& device, const Limits& limits) {
  Plan plan;
  plan.dtype = r.geometry.dtype;
  plan.walk = r.geometry.walk;
  plan.pass = r.pass;
  if (r.geometry.num_channels == 0 || r.geometry.num_positions() == 0) {
    plan.error = "there is nothing to do";
    return plan;
  }
  plan_stages(r, plan);
  if (plan.walk == Walk::kPlanes) {
    plan_planes(r, device, limits, plan);
  } else {
    plan_rows(r, device, limits, plan);
  }
  // Each apply block adds up the partial sums of its channels: with many of them, to do it once is cheaper.
  plan.fused = plan.reduce && plan.apply && plan.num_splits <= limits.fused_splits &&
               plan.num_splits * plan.slab_channels <= kFusedPartials;
  // Eval without y still has to write mean and invstd.
  plan.finish = !plan.fused && (plan.reduce || (r.pass == Pass::kForward && !r.output));
  while (plan.reduce && plan.finish_threads < plan.num_splits && plan.finish_threads < kMaxThreads) {
    plan.finish_threads *= 2;
  }
  plan.finish_shared_bytes = finish_shared(plan.finish_threads);
  plan.layout = make_layout(plan, 0);
  if (plan.reduce) {
    plan.coefficient_offset = round_up(partial_bytes(plan.wide_channels, plan.num_splits), kPackBytes);
  }
  plan.workspace_bytes = plan.coefficient_offset;
  if (plan.finish && plan.apply) plan.workspace_bytes += coefficient_bytes(plan.dtype, r.geometry.num_channels);

  plan.overlaps = limits.overlap && device.overlaps && plan.reduce + plan.finish + plan.apply > 1;

  plan.tensor_bytes = r.geometry.num_channels * r.geometry.num_positions() * dtype_bytes(plan.dtype);
  plan.bytes_moved = (plan.tensors_read + plan.tensors_written) * plan.tensor_bytes;
  plan.microseconds = predict_time(plan, r, device);
  if (plan.num_blocks > kMaxBlocks || (plan.finish && r.geometry.num_channels > kMaxBlocks)) {
    plan.error = "it needs more than 2^31 - 1 blocks";
  } else if (std::max(plan.layout.bytes, plan.finish_shared_bytes) > device.shared_bytes_per_block) {
    plan.error = "a block needs more shared memory than the device has";
  }
  return plan;
}

}  // namespace

Request make_request(const ForwardProblem& problem) {
  Request request;
  request.geometry = problem.geometry;
  request.pass = Pass::kForward;
  request.training = request.sums = problem.training;
  request.output = problem.y.data != nullptr;
  request.cumulative = problem.training && problem.cumulative && problem.num_batches_tracked != nullptr;
  describe_views(request, {&problem.x, &problem.y});
  return request;
}

Request make_request(const BackwardProblem& problem) {
  Request request;
  request.geometry = problem.geometry;
  request.pass = Pass::kBackward;
  request.training = problem.training;
  request.output = problem.dx.data != nullptr;
  request.reads_x =
      (request.output && request.training) || problem.dweight.data != nullptr || problem.dvar.data != nullptr;
  request.sums = request.reads_x || problem.dbias.data != nullptr || problem.dmean.data != nullptr;
  describe_views(request, {&problem.x, &problem.dy, &problem.dx});
  return request;
}

Plan make_plan(const Request& r, const DeviceInfo& device, const Limits& limits) {
  const Plan streaming = plan_streaming(r, device, limits);
  const bool reads_twice = streaming.reduce && streaming.apply;  // no stages at all where there is nothing to do
  if (limits.family == Family::kStreaming || !reads_twice) return streaming;
  Plan on_chip = plan_on_chip(r, device, limits, streaming);
  if (!limits.late) on_chip.num_late = 0;
  if (!limits.early) on_chip.early_lines = 0;
  if (limits.family != Family::kAuto) return on_chip;
  const bool better = compared_time(on_chip) <= streaming.microseconds || !streaming.error.empty();
  return on_chip.error.empty() && better ? on_chip : streaming;
}

bool operator==(const Request& a, const Request& b) {
  auto fields = [](const Request& r) {
    // A field that is not named here is an error of the compiler's.
    const auto& [g, pass, training, output, sums, reads_x, aligned, far, dense_rows, dense_channels, cumulative] = r;
    const auto& [num_channels, size, walk, unit_stride, dtype] = g;
    return std::tie(num_channels, size[0], size[1], size[2], walk, unit_stride, dtype, pass, training, output, sums,
                    reads_x, aligned, far, dense_rows, dense_channels, cumulative);
  };
  return fields(a) == fields(b);
}

bool operator==(const Limits& a, const Limits& b) {
  auto fields = [](const Limits& l) {
    // A field that is not named here is an error of the compiler's.
    const auto& [family, grid, clusters, persistent, registers, overlap, late, early, threads, batches, fused_splits,
                 share_out, shared_bytes, team, exact_threads, row_bytes] = l;
    return std::tie(family, grid, clusters, persistent, registers, overlap, late, early, threads, batches, fused_splits,
                    share_out, shared_bytes, team, exact_threads, row_bytes);
  };
  return fields(a) == fields(b);
}

bool operator==(const SharedLayout& a, const SharedLayout& b) {
  auto fields = [](const SharedLayout& layout) {
    const auto& [parts, counts, totals, results, inputs, coefficients, bytes] = layout;
    return std::tie(parts, counts, totals, results, inputs, coefficients, bytes);
  };
  return fields(a) == fields(b);
}

bool operator==(const Plan& a, const Plan& b) {
  auto fields = [](const Plan& p) {
    // A field that is not named here is an error of the compiler's.
    const auto& [family, walk, dtype, pass, whole_packs, vec, fold, threads, size, num_items, chunk, num_splits,
                 wide_channels, num_slabs, block_packs, block_rows, slab_channels, run_length, num_blocks, reduce,
                 finish, apply, fused, reads_x, overlaps, finish_threads, finish_shared_bytes, coefficient_offset,
                 workspace_bytes, on_chip, counts_behind, cluster, num_teams, persistent, shares_out, num_steps,
                 held_steps, kept_batches, batches_ahead, early_lines, early_slabs, line_packs, late_from, num_late,
                 late_us, held, layout, tensors_read, tensors_written, tensor_bytes, bytes_moved, microseconds, error] =
        p;
    return std::tie(family, walk, dtype, pass, whole_packs, vec, fold, threads, size[0], size[1], size[2], num_items,
                    chunk, num_splits, wide_channels, num_slabs, block_packs, block_rows, slab_channels, run_length,
                    num_blocks, reduce, finish, apply, fused, reads_x, overlaps, finish_threads, finish_shared_bytes,
                    coefficient_offset, workspace_bytes, on_chip, counts_behind, cluster, num_teams, persistent,
                    shares_out, num_steps, held_steps, kept_batches, batches_ahead, early_lines, early_slabs,
                    line_packs, late_from, num_late, late_us, held, layout, tensors_read, tensors_written, tensor_bytes,
                    bytes_moved, microseconds, error);
  };
  return fields(a) == fields(b);
}

std::string to_string(const Plan& plan) {
  std::string text = family_name(plan.family);
  text += plan.pass == Pass::kForward ? " forward, " : " backward, ";
  text += std::string(walk_name(plan)) + (plan.run_length > 1 ? " of channels of " : " of ");
  text += std::string(dtype_name(plan.dtype)) + " in " + (plan.vec > 1 ? "packs of 16 bytes" : "single elements");
  if (plan.fold > 1) text += ", " + std::to_string(plan.fold) + " rows as one";
  text += ":" + stages_text(plan) + "; moves ";
  const double all = static_cast<double>(plan.bytes_moved), one = static_cast<double>(plan.tensor_bytes);
  text += format(one > 0 ? all / one : 0) + " tensors, " + with_unit(all);
  text += ", workspace " + with_unit(static_cast<double>(plan.workspace_bytes));
  text += plan.error.empty() ? "; predicted " + format(plan.microseconds) + " us" : "; cannot run: " + plan.error;
  return text;
}

const char* walk_name(const Plan& plan) {
  return plan.run_length > 1 ? "runs" : plan.walk == Walk::kPlanes ? "planes" : "rows";
}

const char* family_name(Family family) {
  switch (family) {
    case Family::kAuto:
      return "auto";
    case Family::kStreaming:
      return "streaming";
    case Family::kResident:
      return "resident";
    case Family::kCluster:
      return "cluster";
    case Family::kGrid:
      return "grid";
  }
  return "?";
}

bool parse_family(const std::string& name, Family* family) {
  for (int i = 0; i <= static_cast<int>(kLastFamily); ++i) {
    if (name != family_name(static_cast<Family>(i))) continue;
    *family = static_cast<Family>(i);
    return true;
  }
  return false;
}

}  // namespace bnext::cuda
