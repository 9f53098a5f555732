// Sums over a warp and over a block, in an order that never changes: the same bits on every run.
#pragma once

#include "portability.cuh"

namespace bnext::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Every lane gets the sum, and the same bits: each step adds the same two numbers on both sides.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

// Every thread gets the sum. `scratch` holds one number per warp and may be used again at once.
__device__ inline double block_sum(double value, double* scratch) {
  const int num_warps = blockDim.x / kWarpSize;
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < num_warps; ++i) total += scratch[i];
  __syncthreads();
  return total;
}

}  // namespace bnext::cuda
