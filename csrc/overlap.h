// Which tensors share memory. No copies, no checks: api.cpp says what is allowed.
#pragma once

#include <ATen/core/Tensor.h>

namespace bnext {

// Whether the memory from the first to the last element of one tensor meets that of another. Tensors that interleave
// without a common element count as meeting.
bool memory_meets(const at::Tensor& a, const at::Tensor& b);

// Whether both have every element in the same place.
bool same_elements(const at::Tensor& a, const at::Tensor& b);

// Whether each dimension steps over all that the smaller ones reach, so that no two elements share a place.
bool elements_are_apart(const at::Tensor& t);

}  // namespace bnext
