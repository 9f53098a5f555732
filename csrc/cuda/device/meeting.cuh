// Barriers between blocks through global memory, in two halves like a cluster's. Those who wait rely on a cooperative
// launch, which starts all blocks or none.
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

// ---- all blocks of the kernel: for every thread -------------------------------------------------------------------

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

// ---- some of them: for single threads -----------------------------------------------------------------------------

// Such a barrier is a word that is zero before the first use. Of n that arrive, one adds 2^31 - (n - 1) and the others
// 1: when all have come, the upper bit has changed and the others are zero again, ready for the next time. The bit that
// the word begins with is 0, after the first time it is 1, and so on.

// One of n arrives; exactly one of them is `first`. Who has waited sees what this thread stored before, and what other
// threads had stored before they met it at a barrier of the block.
__device__ inline void arrive_at(unsigned* word, int n, bool first BNEXT_AND_CALLER) {
  const unsigned amount = first ? (1u << 31) - static_cast<unsigned>(n - 1) : 1;
#ifdef BNEXT_SIMT
  simt::arrive_at(word, amount, file, line);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(word)), "r"(amount)
               : "memory");
#endif
}

// Until the upper bit is `bit`. The block's other threads, if they rely on it, have to be told at a barrier.
__device__ inline void await(const unsigned* word, unsigned bit BNEXT_AND_CALLER) {
#ifdef BNEXT_SIMT
  simt::await(word, bit << 31, 1u << 31, file, line);
#else
  for (;;) {
    unsigned now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(__cvta_generic_to_global(word)) : "memory");
    if (now >> 31 == bit) return;
    __nanosleep(20);  // each look empties the SM's L1, which another block may use
  }
#endif
}

}  // namespace bnext::cuda
