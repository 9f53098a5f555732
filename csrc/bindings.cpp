// PYBIND11_MODULE and TORCH_LIBRARY: the same functions, once for Python and once for the dispatcher.
// The Python functions go through the dispatcher too, below autograd (bnext/autograd.py is the derivative): so fake
// tensors, tracing modes and profilers see every call, and eager calls skip what parsing a schema in Python costs.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_to_copy.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "api.h"
#include "cpu/cache.h"
#include "cpu/kernels.h"
#include "cuda/plan_names.h"
#include "output_memory.h"

namespace py = pybind11;
using namespace py::literals;

namespace bnext {
namespace {

// Argument conversion that says which argument of which function is wrong, as torch's own functions do.
class Arguments {
 public:
  explicit Arguments(const char* function_name) : function(function_name) {}

  at::Tensor tensor(py::handle value, const char* name) const { return unpack(value, name, "' must be Tensor, not "); }
  OptionalTensor optional_tensor(py::handle value, const char* name) const {
    if (value.is_none()) return std::nullopt;
    return unpack(value, name, "' must be Tensor or None, not ");
  }
  double number(py::handle value, const char* name) const {
    if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
    const bool differentiable = THPVariable_Check(value.ptr()) && THPVariable_Unpack(value.ptr()).requires_grad();
    TORCH_CHECK_TYPE(PyNumber_Check(value.ptr()) && !differentiable, function, "(): argument '", name,
                     "' must be float, not ", Py_TYPE(value.ptr())->tp_name,
                     differentiable ? " that requires grad" : "");
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred()) {
      if (PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
      PyErr_Clear();
      TORCH_CHECK_TYPE(false, function, "(): argument '", name, "' must be float, not ", Py_TYPE(value.ptr())->tp_name);
    }
    return number;
  }
  bool boolean(py::handle value, const char* name) const {
    if (value.ptr() == Py_True) return true;
    TORCH_CHECK_TYPE(value.ptr() == Py_False, function, "(): argument '", name, "' must be bool, not ",
                     Py_TYPE(value.ptr())->tp_name);
    return false;
  }

  // Of a view that negates its memory the dispatcher would hand on a copy, and then miss it among the results.
  void writable(const OptionalTensor& t, const char* name) const {
    TORCH_CHECK(!given(t) || !t->is_neg(), function, "(): argument '", name,
                "' is written to, and must not be a view that negates its memory");
  }

 private:
  const char* function;

  at::Tensor unpack(py::handle value, const char* name, const char* requirement) const {
    TORCH_CHECK_TYPE(THPVariable_Check(value.ptr()), function, "(): argument '", name, requirement,
                     Py_TYPE(value.ptr())->tp_name);
    const at::Tensor& t = THPVariable_Unpack(value.ptr());
    TORCH_CHECK_NOT_IMPLEMENTED(t.layout() == at::kStrided && !t.is_nested() && !t.is_quantized(), function,
                                "(): argument '", name, "' must be a dense tensor, not a ",
                                t.is_nested()      ? "nested"
                                : t.is_quantized() ? "quantized"
                                                   : "sparse or opaque",
                                " one");
    return t;
  }
};

py::tuple to_python(std::initializer_list<at::Tensor> tensors) {
  py::tuple result(tensors.size());
  size_t i = 0;
  for (const at::Tensor& t : tensors) {
    PyObject* wrapped = t.defined() ? THPVariable_Wrap(t) : Py_NewRef(Py_None);
    if (wrapped == nullptr) throw python_error();
    PyTuple_SET_ITEM(result.ptr(), i++, wrapped);
  }
  return result;
}

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <typename F>
auto call_operator(F call) {
  py::gil_scoped_release no_gil;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call();
}

struct ForwardArguments {
  at::Tensor x;
  OptionalTensor mean, var, tracked, gamma, beta;
  bool train;
  std::optional<double> factor;
  double epsilon;

