#include "checks.h"

#include <c10/core/SymInt.h>

#include <charconv>

namespace bnext {
namespace {

const char* python_name(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return "torch.float64";
    case at::kFloat:
      return "torch.float32";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kHalf:
      return "torch.float16";
    case at::kBool:
      return "torch.bool";
    case at::kByte:
      return "torch.uint8";
    case at::kChar:
      return "torch.int8";
    case at::kShort:
      return "torch.int16";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    case at::kComplexHalf:
      return "torch.complex32";
    case at::kComplexFloat:
      return "torch.complex64";
    case at::kComplexDouble:
      return "torch.complex128";
    default:
      return c10::toString(type);
  }
}

// As Python would write it: 0.0, 1e-05, nan.
std::string python_repr(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  std::string repr(text, end);
  if (repr.find_first_not_of("-0123456789") == std::string::npos) repr += ".0";
  return repr;
}

bool is_half(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

void check_same_device(const char* name, const at::Tensor& t, const at::Tensor& input) {
  TORCH_CHECK(t.device() == input.device(), name, " should be on the device of input, ", input.device(), ", not on ",
              t.device());
}

void check_activation(const char* name, const at::Tensor& t, const at::Tensor& input) {
  check_same_device(name, t, input);
  TORCH_CHECK(t.sym_sizes() == input.sym_sizes(), name, " should have the shape of input, ", input.sym_sizes(),
              ", not ", t.sym_sizes());
  TORCH_CHECK(t.scalar_type() == input.scalar_type(), name, " should have dtype ", python_name(input.scalar_type()),
              ", the dtype of input, not ", python_name(t.scalar_type()));
}

void check_channels(const char* name, const at::Tensor& t, const at::Tensor& input) {
  const c10::SymInt channels = input.sym_size(1);
  TORCH_CHECK(t.dim() == 1 || t.sym_numel() != channels, name, " should contain ", channels,
              " elements in one dimension, not a tensor of shape ", t.sym_sizes());
  TORCH_CHECK(t.sym_numel() == channels, name, " should contain ", channels, " elements not ", t.sym_numel());
}

// A number per channel that may be wider than the input.
void check_statistic(const char* name, const at::Tensor& t, const at::Tensor& input) {
  check_same_device(name, t, input);
  const at::ScalarType type = t.scalar_type();
  TORCH_CHECK(type == at::kDouble || type == at::kFloat || type == input.scalar_type(), name,
              " should have dtype torch.float64 or torch.float32, not ", python_name(type));
  check_channels(name, t, input);
}

void check_parameter(const char* name, const OptionalTensor& tensor, const at::Tensor& input) {
  if (!given(tensor)) return;
  const at::Tensor& t = *tensor;
  check_same_device(name, t, input);
  const at::ScalarType type = t.scalar_type(), input_type = input.scalar_type();
  const bool half = is_half(input_type);
  TORCH_CHECK(type == input_type || (half && type == at::kFloat), name, " should have dtype ", python_name(input_type),
              half ? ", the dtype of input, or torch.float32, not " : ", the dtype of input, not ", python_name(type));
  check_channels(name, t, input);
}

void check_not_expanded(const char* name, const at::Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    TORCH_CHECK(t.sym_size(d) <= 1 || t.sym_stride(d) != 0, name,
                " is updated in training, but several of its elements share one place in memory (an expanded tensor?)");
  }
}

}  // namespace

void check_input(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() == 4, "expected 4D input (got ", input.dim(), "D input)");
  const at::ScalarType type = input.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      type == at::kDouble || type == at::kFloat || is_half(type),
      "input should have dtype torch.float64, torch.float32, torch.bfloat16 or torch.float16, not ", python_name(type));
}

void check_statistics_arguments(const at::Tensor& input, const OptionalTensor& running_mean,
                                const OptionalTensor& running_var, bool training, double eps) {
  check_input(input);
  TORCH_CHECK_VALUE(given(running_mean) == given(running_var),
                    "running_mean and running_var must either both be None or neither be None");
  TORCH_CHECK(training || given(running_mean), "running_mean must be defined in evaluation mode");
  if (training) {
    TORCH_CHECK_VALUE(input.sym_size(0) * input.sym_size(2) * input.sym_size(3) != 1,
                      "Expected more than 1 value per channel when training, got input size torch.Size(",
                      input.sym_sizes(), ")");
    TORCH_CHECK_VALUE(eps > 0, "batch_norm eps must be positive during training, but got ", python_repr(eps));
  } else {
    TORCH_CHECK_VALUE(eps >= 0, "batch_norm eps must be non-negative, but got ", python_repr(eps));
  }
  check_parameter("running_mean", running_mean, input);
  check_parameter("running_var", running_var, input);
}

void check_forward(const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias,
                   bool training, std::optional<double> momentum, double eps) {
  check_statistics_arguments(input, running_mean, running_var, training, eps);
  check_parameter("weight", weight, input);
  check_parameter("bias", bias, input);
  if (!training) return;
  TORCH_CHECK_VALUE(momentum.has_value() || !given(running_mean) || given(num_batches_tracked),
                    "momentum may be None only with num_batches_tracked");
  if (given(running_mean)) {
    check_not_expanded("running_mean", *running_mean);
    check_not_expanded("running_var", *running_var);
  }
  if (given(num_batches_tracked)) {
    check_same_device("num_batches_tracked", *num_batches_tracked, input);
    const auto dtype = num_batches_tracked->scalar_type();
    TORCH_CHECK(
        (at::isIntegralType(dtype, false) || at::isFloatingType(dtype)) && num_batches_tracked->sym_numel() == 1,
        "num_batches_tracked should be one number of an integer or floating dtype, not ",
        num_batches_tracked->sym_numel(), " of dtype ", python_name(dtype));
  }
}

void check_updated(const char* name, const at::Tensor& t) {
  check_not_expanded(name, t);
  check_not_inference(name, t);
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                    const at::Tensor& save_mean, const at::Tensor& save_invstd, const OptionalTensor& grad_mean,
                    const OptionalTensor& grad_var) {
  check_input(input);
  check_activation("grad_output", grad_output, input);
  check_parameter("weight", weight, input);
  check_statistic("save_mean", save_mean, input);
  check_statistic("save_invstd", save_invstd, input);
  if (given(grad_mean)) check_statistic("grad_mean", *grad_mean, input);
  if (given(grad_var)) check_statistic("grad_var", *grad_var, input);
}

void check_out(const at::Tensor& out, const at::Tensor& input) { check_activation("out", out, input); }

}  // namespace bnext
