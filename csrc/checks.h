// What arguments are acceptable, and what the caller is told of those that are not: type, shape, dtype, device,
// options. checks.cpp has the words, overlap.cpp those about shared memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <utility>

namespace bnext {

using OptionalTensor = std::optional<at::Tensor>;

inline bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// Raise what the caller should see if the arguments are unacceptable, and do nothing else. They read sizes as SymInts,
// so the fake kernels of bnext/_ops.py call them too.
void check_forward(const at::Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& num_batches_tracked, const OptionalTensor& weight, const OptionalTensor& bias,
                   bool training, std::optional<double> momentum, double eps);
void check_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                    const at::Tensor& save_mean, const at::Tensor& save_invstd, const OptionalTensor& grad_mean,
                    const OptionalTensor& grad_var);
void check_out(const at::Tensor& out, const at::Tensor& input);
void check_statistics_arguments(const at::Tensor& input, const OptionalTensor& running_mean,
                                const OptionalTensor& running_var, bool training, double eps);
void check_input(const at::Tensor& input);
// What training updates, of any shape: each element has a place of its own, as far as strides of 0 tell, and it is no
// inference tensor outside of inference mode.
void check_updated(const char* name, const at::Tensor& t);

void check_not_inference(const char* name, const at::Tensor& t);
// What may be written to: no inference tensor outside of inference mode, and nothing that another argument holds. Both
// look at addresses, so they are not for fake tensors.
// Running statistics lie apart from a non-empty input and from each other.
void check_updated_memory(const at::Tensor& input, const OptionalTensor& running_mean,
                          const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked);
// `out`: each element in a place of its own, on grad_output element for element or apart from it, and
// apart from all others.
void check_memory(const at::Tensor& out, const at::Tensor& grad_output,
                  std::initializer_list<std::pair<const char*, const at::Tensor*>> others);

}  // namespace bnext
