// The one place that knows whether kernels are compiled by nvcc for a GPU or by g++ for the SIMT shim of tests/simt.
// Everything CUDA-specific that is not in math.cuh or pack.cuh is behind this header.
#pragma once

#ifdef BNEXT_SIMT
#include "simt.h"  // threadIdx, __syncthreads, shuffles, cudaError_t, BNEXT_LAUNCH: the shim's own
#else
#include <cuda_runtime.h>

// The only <<<>>> of the package. `kernel` is a pointer, so template arguments never meet the preprocessor's commas.
#define BNEXT_LAUNCH(kernel, grid, block, shared_bytes, stream, args) \
  kernel<<<grid, block, shared_bytes, stream>>>(args)
#endif

namespace bnext::cuda {

constexpr int kWarpSize = 32;

// All shared memory is dynamic: its size is in the plan, where tests can see it, and the shim can poison it.
__device__ inline unsigned char* shared_memory() {
#ifdef BNEXT_SIMT
  return simt::shared_memory();
#else
  extern __shared__ __align__(16) unsigned char bnext_shared_memory[];
  return bnext_shared_memory;
#endif
}

}  // namespace bnext::cuda
