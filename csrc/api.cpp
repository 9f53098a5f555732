// Owns output allocation, memory format, and the way to a device.
#include "api.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/_to_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "cpu/batchnorm.h"
#ifdef BNEXT_WITH_CUDA
#include <c10/cuda/CUDAFunctions.h>

#include "cuda/batchnorm.h"
#endif
#include "cuda/plan_cost.h"
#include "cuda/plan_names.h"
#include "layout.h"
#include "output_memory.h"

namespace bnext {

at::ScalarType gradient_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

namespace {

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

// ---- from tensors to problems ----------------------------------------------------------------------------------

// What is read keeps sharing its memory with the tensor that it was lazily cloned from; the plain structs know no
// const.
void* read_address(const at::Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

TensorLayout layout_at(void* address, const at::Tensor& t) {
  return {address, {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

TensorLayout read_layout(const at::Tensor& t) { return layout_at(read_address(t), t); }

TensorLayout written_layout(const at::Tensor& t) { return layout_at(t.mutable_data_ptr(), t); }

double largest(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return std::numeric_limits<double>::max();
    case DType::kFloat32:
      return std::numeric_limits<float>::max();
    case DType::kBFloat16:
      return std::numeric_limits<c10::BFloat16>::max();
    case DType::kFloat16:
      return std::numeric_limits<c10::Half>::max();
  }
  return 0;
}

ChannelVector vector_at(void* address, const at::Tensor& t) { return {address, t.stride(0), dtype_of(t)}; }

ChannelVector read_vector(const at::Tensor& t) { return vector_at(read_address(t), t); }

ChannelVector read_vector(const OptionalTensor& t) { return given(t) ? read_vector(*t) : ChannelVector{}; }

ChannelVector written_vector(const at::Tensor& t) {
  return t.defined() ? vector_at(t.mutable_data_ptr(), t) : ChannelVector{};
}

ChannelVector written_vector(const OptionalTensor& t) { return given(t) ? written_vector(*t) : ChannelVector{}; }

std::array<int64_t, 4> sizes_of(const at::Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }

at::Tensor empty_statistic(const at::Tensor& input) {
  return at::empty({input.size(1)}, input.options().dtype(saved_type(input)));
}

// What torch suggests; channels_last also where dimensions of size 1 have other strides than torch would give them.
at::MemoryFormat format_of(const at::Tensor& t) {
  if (!t.is_contiguous() && t.is_contiguous(at::MemoryFormat::ChannelsLast)) return at::MemoryFormat::ChannelsLast;
  return t.suggest_memory_format();
}

at::Tensor empty_activation(const at::Tensor& input) {
  const at::MemoryFormat format = format_of(input);
  if (!input.is_cpu() || static_cast<int64_t>(input.nbytes()) < kLargeOutputBytes) {
    return at::empty_like(input, format);
  }
  return at::detail::empty_generic(input.sizes(), output_allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   input.scalar_type(), format);
}

// grad_output may come in any strides. Where it and input have one walk in common it is read in place; otherwise it is
// copied into the memory format of input, if input itself is dense: one more pass in order beats reading one of the two
// out of order, or one element at a time, as where a sum has been expanded.
at::Tensor match_walk(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& dx) {
  View x, dy, out;
  const TensorLayout x_layout = read_layout(input), out_layout = read_layout(dx.defined() ? dx : input);
  const Geometry together = make_geometry(sizes_of(input), dtype_of(input),
                                          {x_layout, read_layout(grad_output), out_layout}, {&x, &dy, &out});
  if (together.unit_stride) return grad_output;
  const Geometry alone = make_geometry(sizes_of(input), dtype_of(input), {x_layout, out_layout}, {&x, &out});
  if (!alone.unit_stride) return grad_output;
  return grad_output.contiguous(format_of(input));
}

void check_device(const at::Tensor& input) {
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

// The two calls below, with mean and var or without.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> run_forward(
    const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias, bool training,
    std::optional<double> momentum, double eps, bool skip_nonfinite, bool return_stats) {
  check_forward(input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps);
  check_device(input);
  if (training && input.numel() != 0) check_updated_memory(input, running_mean, running_var, num_batches_tracked);

  at::Tensor output = empty_activation(input), mean, var;
  auto statistics = [&] { return input.options().dtype(gradient_type(input)); };
  if (input.numel() == 0) {  // no statistics: none are updated
    const auto saved = input.options().dtype(saved_type(input));
    if (return_stats) {
      mean = training ? at::full({input.size(1)}, NAN, statistics()) : at::_to_copy(*running_mean, statistics());
      var = training ? at::full({input.size(1)}, NAN, statistics()) : at::_to_copy(*running_var, statistics());
    }
    return {output, at::zeros({input.size(1)}, saved), at::zeros({input.size(1)}, saved), mean, var};
  }
  at::Tensor save_mean = empty_statistic(input), save_invstd = empty_statistic(input);
  if (return_stats) {
    mean = at::empty({input.size(1)}, statistics());
    var = at::empty({input.size(1)}, statistics());
  }

  ForwardProblem problem;
  problem.geometry = make_geometry(sizes_of(input), dtype_of(input), {read_layout(input), written_layout(output)},
                                   {&problem.x, &problem.y});
  problem.weight = read_vector(weight);
  problem.bias = read_vector(bias);
  problem.running_mean = training ? written_vector(running_mean) : read_vector(running_mean);
  problem.running_var = training ? written_vector(running_var) : read_vector(running_var);
  problem.mean = written_vector(save_mean);
  problem.invstd = written_vector(save_invstd);
  problem.stats_mean = written_vector(mean);
  problem.stats_var = written_vector(var);
  problem.training = training;
  problem.cumulative = !momentum.has_value();
  problem.momentum = momentum.value_or(0);
  problem.eps = eps;
  if (skip_nonfinite && given(running_mean)) {
    problem.running_limit = std::min(largest(problem.running_mean.dtype), largest(problem.running_var.dtype));
  }
  at::Tensor count;
  if (training && given(num_batches_tracked)) {
    count = num_batches_tracked->to(at::kLong);  // the tensor itself, unless the layer was cast to something else
    problem.num_batches_tracked = count.mutable_data_ptr<int64_t>();
  }
  run(input, problem);

  if (training) {
    if (count.defined() && !count.is_same(*num_batches_tracked)) num_batches_tracked->copy_(count);
    mark_written(running_mean);
    mark_written(running_var);
    mark_written(num_batches_tracked);
  }
  return {output, save_mean, save_invstd, mean, var};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> batchnorm2d_forward(
    const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias, bool training,
    std::optional<double> momentum, double eps, bool skip_nonfinite) {
  const auto [output, save_mean, save_invstd, mean, var] =
      run_forward(input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps,
                  skip_nonfinite, false);
  return {output, save_mean, save_invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batchnorm2d_eval(const at::Tensor& input,
                                                                const OptionalTensor& running_mean,
                                                                const OptionalTensor& running_var,
                                                                const OptionalTensor& weight,
                                                                const OptionalTensor& bias, double eps) {
  return batchnorm2d_forward(input, running_mean, running_var, std::nullopt, weight, bias, false, 0.0, eps, false);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batchnorm2d_forward_with_stats(
    const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias, bool training,
    std::optional<double> momentum, double eps, bool skip_nonfinite) {
  return run_forward(input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps,
                     skip_nonfinite, true);
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
  problem.geometry = make_geometry(sizes_of(input), dtype_of(input), {read_layout(input)}, {&problem.x});
  if (!training) {
    problem.running_mean = read_vector(running_mean);
    problem.running_var = read_vector(running_var);
  }
  problem.mean = written_vector(mean);
  problem.invstd = written_vector(invstd);
  problem.training = training;
  problem.eps = eps;
  run(input, problem);
  return {mean, invstd};
}

namespace {

// What the two calls below have in common: dx goes to the tensor given, or nowhere.
Gradients run_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                       const at::Tensor& save_mean, const at::Tensor& save_invstd, bool training,
                       std::array<bool, 5> output_mask, const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                       const at::Tensor& dx) {
  const auto statistics = input.options().dtype(gradient_type(input));
  const auto parameters = given(weight) ? weight->options() : statistics;
  at::Tensor dweight, dbias, dmean, dvar;
  auto allocate = [&](at::Tensor& t, bool wanted, const at::TensorOptions& options) {
    if (wanted) t = input.numel() == 0 ? at::zeros({input.size(1)}, options) : at::empty({input.size(1)}, options);
  };
  allocate(dweight, output_mask[1], parameters);
  allocate(dbias, output_mask[2], parameters);
  allocate(dmean, output_mask[3], statistics);
  allocate(dvar, output_mask[4], statistics);
  if (input.numel() == 0) {
    if (dmean.defined() && given(grad_mean)) dmean.copy_(*grad_mean);
    if (dvar.defined() && given(grad_var)) dvar.copy_(*grad_var);
    return {dx, dweight, dbias, dmean, dvar};
  }

  const at::Tensor dy = match_walk(grad_output, input, dx);
  BackwardProblem problem;
  problem.geometry =
      make_geometry(sizes_of(input), dtype_of(input),
                    {read_layout(input), read_layout(dy), dx.defined() ? written_layout(dx) : read_layout(input)},
                    {&problem.x, &problem.dy, &problem.dx});
  if (!dx.defined()) problem.dx.data = nullptr;
  problem.weight = read_vector(weight);
  problem.mean = read_vector(save_mean);
  problem.invstd = read_vector(save_invstd);
  problem.grad_mean = read_vector(grad_mean);
  problem.grad_var = read_vector(grad_var);
  problem.dweight = written_vector(dweight);
  problem.dbias = written_vector(dbias);
  problem.dmean = written_vector(dmean);
  problem.dvar = written_vector(dvar);
  problem.training = training;
  run(input, problem);
  return {dx, dweight, dbias, dmean, dvar};
}

}  // namespace

Gradients batchnorm2d_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                               const at::Tensor& save_mean, const at::Tensor& save_invstd, bool training,
                               std::array<bool, 5> output_mask, const OptionalTensor& grad_mean,
                               const OptionalTensor& grad_var) {
  check_backward(grad_output, input, weight, save_mean, save_invstd, grad_mean, grad_var);
  check_device(input);
  const at::Tensor dx = output_mask[0] ? empty_activation(input) : at::Tensor();
  return run_backward(grad_output, input, weight, save_mean, save_invstd, training, output_mask, grad_mean, grad_var,
                      dx);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batchnorm2d_backward_out(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const at::Tensor& save_mean,
    const at::Tensor& save_invstd, bool training, const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
    at::Tensor out) {
  check_backward(grad_output, input, weight, save_mean, save_invstd, grad_mean, grad_var);
  check_out(out, input);
  check_device(input);
  const at::Tensor nothing;
  check_memory(out, grad_output,
               {{"input", &input},
                {"weight", given(weight) ? &*weight : &nothing},
                {"save_mean", &save_mean},
                {"save_invstd", &save_invstd},
                {"grad_mean", given(grad_mean) ? &*grad_mean : &nothing},
                {"grad_var", given(grad_var) ? &*grad_var : &nothing}});
  const auto [dx, dweight, dbias, dmean, dvar] =
      run_backward(grad_output, input, weight, save_mean, save_invstd, training, {true, true, true, true, true},
                   grad_mean, grad_var, out);
  mark_written(out);
  return {dweight, dbias, dmean, dvar};
}

// Of input and of an output, to plan with. Nothing is read or written: of the addresses only the alignment counts, and
// outputs are aligned.
std::pair<TensorLayout, TensorLayout> planned_layouts(const at::Tensor& input) {
  const at::Tensor output = at::empty_like(input, input.options().device(at::kMeta), format_of(input));
  TensorLayout x = read_layout(input), y = read_layout(output);
  constexpr uintptr_t kAligned = 256;
  x.data = reinterpret_cast<void*>(kAligned + reinterpret_cast<uintptr_t>(x.data) % kAligned);
  y.data = reinterpret_cast<void*>(kAligned);
  return {x, y};
}

std::string explain_cpu(const at::Tensor& input) {
  check_input(input);
  const auto [x_layout, y_layout] = planned_layouts(input);
  View x, y;
  const Geometry geometry = make_geometry(sizes_of(input), dtype_of(input), {x_layout, y_layout}, {&x, &y});
  return cpu::explain(geometry, x, y);
}

std::vector<std::pair<std::string, double>> cuda_device(const std::string& name) {
  return cuda::device_fields(device_named(name));
}

std::map<std::string, double> cuda_costs(const std::string& name) {
  return cuda::cost_fields(device_named(name).costs);
}

std::vector<PlanReport> cuda_plans(const at::Tensor& input, const std::string& device, const std::string& family,
                                   bool training, const std::map<std::string, double>& costs) {
  check_input(input);
  cuda::DeviceInfo info = device_named(device);
  cuda::set_costs(costs, info.costs);
  cuda::Limits limits = cuda::limits_of_environment();
  if (!family.empty()) limits.family = cuda::family_named(family, "family");

  const auto [x, y] = planned_layouts(input);
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
    const int64_t bytes_min = (is_forward ? 2 : 3) * tensor_bytes;
    reports.push_back({is_forward ? "forward" : "backward", cuda::family_name(plan.family), cuda::walk_name(plan),
                       plan.persistent, cuda::to_string(plan), plan.error, plan.num_splits, plan.bytes_moved, bytes_min,
                       plan.microseconds, cuda::predict_floor(bytes_min, info), cuda::compared_time(plan)});
  }
  return reports;
}

}  // namespace bnext
