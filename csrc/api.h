// The functions that Python sees, on tensors. Checks, allocation and the choice of walk and device are in api.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace bnext {

using OptionalTensor = std::optional<at::Tensor>;

// Raise what the caller should see if the arguments are unacceptable, and do nothing else. They read sizes as SymInts,
// so the fake kernels of bnext/_ops.py call them too.
void check_forward(const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias,
                   bool training, double eps);
void check_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                    const at::Tensor& save_mean, const at::Tensor& save_invstd);

// Returns (output, mean, invstd); updates the running statistics and num_batches_tracked in training.
// momentum nullopt: the cumulative average, 1 / num_batches_tracked.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batchnorm2d_forward(
    const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias, bool training,
    std::optional<double> momentum, double eps);

// Returns (mean, invstd) of the batch (training) or of the running statistics.
std::tuple<at::Tensor, at::Tensor> batchnorm2d_statistics(const at::Tensor& input, const OptionalTensor& running_mean,
                                                          const OptionalTensor& running_var, bool training, double eps);

// Returns (dx, dweight, dbias, dmean, dvar); undefined where output_mask is false.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batchnorm2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& save_mean,
    const at::Tensor& save_invstd, bool training, std::array<bool, 5> output_mask);

// Which CPU kernels input gets, in words.
std::string explain_cpu(const at::Tensor& input);

// One pass with every output, by one family of CUDA kernels.
struct PlanReport {
  std::string pass, family, text;
  std::string error;  // why it cannot run; empty if it can
  int64_t bytes_moved = 0, bytes_min = 0;
};

// What plans for a device of this name depend on. The names are those of cuda_plans.
std::vector<std::pair<std::string, double>> cuda_device(const std::string& name);

// The plans of forward and backward for tensors like input (it may be a meta tensor) on a device of a kind that has a
// name ("h200"), in any build, or that is there ("cuda:0"), in a CUDA build. family: empty for what a call would take.
std::vector<PlanReport> cuda_plans(const at::Tensor& input, const std::string& device, const std::string& family,
                                   bool training);

}  // namespace bnext
