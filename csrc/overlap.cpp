// Which tensors share memory, and what the caller is told of it.
#include "checks.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace bnext {
namespace {

// Addresses of the first byte and of the byte behind the last one. Strides are never negative.
std::pair<uintptr_t, uintptr_t> addresses(const at::Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const auto first = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return {first, first + static_cast<uintptr_t>((last + 1) * static_cast<int64_t>(t.itemsize()))};
}

// Whether the memory from the first to the last element of one tensor meets that of another. Tensors that interleave
// without a common element count as meeting.
bool memory_meets(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0 || a.device() != b.device()) return false;
  const auto [a_begin, a_end] = addresses(a);
  const auto [b_begin, b_end] = addresses(b);
  return a_begin < b_end && b_begin < a_end;
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

}  // namespace

// Kernels read what `out` may not touch while they write to it; dy they read element by element just before.
void check_memory(const at::Tensor& out, const at::Tensor& grad_output,
                  std::initializer_list<std::pair<const char*, const at::Tensor*>> others) {
  TORCH_CHECK(elements_are_apart(out),
              "out is written to, but several of its elements share one place in memory (an expanded tensor?)");
  TORCH_CHECK(!memory_meets(out, grad_output) || same_elements(out, grad_output),
              "out shares memory with grad_output, but not element for element");
  for (const auto& [name, t] : others) {
    TORCH_CHECK(!t->defined() || !memory_meets(out, *t), "out should not share memory with ", name);
  }
}

}  // namespace bnext
