// Kernels for tensors with gaps along the innermost index: every second column, a transposed view, an expanded one.
#pragma once

#include "kernels.h"

namespace bnext::cpu {

const KernelTable& strided_table(DType dtype);

}  // namespace bnext::cpu
