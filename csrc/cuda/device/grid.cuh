// A barrier of all blocks of a kernel, in two halves like a cluster's, for every thread. Those who wait rely on a
// cooperative launch, which starts all blocks or none.
#pragma once

#include "portability.cuh"

#ifndef BNEXT_SIMT
#include <cooperative_groups.h>

#include <utility>

#if CUDART_VERSION < 12040
#error "bnext needs CUDA 12.4 or later: older ones have no grid barrier in two halves"
#endif
#endif

namespace bnext::cuda {

// CUDA's own, which needs no memory of ours. The token is what one half tells the other.
#ifdef BNEXT_SIMT
struct GridToken {};
#else
using GridToken = cooperative_groups::grid_group::arrival_token;
#endif

__device__ inline void grid_arrive([[maybe_unused]] GridToken& token BNEXT_AND_CALLER) {
#ifdef BNEXT_SIMT
  simt::cluster_arrive(file, line);
#else
  token = cooperative_groups::this_grid().barrier_arrive();
#endif
}

__device__ inline void grid_wait([[maybe_unused]] GridToken token BNEXT_AND_CALLER) {
#ifdef BNEXT_SIMT
  simt::cluster_wait(file, line);
#else
  cooperative_groups::this_grid().barrier_wait(std::move(token));
#endif
}

}  // namespace bnext::cuda