  ForwardArguments(const Arguments& as, py::handle input, py::handle running_mean, py::handle running_var,
                   py::handle num_batches_tracked, py::handle weight, py::handle bias, py::handle training,
                   py::handle momentum, py::handle eps)
      : x(as.tensor(input, "input")),
        mean(as.optional_tensor(running_mean, "running_mean")),
        var(as.optional_tensor(running_var, "running_var")),
        tracked(as.optional_tensor(num_batches_tracked, "num_batches_tracked")),
        gamma(as.optional_tensor(weight, "weight")),
        beta(as.optional_tensor(bias, "bias")),
        train(as.boolean(training, "training")) {
    if (!momentum.is_none()) factor = as.number(momentum, "momentum");
    epsilon = as.number(eps, "eps");
  }
};

void py_check_forward(py::handle input, py::handle running_mean, py::handle running_var, py::handle num_batches_tracked,
                      py::handle weight, py::handle bias, py::handle training, py::handle momentum, py::handle eps) {
  const ForwardArguments a(Arguments{"batchnorm2d"}, input, running_mean, running_var, num_batches_tracked, weight,
                           bias, training, momentum, eps);
  check_forward(a.x, a.mean, a.var, a.tracked, a.gamma, a.beta, a.train, a.factor, a.epsilon);
}

py::tuple py_forward(py::handle input, py::handle running_mean, py::handle running_var, py::handle num_batches_tracked,
                     py::handle weight, py::handle bias, py::handle training, py::handle momentum, py::handle eps,
                     py::handle skip_nonfinite, py::handle return_stats) {
  const Arguments as{"batchnorm2d"};
  const ForwardArguments a(as, input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum,
                           eps);
  // None is the cumulative average, which needs a count of batches.
  if (!a.tracked.has_value()) as.number(momentum, "momentum");
  if (a.train) {
    as.writable(a.mean, "running_mean");
    as.writable(a.var, "running_var");
    as.writable(a.tracked, "num_batches_tracked");
  }
  const bool skip = as.boolean(skip_nonfinite, "skip_nonfinite");
  const bool stats = as.boolean(return_stats, "return_stats");
  if (!a.train) {
    static const auto op = find_operator<decltype(batchnorm2d_eval)>("bnext::batchnorm2d_eval");
    auto [output, save_mean, save_invstd] =
        call_operator([&] { return op.call(a.x, a.mean, a.var, a.gamma, a.beta, a.epsilon); });
    if (!stats) return to_python({output, save_mean, save_invstd, {}, {}});
    auto copy = [&](const OptionalTensor& t) {
      return call_operator([&] { return at::_to_copy(*t, t->options().dtype(gradient_type(a.x))); });
    };
    return to_python({output, save_mean, save_invstd, copy(a.mean), copy(a.var)});
  }
  auto call = [&](const auto& op) {
    return call_operator(
        [&] { return op.call(a.x, a.mean, a.var, a.tracked, a.gamma, a.beta, a.train, a.factor, a.epsilon, skip); });
  };
  if (stats) {
    static const auto op =
        find_operator<decltype(batchnorm2d_forward_with_stats)>("bnext::batchnorm2d_forward_with_stats");
    const auto [output, save_mean, save_invstd, used_mean, used_var] = call(op);
    return to_python({output, save_mean, save_invstd, used_mean, used_var});
  }
  static const auto op = find_operator<decltype(batchnorm2d_forward)>("bnext::batchnorm2d_forward");
  const auto [output, save_mean, save_invstd] = call(op);
  return to_python({output, save_mean, save_invstd, {}, {}});
}

py::tuple py_statistics(py::handle input, py::handle running_mean, py::handle running_var, py::handle training,
                        py::handle eps) {
  static const auto op = find_operator<decltype(batchnorm2d_statistics)>("bnext::batchnorm2d_statistics");
  const Arguments as{"batchnorm2d_backward"};
  const auto x = as.tensor(input, "input");
  const auto mean = as.optional_tensor(running_mean, "running_mean");
  const auto var = as.optional_tensor(running_var, "running_var");
  const bool train = as.boolean(training, "training");
  const double epsilon = as.number(eps, "eps");
  const auto [save_mean, save_invstd] = call_operator([&] { return op.call(x, mean, var, train, epsilon); });
  return to_python({save_mean, save_invstd});
}

// `out` None: into a new tensor, where output_mask asks for it.
py::tuple py_backward(py::handle grad_output, py::handle input, py::handle weight, py::handle save_mean,
                      py::handle save_invstd, py::handle training, std::array<bool, 5> output_mask,
                      py::handle grad_mean, py::handle grad_var, py::handle out) {
  const Arguments as{"batchnorm2d_backward"};
  const auto dy = as.tensor(grad_output, "grad_output");
  const auto x = as.tensor(input, "input");
  const auto gamma = as.optional_tensor(weight, "weight");
  const auto mean = as.tensor(save_mean, "save_mean");
  const auto invstd = as.tensor(save_invstd, "save_invstd");
  const bool train = as.boolean(training, "training");
  const auto grad_of_mean = as.optional_tensor(grad_mean, "grad_mean");
  const auto grad_of_var = as.optional_tensor(grad_var, "grad_var");
  if (out.is_none()) {
    static const auto op = find_operator<decltype(batchnorm2d_backward)>("bnext::batchnorm2d_backward");
    const auto [dx, dweight, dbias, dmean, dvar] = call_operator(
        [&] { return op.call(dy, x, gamma, mean, invstd, train, output_mask, grad_of_mean, grad_of_var); });
    return to_python({dx, dweight, dbias, dmean, dvar});
  }
  static const auto op = find_operator<decltype(batchnorm2d_backward_out)>("bnext::batchnorm2d_backward_out");
  const auto dx = as.tensor(out, "out");
  as.writable(dx, "out");
  const auto [dweight, dbias, dmean, dvar] =
      call_operator([&] { return op.call(dy, x, gamma, mean, invstd, train, grad_of_mean, grad_of_var, dx); });
  return to_python({dx, dweight, dbias, dmean, dvar});
}

std::string py_explain_cpu(py::handle input) { return explain_cpu(Arguments{"explain"}.tensor(input, "input")); }

py::list py_cuda_plans(py::handle input, const std::string& device, const std::string& family, bool training,
                       const std::map<std::string, double>& costs) {
  py::list reports;
  const at::Tensor x = Arguments{"explain"}.tensor(input, "input");
  for (const PlanReport& r : cuda_plans(x, device, family, training, costs)) {
    reports.append(py::dict("pass"_a = r.pass, "family"_a = r.family, "walk"_a = r.walk, "persistent"_a = r.persistent,
                            "text"_a = r.text, "error"_a = r.error, "team"_a = r.team, "bytes_moved"_a = r.bytes_moved,
                            "bytes_min"_a = r.bytes_min, "microseconds"_a = r.microseconds,
                            "microseconds_min"_a = r.microseconds_min,
                            "microseconds_compared"_a = r.microseconds_compared));
  }
  return reports;
}

py::dict py_cuda_device(const std::string& name) {
  py::dict fields;
  for (const auto& [field, value] : cuda_device(name)) fields[field.c_str()] = value;
  return fields;
}

std::vector<std::string> cuda_families() {
  std::vector<std::string> names;
  for (cuda::Family family : cuda::all_families()) names.push_back(cuda::family_name(family));
  return names;
}

std::vector<std::string> cuda_devices() {
  std::vector<std::string> names;
  for (const cuda::NamedDevice& device : cuda::named_devices()) names.push_back(device.name);
  return names;
}

}  // namespace
}  // namespace bnext

