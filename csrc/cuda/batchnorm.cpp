// All that the CUDA kernels need of torch: device guard, stream, workspace, device properties, error messages.
#include "batchnorm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <vector>

#include "launch.h"
#include "plan.h"

namespace bnext::cuda {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

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

// For tests and measurements: BNEXT_CUDA_FAMILY names the kernels to use, in place of the best ones.
Limits limits_from_environment() {
  Limits limits;
  const char* name = std::getenv("BNEXT_CUDA_FAMILY");
  if (name == nullptr || *name == '\0') return limits;
  TORCH_CHECK_VALUE(parse_family(name, &limits.family), "BNEXT_CUDA_FAMILY should be auto or streaming, not ", name);
  return limits;
}

template <typename Problem>
void run(const Problem& problem, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const Plan plan = make_plan(make_request(problem), device_info(device), limits_from_environment());
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

std::string explain(const Geometry& geometry, at::Device device) {
  Request request;
  request.geometry = geometry;
  const DeviceInfo& info = device_info(device);
  const Limits limits = limits_from_environment();
  std::string text = to_string(make_plan(request, info, limits));
  request.pass = Pass::kBackward;
  return text + "\n" + to_string(make_plan(request, info, limits));
}

}  // namespace bnext::cuda
