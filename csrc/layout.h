// From sizes and strides of 4-D tensors to the order in which kernels walk them. Pure arithmetic, no torch.
#pragma once

#include <array>
#include <initializer_list>

#include "problem.h"

namespace bnext {

struct TensorLayout {
  void* data = nullptr;
  std::array<int64_t, 4> stride = {0, 0, 0, 0};  // of N, C, H, W, in elements
};

// Finds one walk for all tensors together and fills in one View for each. `size` is N, C, H, W.
Geometry make_geometry(const std::array<int64_t, 4>& size, DType dtype, std::initializer_list<TensorLayout> tensors,
                       std::initializer_list<View*> views);

}  // namespace bnext
