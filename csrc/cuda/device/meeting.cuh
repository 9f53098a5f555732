// Barriers between blocks through global memory, in two halves like a cluster's. Those who wait rely on a cooperative launch,
// which starts all blocks or none.
#pragma once

#include "portability.cuh"

#ifndef BNEXT_SIMT
#include <cooperative_groups.h>

#include <utility>
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

// ---- some of them: for one thread of each block -------------------------------------------------------------------

// Such a barrier is a word that is zero before the first use. Of n that arrive, one adds 2^31 - (n - 1) and the others 1: when
// all have come, the upper bit has changed and the others are what they were, ready for the next time.
constexpr unsigned kUpperBit = 1u << 31;

// One of n arrives; exactly one of them is `first`. Leaves what await needs. Who has waited sees what this thread stored
// before, and what other threads had stored before they met it at a barrier of the block.
__device__ inline void arrive_at(unsigned* word, int n, bool first, unsigned& before BNEXT_AND_CALLER) {
  const unsigned amount = first ? kUpperBit - static_cast<unsigned>(n - 1) : 1;
#ifdef BNEXT_SIMT
  before = simt::arrive_at(word, amount, file, line);
#else
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(word)), "r"(amount)
               : "memory");
#endif
}

// Until all have arrived. The block's other threads, if they rely on it, have to be told at a barrier.
__device__ inline void await(const unsigned* word, unsigned before BNEXT_AND_CALLER) {
#ifdef BNEXT_SIMT
  simt::await(word, before, kUpperBit, file, line);
#else
  unsigned now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(__cvta_generic_to_global(word)) : "memory");
  } while (((now ^ before) & kUpperBit) == 0);
#endif
}

}  // namespace bnext::cuda