#define BNEXT_STATISTICS "Tensor input, Tensor? running_mean, Tensor? running_var, bool training, float eps"
#define BNEXT_FORWARD                                                                                  \
  "Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, " \
  "Tensor? weight, Tensor? bias, bool training, float? momentum, float eps, bool skip_nonfinite=False"
#define BNEXT_BACKWARD \
  "Tensor grad_output, Tensor input, Tensor? weight, Tensor save_mean, Tensor save_invstd, bool training"

TORCH_LIBRARY(bnext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // Differentiable: bnext/_ops.py gives them the autograd Function.
  m.def("batchnorm2d(" BNEXT_FORWARD ") -> Tensor", tags);
  m.def("batchnorm2d_with_stats(" BNEXT_FORWARD ") -> (Tensor output, Tensor mean, Tensor var)", tags);
  m.def("batchnorm2d_forward(" BNEXT_FORWARD ") -> (Tensor output, Tensor mean, Tensor invstd)", tags);
  m.def("batchnorm2d_forward_with_stats(" BNEXT_FORWARD
        ") -> (Tensor output, Tensor save_mean, Tensor save_invstd, Tensor mean, Tensor var)",
        tags);
  m.def(
      "batchnorm2d_eval(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, "
      "float eps) -> (Tensor output, Tensor mean, Tensor invstd)",
      tags);
  m.def("batchnorm2d_statistics(" BNEXT_STATISTICS ") -> (Tensor mean, Tensor invstd)", tags);
  m.def("batchnorm2d_backward(" BNEXT_BACKWARD
        ", bool[5] output_mask, Tensor? grad_mean=None, Tensor? grad_var=None) -> "
        "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dmean, Tensor dvar)",
        tags);
  m.def("batchnorm2d_backward_out(" BNEXT_BACKWARD
        ", Tensor? grad_mean, Tensor? grad_var, Tensor(a!) out) -> "
        "(Tensor dweight, Tensor dbias, Tensor dmean, Tensor dvar)",
        tags);
}

