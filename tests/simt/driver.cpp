// What tests call through ctypes: one batch-norm pass on the shim, from a plain description of its tensors. The structs
// are mirrored in library.py.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/plan_steps.h"
#include "layout.h"
#include "runtime.h"
#include "simt.h"

namespace {

using namespace bnext;

struct Tensor {
  void* data;
  int64_t stride[4];
  void* storage;  // all memory that a kernel may touch for this tensor
  int64_t storage_bytes;
};

struct Vector {
  void* data;
  int64_t stride;
  int64_t dtype;
};

struct Call {
  int64_t size[4];
  int64_t dtype, backward, training, cumulative;
  double momentum, eps, running_limit;
  Tensor x, dy, out;
  Vector weight, bias, mean, invstd, running_mean, running_var, dweight, dbias, dmean, dvar;
  Vector stats_mean, stats_var, grad_mean, grad_var;
  int64_t* num_batches_tracked;
  // the device, and limits of the plan
  int64_t num_sms, threads_per_sm, threads, batches, fused_splits, family, team, persistent_limit, registers_limit,
      share_out, shared_bytes;
  int64_t seed, refused_launch;
  char skipped_barriers[128];
  // results. illegal: there is no such plan, and nothing ran
  int64_t illegal, bytes_loaded, bytes_stored, planned_bytes, fused, vec, num_splits, run_length, slab_channels, slices;
  int64_t num_asked, num_asked_late, num_asked_in_vain, planned_asked;
  int64_t bytes_kept, bytes_stored_meanwhile, late_threads, least_late_clocks, most_late_clocks, first_late_block;
  int64_t planned_late_threads, planned_late_from, persistent, kept_batches, batches_ahead, threads_run;
  int64_t instructions, most_instructions;  // of PTX
  double held, late_us;
  char plan[512], error[256];
};

ChannelVector channel_vector(const Vector& v) { return {v.data, v.stride, static_cast<DType>(v.dtype)}; }

TensorLayout layout(const Tensor& t) { return {t.data, {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}}; }

// Workspace as an allocator would give it: aligned, full of old data, and with something behind it. The data are NaN,
// or where there may be letters the stamps of a block's first turns.
class Workspace {
 public:
  Workspace(int64_t bytes, bool letters)
      : bytes_(bytes), data_(new (std::align_val_t{256}) unsigned char[bytes + kGuard]) {
    std::memset(data_, 0xff, bytes + kGuard);
    for (uint32_t i = 0; letters && i < bytes / sizeof i; ++i) {
      const uint32_t stamp = i / 4 * 2654435761u >> 31 ? 1 : 2;  // the same in all parts of a word
      std::memcpy(data_ + i * sizeof i, &stamp, sizeof stamp);
    }
  }
  ~Workspace() { operator delete[](data_, std::align_val_t{256}); }
  void* data() { return data_; }
  bool overrun() const {
    for (int64_t i = bytes_; i < bytes_ + kGuard; ++i) {
      if (data_[i] != 0xff) return true;
    }
    return false;
  }

