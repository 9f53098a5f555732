// Sums over a warp, in an order that never changes: the same bits on every run.
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

// The same for several numbers, which go round together, over so many neighbouring lanes.
template <int kLanes, typename T, int kNumbers>
__device__ inline void sum_lanes(T (&value)[kNumbers]) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kNumbers; ++k) value[k] += __shfl_xor_sync(kFullWarp, value[k], distance);
  }
}

}  // namespace bnext::cuda
