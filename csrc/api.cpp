// Owns what is acceptable and what the caller is told, output allocation, memory format, and the way to a device.
#include "api.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/SymInt.h>

#include <charconv>

#include "cpu/batchnorm.h"
#include "cpu/memory.h"
#ifdef BNEXT_WITH_CUDA
#include <c10/cuda/CUDAFunctions.h>

#include "cuda/batchnorm.h"
#endif
#include "cuda/plan_names.h"
#include "layout.h"

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

// dL/dmean and dL/dvar, and dL/dweight and dL/dbias without a weight.
at::ScalarType gradient_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The saved mean and invstd: what kernels compute in. float64 for every dtype on a CPU, where a float32 mean would lose
// what the kernels won: at mean / std of 10^4 it is wrong by 10^-4 std.
at::ScalarType saved_type(const at::Tensor& input) { return input.is_cpu() ? at::kDouble : gradient_type(input); }

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// ---- checks ----------------------------------------------------------------------------------------------------

void check_input(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() == 4, "expected 4D input (got ", input.dim(), "D input)");
  const at::ScalarType type = input.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      type == at::kDouble || type == at::kFloat || is_half(type),
      "input should have dtype torch.float64, torch.float32, torch.bfloat16 or torch.float16, not ", python_name(type));
}

void check_same_device(const char* name, const at::Tensor& t, const at::Tensor& input) {
  TORCH_CHECK(t.device() == input.device(), name, " should be on the device of input, ", input.device(), ", not on ",
              t.device());
}

void check_channels(const char* name, const at::Tensor& t, const at::Tensor& input) {
  const c10::SymInt channels = input.sym_size(1);
  TORCH_CHECK(t.dim() == 1 || t.sym_numel() != channels, name, " should contain ", channels,
              " elements in one dimension, not a tensor of shape ", t.sym_sizes());
  TORCH_CHECK(t.sym_numel() == channels, name, " should contain ", channels, " elements not ", t.sym_numel());
}

void check_saved(const char* name, const at::Tensor& t, const at::Tensor& input) {
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

// What training writes to must be one number in memory for each channel.
void check_writable(const char* name, const OptionalTensor& tensor) {
  if (!given(tensor)) return;
  TORCH_CHECK(tensor->sym_numel() <= 1 || tensor->sym_stride(0) != 0, name,
              " is updated in training, but several of its elements share one place in memory (an expanded tensor?)");
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

// ---- from tensors to problems ----------------------------------------------------------------------------------

TensorLayout layout_of(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

ChannelVector vector_of(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.data_ptr(), t.dim() == 0 ? 1 : t.stride(0), dtype_of(t)};
}

ChannelVector vector_of(const OptionalTensor& t) { return given(t) ? vector_of(*t) : ChannelVector{}; }

std::array<int64_t, 4> sizes_of(const at::Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }

at::Tensor empty_statistic(const at::Tensor& input) {
  return at::empty({input.size(1)}, input.options().dtype(saved_type(input)));
}

at::Tensor empty_activation(const at::Tensor& input) {
  at::Tensor output = at::empty_like(input, input.suggest_memory_format());
  if (output.is_cpu()) cpu::advise_huge_pages(output.data_ptr(), static_cast<int64_t>(output.nbytes()));
  return output;
}

// grad_output may come in any strides. Where it and input have one walk in common it is read in place; otherwise it is
// copied into the memory format of input, if input itself is dense: one more pass in order beats reading one of the two
// out of order.
at::Tensor match_walk(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& dx) {
  View x, dy, out;
  const TensorLayout x_layout = layout_of(input), out_layout = layout_of(dx.defined() ? dx : input);
  const Geometry together =
      make_geometry(sizes_of(input), dtype_of(input), {x_layout, layout_of(grad_output), out_layout}, {&x, &dy, &out});
  if (together.unit_stride) return grad_output;
  const bool broadcast = together.walk == Walk::kPlanes && dy.stride[kReduceDims - 1] == 0;
  const Geometry alone = make_geometry(sizes_of(input), dtype_of(input), {x_layout, out_layout}, {&x, &out});
  if (broadcast || !alone.unit_stride) return grad_output;
  return grad_output.contiguous(input.suggest_memory_format());
}

void check_device(const at::Tensor& input) {
  TORCH_CHECK(input.is_cpu() || input.is_cuda(), "input should be on a cpu or cuda device, not on ", input.device());
#ifndef BNEXT_WITH_CUDA
  TORCH_CHECK(input.is_cpu(), "input is on ", input.device(), ", but this build of bnext holds CPU kernels only. ",
              "To have CUDA kernels, install a CUDA build of torch and a CUDA toolkit, and rebuild: ",
              "BNEXT_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .");
#endif
}

void run(const at::Tensor& input, const ForwardProblem& problem) {
#ifdef BNEXT_WITH_CUDA
  if (input.is_cuda()) return cuda::forward(problem, input.device());
#endif
  cpu::forward(problem);
}

void run(const at::Tensor& input, const BackwardProblem& problem) {
#ifdef BNEXT_WITH_CUDA
  if (input.is_cuda()) return cuda::backward(problem, input.device());
#endif
  cpu::backward(problem);
}

cuda::DeviceInfo device_named(const std::string& name) {
  std::string known;
  for (const cuda::NamedDevice& device : cuda::named_devices()) {
    if (name == device.name) return device.info;
    known += (known.empty() ? "" : ", ") + std::string(device.name);
  }
  TORCH_CHECK_VALUE(name.compare(0, 4, "cuda") == 0, "device should be cpu, cuda, cuda:N or one of ", known, ", not ",
                    name);
#ifdef BNEXT_WITH_CUDA
  const at::Device device(name);
  const int count = c10::cuda::device_count();
  const int index = device.has_index() ? device.index() : count > 0 ? c10::cuda::current_device() : 0;
  TORCH_CHECK_VALUE(index < count, "device is ", name, ", but there are ", count, " CUDA devices here");
  return cuda::device_info(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index)));
#else
  TORCH_CHECK(false, "device is ", name, ", but this build of bnext holds CPU kernels only and cannot ask it for its ",
              "properties. It can show plans for ", known);
#endif
}