 private:
  static constexpr int64_t kGuard = 4096;
  int64_t bytes_;
  unsigned char* data_;
};

template <typename Problem>
void run(Call& call, const Problem& problem) {
  cuda::DeviceInfo device;
  device.num_sms = static_cast<int>(call.num_sms);
  device.threads_per_sm = static_cast<int>(call.threads_per_sm);
  device.arch = cuda::compiled_arch<nullptr>();  // the same for all kernels
  // Before sm_90, neither.
  device.overlaps = cuda::can_overlap();
  for (int i = 0; i < cuda::kNumClusterSizes; ++i) {
    device.active_clusters[i] = device.overlaps ? std::max(1, device.num_sms / cuda::kClusterSizes[i]) : 0;
  }
  device.memory_gb_per_s = 4.0 * device.num_sms;  // slow: what plans cost is bytes, on tensors as small as tests'
  cuda::Limits limits;
  limits.threads = static_cast<int>(call.threads);
  limits.batches = static_cast<int>(call.batches);
  limits.fused_splits = static_cast<int>(call.fused_splits);
  limits.family = static_cast<cuda::Family>(call.family);
  limits.team = static_cast<int>(call.team);
  limits.persistent = static_cast<cuda::Choice>(call.persistent_limit);
  limits.registers = static_cast<cuda::Choice>(call.registers_limit);
  limits.share_out = call.share_out != 0;
  limits.shared_bytes = call.shared_bytes;
  const cuda::Plan plan = cuda::make_plan(cuda::make_request(problem), device, limits);
  std::snprintf(call.plan, sizeof call.plan, "%s", cuda::to_string(plan).c_str());

  call.illegal = !plan.error.empty();
  if (call.illegal != 0) return;
  simt::begin({static_cast<uint64_t>(call.seed), call.skipped_barriers, static_cast<int>(call.refused_launch)});
  for (const Tensor* t : {&call.x, &call.dy}) {
    if (t->data != nullptr) simt::allow_load(t->storage, t->storage_bytes);
  }
  if (call.out.data != nullptr) simt::allow_store(call.out.storage, call.out.storage_bytes);
  for (const Vector* v = &call.weight; v <= &call.grad_var; ++v) {
    if (v->data == nullptr) continue;
    simt::allow_any(v->data, ((call.size[1] - 1) * v->stride + 1) * dtype_bytes(static_cast<DType>(v->dtype)));
  }
  if (call.num_batches_tracked != nullptr) simt::allow_any(call.num_batches_tracked, sizeof(int64_t));
  Workspace workspace(plan.workspace_bytes, plan.family == cuda::Family::kGrid);
  simt::allow_any(workspace.data(), plan.workspace_bytes, true);
  const cudaError_t error = cuda::launch(problem, plan, workspace.data(), nullptr);
  const char* message = workspace.overrun() ? "a kernel wrote beyond the workspace" : simt::error().c_str();
  if (error != cudaSuccess && *message == '\0') message = "launch returned an error";
  std::snprintf(call.error, sizeof call.error, "%s", message);
  call.bytes_loaded = simt::bytes_loaded();
  call.bytes_stored = simt::bytes_stored();
  call.bytes_kept = simt::bytes_kept();
  call.bytes_stored_meanwhile = simt::bytes_stored_meanwhile();
  call.num_asked = simt::num_asked();
  call.num_asked_late = simt::num_asked_late();
  call.num_asked_in_vain = simt::num_asked_in_vain();
  const int64_t further = plan.num_slabs - plan.early_slabs;
  call.planned_asked = plan.early_lines * plan.tensors_read * plan.num_splits * further;
  const simt::Late late = simt::late();
  call.late_threads = late.threads;
  call.least_late_clocks = late.least_clocks;
  call.most_late_clocks = late.most_clocks;
  call.first_late_block = late.first_block;
  call.planned_late_threads = plan.num_late * plan.threads;
  call.planned_late_from = plan.late_from;
  call.persistent = plan.persistent;
  call.kept_batches = plan.kept_batches;
  call.batches_ahead = plan.batches_ahead;
  call.threads_run = plan.num_blocks * plan.threads;
  call.instructions = simt::instructions().all;
  call.most_instructions = simt::instructions().most;
  call.late_us = plan.late_us;
  call.planned_bytes = plan.bytes_moved;
  call.fused = plan.fused;
  call.vec = plan.vec;
  call.num_splits = plan.num_splits;
  call.run_length = plan.run_length;
  call.slices = slices_of(plan);
  call.slab_channels = plan.slab_channels;
  call.held = plan.held;
}

}  // namespace

