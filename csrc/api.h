// The functions that Python sees, on tensors. Allocation and the choice of walk and device are in api.cpp, checks in
// checks.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"

namespace bnext {

// One result for each field of BatchNorm2dGradients; undefined where it was not asked for.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Returns (output, save_mean, save_invstd); updates the running statistics and num_batches_tracked in training.
// momentum nullopt: the cumulative average, 1 / num_batches_tracked. skip_nonfinite: a channel keeps its running
// statistics where the new ones would not be finite numbers of their dtype.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batchnorm2d_forward(
    const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias, bool training,
    std::optional<double> momentum, double eps, bool skip_nonfinite);

// And (..., mean, var), the statistics that were used, for the caller. An operator of its own, because results that may
// be missing do not go through AOTInductor.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batchnorm2d_forward_with_stats(
    const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias, bool training,
    std::optional<double> momentum, double eps, bool skip_nonfinite);

// batchnorm2d_forward in evaluation mode. An operator of its own, because the others say that they write to the running
// statistics: compilers would have it that they do.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batchnorm2d_eval(const at::Tensor& input,
                                                                const OptionalTensor& running_mean,
                                                                const OptionalTensor& running_var,
                                                                const OptionalTensor& weight,
                                                                const OptionalTensor& bias, double eps);

// The dtype of statistics and of their derivatives.
at::ScalarType gradient_type(const at::Tensor& input);

// Returns (mean, invstd) of the batch (training) or of the running statistics.
std::tuple<at::Tensor, at::Tensor> batchnorm2d_statistics(const at::Tensor& input, const OptionalTensor& running_mean,
                                                          const OptionalTensor& running_var, bool training, double eps);

// Returns (dx, dweight, dbias, dmean, dvar); undefined where output_mask is false. grad_mean and grad_var are what the
// loss says about the batch's mean and variance themselves; nullopt: nothing.
Gradients batchnorm2d_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                               const at::Tensor& save_mean, const at::Tensor& save_invstd, bool training,
                               std::array<bool, 5> output_mask, const OptionalTensor& grad_mean,
                               const OptionalTensor& grad_var);

// The same with dx written to `out`, which may be grad_output itself. Returns (dweight, dbias, dmean, dvar).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batchnorm2d_backward_out(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& save_mean,
    const at::Tensor& save_invstd, bool training, const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
    at::Tensor out);

// Which CPU kernels input gets, in words.
std::string explain_cpu(const at::Tensor& input);

// One pass with every output, by one family of CUDA kernels.
struct PlanReport {
  std::string pass, family, walk;
  bool persistent = false;  // blocks go on to further slabs
  std::string text;
  std::string error;  // why it cannot run; empty if it can
  int64_t team = 0;   // blocks that share a channel or a slab
  int64_t bytes_moved = 0, bytes_min = 0;
  double microseconds = 0, microseconds_min = 0;  // predicted, of the plan and of one kernel that moves bytes_min
  double microseconds_compared = 0;               // by which plans are chosen: more for those that hold the device
};

// What plans for a device of this name depend on. The names are those of cuda_plans.
std::vector<std::pair<std::string, double>> cuda_device(const std::string& name);

// What the model by which it compares plans has as its constants.
std::map<std::string, double> cuda_costs(const std::string& name);

// The plans of forward and backward for tensors like input (it may be a meta tensor) on a device of a kind that has a
// name ("h200"), in any build, or that is there ("cuda:0"), in a CUDA build. family: empty for what a call would take.
// costs: other constants of the model, to see what it would choose and predict.
std::vector<PlanReport> cuda_plans(const at::Tensor& input, const std::string& device, const std::string& family,
                                   bool training, const std::map<std::string, double>& costs = {});

}  // namespace bnext
