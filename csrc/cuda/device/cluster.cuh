// Thread-block clusters (sm_90+): the barrier over all their blocks, and reads of another block's shared memory. With
// one block a cluster is that block, on any architecture. Code compiled for less has no clusters: count_clusters says
// so, and to come here all the same ends the kernel, because its sums would be wrong.
#pragma once

#include "portability.cuh"

namespace bnext::cuda {

// The two halves of a barrier over all threads of the cluster: what a thread wrote to shared memory before it arrived
// is seen by all who have waited.
__device__ inline void cluster_arrive(BNEXT_CALLER) {
#ifdef BNEXT_SIMT
  simt::cluster_arrive(file, line);
#elif __CUDA_ARCH__ >= 900
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  // A release of what the thread wrote to shared memory only: that of all memory waits for every store to reach L2.
  // What it has read of other blocks' has arrived: it has stored what follows from that.
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#else
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
#else
  __trap();
#endif
}

__device__ inline void cluster_wait(BNEXT_CALLER) {
#ifdef BNEXT_SIMT
  simt::cluster_wait(file, line);
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// The number at the same place in the shared memory of block `rank` of the cluster. That block must not have ended.
__device__ inline double load_cluster(const double* own, unsigned rank) {
#ifdef BNEXT_SIMT
  return *static_cast<const double*>(simt::cluster_memory(own, sizeof *own, rank));
#elif __CUDA_ARCH__ >= 900
  double value;
  asm volatile(
      "{\n"
      ".reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f64 %0, [remote];\n"
      "}"
      : "=d"(value)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank)
      : "memory");
  return value;
#else
  __trap();
  return *own;
#endif
}

}  // namespace bnext::cuda