extern "C" {

// The number of the file, or 0 and what is wrong with it.
int64_t simt_load_ptx(const char* path, char* error, int64_t error_bytes) {
  try {
    return simt::load_ptx(path);
  } catch (const std::exception& what) {
    std::snprintf(error, error_bytes, "%s", what.what());
    return 0;
  }
}

void simt_forget_ptx(int64_t number) { simt::forget_ptx(static_cast<int>(number)); }

void simt_use_ptx(int64_t number) { simt::use_ptx(static_cast<int>(number)); }

const char* simt_operations_run() {
  static std::string text;
  text = simt::ptx_operations_run();
  return text.c_str();
}

const char* simt_kernels_run() {
  static std::string names;
  names = simt::ptx_kernels_run();
  return names.c_str();
}

void simt_watch_banks(int64_t on) { simt::watch_banks(on != 0); }

void simt_bank_use(int64_t* cycles, int64_t* least) {
  const simt::BankUse use = simt::bank_use();
  *cycles = use.cycles;
  *least = use.least;
}

// Of a warp whose lanes ask for so many bytes, `step` apart.
void simt_bank_use_of_lanes(int64_t step, int64_t bytes, int64_t* cycles, int64_t* least) {
  std::vector<simt::BankAccess> lanes;
  for (int lane = 0; lane < 32; ++lane) {
    lanes.push_back({lane, static_cast<uint64_t>(lane * step), static_cast<int>(bytes)});
  }
  const simt::BankUse use = simt::bank_use(lanes);
  *cycles = use.cycles;
  *least = use.least;
}

// What the kernels were compiled for; the sources take every way.
int64_t simt_arch() { return cuda::compiled_arch<nullptr>(); }  // the same for all kernels

int64_t simt_call_bytes() { return sizeof(Call); }

void simt_run(Call* call) {
  const std::array<int64_t, 4> size = {call->size[0], call->size[1], call->size[2], call->size[3]};
  const DType dtype = static_cast<DType>(call->dtype);
  if (call->backward == 0) {
    ForwardProblem p;
    const Tensor& y = call->out.data != nullptr ? call->out : call->x;
    p.geometry = make_geometry(size, dtype, {layout(call->x), layout(y)}, {&p.x, &p.y});
    if (call->out.data == nullptr) p.y.data = nullptr;
    p.weight = channel_vector(call->weight);
    p.bias = channel_vector(call->bias);
    p.running_mean = channel_vector(call->running_mean);
    p.running_var = channel_vector(call->running_var);
    p.mean = channel_vector(call->mean);
    p.invstd = channel_vector(call->invstd);
    p.stats_mean = channel_vector(call->stats_mean);
    p.stats_var = channel_vector(call->stats_var);
    p.num_batches_tracked = call->num_batches_tracked;
    p.training = call->training != 0;
    p.cumulative = call->cumulative != 0;
    p.momentum = call->momentum;
    p.eps = call->eps;
    p.running_limit = call->running_limit;
    run(*call, p);
    return;
  }
  BackwardProblem p;
  const Tensor& dx = call->out.data != nullptr ? call->out : call->x;
  p.geometry = make_geometry(size, dtype, {layout(call->x), layout(call->dy), layout(dx)}, {&p.x, &p.dy, &p.dx});
  if (call->out.data == nullptr) p.dx.data = nullptr;
  p.weight = channel_vector(call->weight);
  p.mean = channel_vector(call->mean);
  p.invstd = channel_vector(call->invstd);
  p.grad_mean = channel_vector(call->grad_mean);
  p.grad_var = channel_vector(call->grad_var);
  p.dweight = channel_vector(call->dweight);
  p.dbias = channel_vector(call->dbias);
  p.dmean = channel_vector(call->dmean);
  p.dvar = channel_vector(call->dvar);
  p.training = call->training != 0;
  run(*call, p);
}

// For the CUDA runtime of runtime.cpp, which knows kernels by name.
const char* simt_run_kernel(const simt::KernelLaunch* launch) {
  static std::string error;
  Dl_info own = {};
  dladdr(reinterpret_cast<const void*>(&simt_run_kernel), &own);
  void* library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  const auto kernel = reinterpret_cast<void (*)(cuda::KernelArgs)>(dlsym(library, launch->name));
  dlclose(library);
  if (kernel == nullptr) {
    error = std::string("there is no kernel ") + launch->name;
    return error.c_str();
  }
  simt::begin({launch->seed, "", 0});
  for (size_t i = 0; i < launch->num_memory; ++i) {
    simt::allow_load(launch->memory[i].data, launch->memory[i].bytes);
    simt::allow_store(launch->memory[i].data, launch->memory[i].bytes);
  }
  simt::launch(kernel, launch->blocks, launch->threads, launch->cluster, launch->cooperative, launch->shared_bytes,
               launch->overlaps, nullptr, *static_cast<const cuda::KernelArgs*>(launch->args));
  error = simt::error();
  return error.c_str();
}

int64_t simt_num_barriers() { return static_cast<int64_t>(simt::barriers().size()); }

const char* simt_barrier(int64_t i) { return simt::barriers()[i].c_str(); }

}  // extern "C"