// Kernels write through raw pointers; autograd has to be told.
void mark_written(const OptionalTensor& t) {
  if (given(t) && !t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
}

}  // namespace

void check_forward(const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias,
                   bool training, double eps) {
  check_statistics_arguments(input, running_mean, running_var, training, eps);
  check_parameter("weight", weight, input);
  check_parameter("bias", bias, input);
  if (!training) return;
  check_writable("running_mean", running_mean);
  check_writable("running_var", running_var);
  if (given(num_batches_tracked)) {
    check_same_device("num_batches_tracked", *num_batches_tracked, input);
    TORCH_CHECK(num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->sym_numel() == 1,
                "num_batches_tracked should be one number of dtype torch.int64, not ", num_batches_tracked->sym_numel(),
                " of dtype ", python_name(num_batches_tracked->scalar_type()));
  }
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                    const at::Tensor& save_mean, const at::Tensor& save_invstd) {
  check_input(input);
  check_same_device("grad_output", grad_output, input);
  TORCH_CHECK(grad_output.sym_sizes() == input.sym_sizes(), "grad_output should have the shape of input, ",
              input.sym_sizes(), ", not ", grad_output.sym_sizes());
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output should have dtype ",
              python_name(input.scalar_type()), ", the dtype of input, not ", python_name(grad_output.scalar_type()));
  check_parameter("weight", weight, input);
  check_saved("save_mean", save_mean, input);
  check_saved("save_invstd", save_invstd, input);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batchnorm2d_forward(
    const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias, bool training,
    std::optional<double> momentum, double eps) {
  check_forward(input, running_mean, running_var, num_batches_tracked, weight, bias, training, eps);
  TORCH_CHECK_VALUE(momentum.has_value() || !training || !given(running_mean) || given(num_batches_tracked),
                    "momentum may be None only with num_batches_tracked");
  check_device(input);

  at::Tensor output = empty_activation(input);
  if (input.numel() == 0) {  // no statistics: none are updated
    const auto options = input.options().dtype(saved_type(input));
    return {output, at::zeros({input.size(1)}, options), at::zeros({input.size(1)}, options)};
  }
  at::Tensor mean = empty_statistic(input), invstd = empty_statistic(input);

  ForwardProblem problem;
  problem.geometry =
      make_geometry(sizes_of(input), dtype_of(input), {layout_of(input), layout_of(output)}, {&problem.x, &problem.y});
  problem.weight = vector_of(weight);
  problem.bias = vector_of(bias);
  problem.running_mean = vector_of(running_mean);
  problem.running_var = vector_of(running_var);
  problem.mean = vector_of(mean);
  problem.invstd = vector_of(invstd);
  problem.training = training;
  problem.cumulative = !momentum.has_value();
  problem.momentum = momentum.value_or(0);
  problem.eps = eps;
  if (training && given(num_batches_tracked)) {
    problem.num_batches_tracked = num_batches_tracked->mutable_data_ptr<int64_t>();
  }
  run(input, problem);

  if (training) {
    mark_written(running_mean);
    mark_written(running_var);
    mark_written(num_batches_tracked);
  }
  return {output, mean, invstd};
}