// CUDA too in a build without CUDA kernels: api.cpp then says how to get them.
#define BNEXT_REGISTER(m)                                                                    \
  m.impl("batchnorm2d_forward", TORCH_FN(bnext::batchnorm2d_forward));                       \
  m.impl("batchnorm2d_forward_with_stats", TORCH_FN(bnext::batchnorm2d_forward_with_stats)); \
  m.impl("batchnorm2d_eval", TORCH_FN(bnext::batchnorm2d_eval));                             \
  m.impl("batchnorm2d_statistics", TORCH_FN(bnext::batchnorm2d_statistics));                 \
  m.impl("batchnorm2d_backward", TORCH_FN(bnext::batchnorm2d_backward));                     \
  m.impl("batchnorm2d_backward_out", TORCH_FN(bnext::batchnorm2d_backward_out));

TORCH_LIBRARY_IMPL(bnext, CPU, m){BNEXT_REGISTER(m)} TORCH_LIBRARY_IMPL(bnext, CUDA, m){BNEXT_REGISTER(m)}

PYBIND11_MODULE(_C, m) {
  m.def("batchnorm2d_forward", torch::wrap_pybind_function(bnext::py_forward));
  m.def("batchnorm2d_statistics", torch::wrap_pybind_function(bnext::py_statistics));
  m.def("batchnorm2d_backward", torch::wrap_pybind_function(bnext::py_backward), "grad_output"_a, "input"_a, "weight"_a,
        "save_mean"_a, "save_invstd"_a, "training"_a, "output_mask"_a, "grad_mean"_a, "grad_var"_a,
        "out"_a = py::none());
  m.def("check_forward", torch::wrap_pybind_function(bnext::py_check_forward));
  m.def("check_statistics_arguments", torch::wrap_pybind_function(bnext::check_statistics_arguments));
  m.def("check_backward", torch::wrap_pybind_function(bnext::check_backward));
  m.def("check_updated", torch::wrap_pybind_function(bnext::check_updated));
  m.def("check_out", torch::wrap_pybind_function(bnext::check_out));
  m.def("explain_cpu", torch::wrap_pybind_function(bnext::py_explain_cpu));
  m.def("cuda_plans", torch::wrap_pybind_function(bnext::py_cuda_plans), "input"_a, "device"_a, "family"_a,
        "training"_a, "costs"_a = std::map<std::string, double>{});
  m.def("cuda_costs", torch::wrap_pybind_function(bnext::cuda_costs));
  m.def("cuda_device", torch::wrap_pybind_function(bnext::py_cuda_device));
  m.def("read_environment", &bnext::cuda::read_environment);
  m.def("cuda_families", torch::wrap_pybind_function(bnext::cuda_families));
  m.def("cuda_devices", torch::wrap_pybind_function(bnext::cuda_devices));
  py::dict build;
  build["torch"] = TORCH_VERSION;
#ifdef BNEXT_CUDA_ARCHS
  build["cuda_archs"] = BNEXT_CUDA_ARCHS;
#else
  build["cuda_archs"] = py::none();
#endif
  m.attr("build") = build;
  m.def("cached_output_bytes", &bnext::cached_output_bytes);
  m.def("empty_output_cache", &bnext::empty_output_cache, py::call_guard<py::gil_scoped_release>());
  m.def("last_cache_bytes", &bnext::cpu::last_cache_bytes);
  m.def("cpu_isa", torch::wrap_pybind_function([] { return bnext::cpu::isa_name(bnext::cpu::current_isa()); }));
}
