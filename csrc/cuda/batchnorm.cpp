// All that the CUDA kernels need of torch: device guard, stream, workspace, device properties, error messages.
#include "batchnorm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "launch.h"
#include "plan_names.h"

namespace bnext::cuda {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

}  // namespace

// Asked for once. (torch has device properties at hand, too, but its header needs all of the CUDA libraries' headers.)
const DeviceInfo& device_info(at::Device device) {
  static const std::vector<DeviceInfo> infos = [] {
    std::vector<DeviceInfo> all(c10::cuda::device_count());
    for (int i = 0; i < static_cast<int>(all.size()); ++i) {
      all[i].arch =
          10 * attribute(cudaDevAttrComputeCapabilityMajor, i) + attribute(cudaDevAttrComputeCapabilityMinor, i);
      all[i].num_sms = attribute(cudaDevAttrMultiProcessorCount, i);
      all[i].threads_per_sm = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, i);
      all[i].shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlock, i);
      all[i].l2_bytes = attribute(cudaDevAttrL2CacheSize, i);
    }
    return all;
  }();
  return infos.at(device.index());
}

namespace {

template <typename Problem>
void run(const Problem& problem, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  Limits limits;
  limits.family = forced_family();
  const Plan plan = make_plan(make_request(problem), device_info(device), limits);
  TORCH_CHECK(plan.error.empty(), "bnext has no way to run this on ", device, ": ", to_string(plan));
  // Back to the allocator when this returns, which is safe: it hands memory on in the order of the stream.
  const at::Tensor workspace = at::empty({plan.workspace_bytes}, at::TensorOptions().device(device).dtype(at::kByte));
  const cudaError_t error =
      launch(problem, plan, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream(device.index()));
  TORCH_CHECK(error == cudaSuccess, "bnext could not launch its kernels on ", device, ": ", cudaGetErrorString(error),
              "; the plan was: ", to_string(plan));
}

}  // namespace

void forward(const ForwardProblem& problem, at::Device device) { run(problem, device); }

void backward(const BackwardProblem& problem, at::Device device) { run(problem, device); }

}  // namespace bnext::cuda