std::tuple<at::Tensor, at::Tensor> batchnorm2d_statistics(const at::Tensor& input, const OptionalTensor& running_mean,
                                                          const OptionalTensor& running_var, bool training,
                                                          double eps) {
  check_statistics_arguments(input, running_mean, running_var, training, eps);
  check_device(input);
  if (input.numel() == 0) {
    const auto options = input.options().dtype(saved_type(input));
    return {at::zeros({input.size(1)}, options), at::zeros({input.size(1)}, options)};
  }
  at::Tensor mean = empty_statistic(input), invstd = empty_statistic(input);
  ForwardProblem problem;
  problem.geometry = make_geometry(sizes_of(input), dtype_of(input), {layout_of(input)}, {&problem.x});
  if (!training) {
    problem.running_mean = vector_of(running_mean);
    problem.running_var = vector_of(running_var);
  }
  problem.mean = vector_of(mean);
  problem.invstd = vector_of(invstd);
  problem.training = training;
  problem.eps = eps;
  run(input, problem);
  return {mean, invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batchnorm2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& save_mean,
    const at::Tensor& save_invstd, bool training, std::array<bool, 5> output_mask) {
  check_backward(grad_output, input, weight, save_mean, save_invstd);
  check_device(input);

  const auto statistics = input.options().dtype(gradient_type(input));
  const auto parameters = given(weight) ? weight->options() : statistics;
  at::Tensor dx, dweight, dbias, dmean, dvar;
  auto allocate = [&](at::Tensor& t, bool wanted, const at::TensorOptions& options) {
    if (wanted) t = input.numel() == 0 ? at::zeros({input.size(1)}, options) : at::empty({input.size(1)}, options);
  };
  if (output_mask[0]) dx = empty_activation(input);
  allocate(dweight, output_mask[1], parameters);
  allocate(dbias, output_mask[2], parameters);
  allocate(dmean, output_mask[3], statistics);
  allocate(dvar, output_mask[4], statistics);
  if (input.numel() == 0) return {dx, dweight, dbias, dmean, dvar};

  const at::Tensor dy = match_walk(grad_output, input, dx);
  BackwardProblem problem;
  problem.geometry = make_geometry(sizes_of(input), dtype_of(input),
                                   {layout_of(input), layout_of(dy), layout_of(dx.defined() ? dx : input)},
                                   {&problem.x, &problem.dy, &problem.dx});
  if (!dx.defined()) problem.dx.data = nullptr;
  problem.weight = vector_of(weight);
  problem.mean = vector_of(save_mean);
  problem.invstd = vector_of(save_invstd);
  problem.dweight = vector_of(dweight);
  problem.dbias = vector_of(dbias);
  problem.dmean = vector_of(dmean);
  problem.dvar = vector_of(dvar);
  problem.training = training;
  run(input, problem);
  return {dx, dweight, dbias, dmean, dvar};
}

std::string explain_cpu(const at::Tensor& input) {
  check_input(input);
  View x;
  return cpu::explain(make_geometry(sizes_of(input), dtype_of(input), {layout_of(input)}, {&x}));
}

std::vector<std::pair<std::string, double>> cuda_device(const std::string& name) {
  return cuda::device_fields(device_named(name));
}

std::vector<PlanReport> cuda_plans(const at::Tensor& input, const std::string& device, const std::string& family,
                                   bool training) {
  check_input(input);
  const cuda::DeviceInfo info = device_named(device);
  cuda::Limits limits;
  limits.family = family.empty() ? cuda::forced_family() : cuda::family_named(family, "family");

  // Nothing is read or written: of the addresses only the alignment counts, and outputs are aligned.
  const at::Tensor output = at::empty_like(input, input.options().device(at::kMeta), input.suggest_memory_format());
  TensorLayout x = layout_of(input), y = layout_of(output);
  constexpr uintptr_t kAligned = 256;
  x.data = reinterpret_cast<void*>(kAligned + reinterpret_cast<uintptr_t>(x.data) % kAligned);
  y.data = reinterpret_cast<void*>(kAligned);

  ForwardProblem forward;
  forward.geometry = make_geometry(sizes_of(input), dtype_of(input), {x, y}, {&forward.x, &forward.y});
  forward.training = training;
  BackwardProblem backward;
  backward.geometry =
      make_geometry(sizes_of(input), dtype_of(input), {x, y, y}, {&backward.x, &backward.dy, &backward.dx});
  backward.training = training;
  backward.dweight.data = backward.dbias.data = y.data;

  const int64_t tensor_bytes = input.numel() * static_cast<int64_t>(input.element_size());
  std::vector<PlanReport> reports;
  for (const cuda::Request& request : {cuda::make_request(forward), cuda::make_request(backward)}) {
    const cuda::Plan plan = cuda::make_plan(request, info, limits);
    const bool is_forward = request.pass == cuda::Pass::kForward;
    reports.push_back({is_forward ? "forward" : "backward", cuda::family_name(plan.family), cuda::to_string(plan),
                       plan.error, plan.bytes_moved, (is_forward ? 2 : 3) * tensor_bytes});
  }
  return reports;
}

}  // namespace bnext
