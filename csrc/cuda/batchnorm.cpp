// All that the CUDA kernels need of torch: device guard, stream, workspace, device properties, error messages.
#include "batchnorm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <mutex>
#include <vector>

#include "launch.h"
#include "plan_cache.h"
#include "plan_names.h"
#include "plan_on_chip.h"

namespace bnext::cuda {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// (torch has device properties at hand, too, but its header needs all of the CUDA libraries' headers.)
DeviceInfo ask_device(int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  auto ask = [&](cudaDeviceAttr name) { return attribute(name, device); };
  DeviceInfo info;
  info.arch = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  info.num_sms = ask(cudaDevAttrMultiProcessorCount);
  info.threads_per_sm = ask(cudaDevAttrMaxThreadsPerMultiProcessor);
  info.registers_per_sm = ask(cudaDevAttrMaxRegistersPerMultiprocessor);
  info.shared_bytes_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlock);
  info.shared_bytes_opt_in = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  info.shared_bytes_per_sm = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  info.l2_bytes = ask(cudaDevAttrL2CacheSize);
  // kHz and bits, two transfers in each clock. A driver that does not tell leaves the default.
  const double gb_per_s = 2e-6 / 8 * ask(cudaDevAttrMemoryClockRate) * ask(cudaDevAttrGlobalMemoryBusWidth);
  if (gb_per_s > 0) info.memory_gb_per_s = gb_per_s;
  for (int i = 0; i < kNumClusterSizes; ++i) {
    info.active_clusters[i] = ask_active_clusters(kClusterSizes[i], info.shared_bytes_opt_in);
  }
  info.cooperative = ask(cudaDevAttrCooperativeLaunch) != 0;
  for (int blocks = 1; blocks <= kGridBlocksPerSm; ++blocks) {
    info.cooperative = info.cooperative && ask_active_blocks(blocks, grid_shared_bytes(info, blocks)) >= blocks;
  }
  // Graphs hold such kernels since CUDA 12.3.
  int driver = 0;
  C10_CUDA_CHECK(cudaDriverGetVersion(&driver));
  info.overlaps = can_overlap() && driver >= 12030;
  return info;
}

}  // namespace

// Each device is asked once, and only when it is used: to count clusters takes memory on it.
const DeviceInfo& device_info(at::Device device) {
  struct Answer {
    std::once_flag asked;
    DeviceInfo info;
  };
  static std::vector<Answer> answers(c10::cuda::device_count());
  Answer& answer = answers.at(device.index());
  std::call_once(answer.asked, [&] { answer.info = ask_device(device.index()); });
  return answer.info;
}

namespace {

// What kAuto goes without, when a launch is refused because the stream has only a part of the device, as in a green
// context: there not all of a grid runs at once, or not all of a cluster.
bool go_without(cudaError_t refused, const Plan& plan, Limits& limits) {
  const bool grid = plan.family == Family::kGrid && refused == cudaErrorCooperativeLaunchTooLarge;
  const bool cluster = plan.family == Family::kCluster &&
                       (refused == cudaErrorInvalidClusterSize || refused == cudaErrorLaunchOutOfResources);
  if (limits.family != Family::kAuto || !(grid || cluster)) return false;
  (grid ? limits.grid : limits.clusters) = false;
  return true;
}

template <typename Problem>
void run(const Problem& problem, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  // A first call asks the device, loads kernels and sets their attributes. While a thread captures a graph, CUDA
  // refuses such calls unless told that they are meant: none of them is work for a stream, so none is missing in the
  // graph.
  const c10::cuda::CUDAStreamCaptureModeGuard first_call_may_be_captured(cudaStreamCaptureModeRelaxed);
  Limits limits = limits_of_environment();
  for (;;) {
    const Plan& plan = cached_plan(make_request(problem), device.index(), device_info(device), limits);
    TORCH_CHECK(plan.error.empty(), "bnext has no way to run this on ", device, ": ", to_string(plan));
    // Back to the allocator when this returns, which is safe: it hands memory on in the order of the stream.
    const at::Tensor workspace = at::empty({plan.workspace_bytes}, at::TensorOptions().device(device).dtype(at::kByte));
    const cudaError_t error =
        launch(problem, plan, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream(device.index()));
    if (go_without(error, plan, limits)) continue;
    TORCH_CHECK(error == cudaSuccess, "bnext could not launch its kernels on ", device, ": ", cudaGetErrorString(error),
                "; the plan was: ", to_string(plan));
    return;
  }
}

}  // namespace

void forward(const ForwardProblem& problem, at::Device device) { run(problem, device); }

void backward(const BackwardProblem& problem, at::Device device) { run(problem, device); }

}  // namespace bnext::cuda
