// Which memory may be written to: what shares it, and what the caller is told of it.
#include "checks.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace bnext {
namespace {

// Addresses of the first byte and of the byte behind the last one. Strides are never negative.
struct Addresses {
  uintptr_t begin, end;
};

Addresses addresses(const at::Tensor& t) {
  const at::IntArrayRef sizes = t.sizes(), strides = t.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  const auto first = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return {first, first + static_cast<uintptr_t>((last + 1) * static_cast<int64_t>(t.itemsize()))};
}

bool meet(const Addresses& a, const Addresses& b) { return a.begin < b.end && b.begin < a.end; }

// Whether the memory from the first to the last element of one tensor meets that of another. Tensors that interleave
// without a common element count as meeting.
bool memory_meets(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0 || a.device() != b.device()) return false;
  return meet(addresses(a), addresses(b));
}

// Whether these are two columns of one table: vectors with one stride, and neither has a byte of the other's elements.
bool interleave(const at::Tensor& a, const at::Tensor& b) {
  if (a.dim() != 1 || b.dim() != 1) return false;
  const auto a_bytes = static_cast<int64_t>(a.itemsize()), b_bytes = static_cast<int64_t>(b.itemsize());
  const int64_t step = a.stride(0) * a_bytes;
  if (step == 0 || step != b.stride(0) * b_bytes) return false;
  const auto distance = static_cast<int64_t>(addresses(b).begin - addresses(a).begin) % step;
  const int64_t from_a_to_b = distance < 0 ? distance + step : distance;
  return from_a_to_b >= a_bytes && from_a_to_b + b_bytes <= step;
}

// Whether both have every element in the same place.
bool same_elements(const at::Tensor& a, const at::Tensor& b) {
  bool same = a.const_data_ptr() == b.const_data_ptr() && a.sizes() == b.sizes() && a.dtype() == b.dtype();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == 1 || a.stride(d) == b.stride(d);
  return same;
}

// Whether each dimension steps over all that the smaller ones reach, so that no two elements share a place.
bool elements_are_apart(const at::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t last = 0;  // the farthest element that the dimensions so far reach
  for (const auto& [stride, size] : dims) {
    if (stride <= last) return t.numel() == 0;
    last += (size - 1) * stride;
  }
  return true;
}

void check_may_be_written(const char* name, const at::Tensor& t) {
  check_not_inference(name, t);
  t.mutable_data_ptr();  // a lazy clone gets memory of its own, before addresses are compared
}

}  // namespace

void check_not_inference(const char* name, const at::Tensor& t) {
  TORCH_CHECK(
      !t.is_inference() || c10::InferenceMode::is_enabled(), name,
      ": Inplace update to inference tensor outside InferenceMode is not allowed. You can make a clone to get a "
      "normal tensor before doing inplace update.");
}

// Kernels read what `out` may not touch while they write to it; dy they read element by element just before.
void check_memory(const at::Tensor& out, const at::Tensor& grad_output,
                  std::initializer_list<std::pair<const char*, const at::Tensor*>> others) {
  check_may_be_written("out", out);
  TORCH_CHECK(elements_are_apart(out),
              "out is written to, but several of its elements share one place in memory (an expanded tensor?)");
  TORCH_CHECK(!memory_meets(out, grad_output) || same_elements(out, grad_output),
              "out shares memory with grad_output, but not element for element");
  for (const auto& [name, t] : others) {
    TORCH_CHECK(!t->defined() || !memory_meets(out, *t), "out should not share memory with ", name);
  }
}

// Every call in training pays for this: the addresses of each tensor are computed once.
void check_updated_memory(const at::Tensor& input, const OptionalTensor& running_mean,
                          const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked) {
  struct Named {
    const char* name;
    const at::Tensor* tensor;
    Addresses at;
  };
  std::array<Named, 4> seen = {Named{"input", &input, addresses(input)}};
  size_t num_seen = 1;
  auto add = [&](const char* name, const OptionalTensor& t) {
    if (!given(t)) return;
    check_may_be_written(name, *t);
    const Named added{name, &*t, addresses(*t)};
    for (size_t i = 0; i < num_seen; ++i) {
      TORCH_CHECK(!meet(added.at, seen[i].at) || interleave(*t, *seen[i].tensor), name,
                  " is updated in training and should not share memory with ", seen[i].name);
    }
    seen[num_seen++] = added;
  };
  add("running_mean", running_mean);
  add("running_var", running_var);
  add("num_batches_tracked", num_batches_tracked);
}

}  // namespace bnext
