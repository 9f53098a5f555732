// Kernels of one stream that overlap (sm_90+): the launch of the next one, and what it does before it waits, go on
// while this one still runs. CUDA calls it programmatic dependent launch. LaunchShape::overlaps asks for it; without
// that, or before sm_90, a kernel begins when the ones before it have ended, and these functions do nothing.
#pragma once

#include <cstring>

#include "portability.cuh"

namespace bnext::cuda {

// The next kernel may begin when all blocks of this one have come here, or ended.
__device__ inline void start_next_kernel() {
#if !defined(BNEXT_SIMT) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before has ended and all that it stored is there. For every thread that looks at it, or overwrites
// what that kernel reads. (And so have all before that one, which has waited for them itself.)
__device__ inline void wait_for_kernels(BNEXT_CALLER) {
#ifdef BNEXT_SIMT
  simt::wait_for_kernels(file, line);
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What the kernel before, or another block of this one, has left, for a thread that has waited for it. From L2: L1 may
// have what was there before.
template <typename T>
__device__ inline T load_from_l2(const T* from) {
#ifdef BNEXT_SIMT
  simt::check_dependency();
  return *from;
#else
  static_assert(sizeof(T) == 8 || sizeof(T) % 16 == 0, "one load of 8 bytes, or some of 16");
  T value;
  if constexpr (sizeof(T) == 8) {
    const unsigned long long bits = __ldcg(reinterpret_cast<const unsigned long long*>(from));
    memcpy(&value, &bits, sizeof value);
  } else {
    uint4 bits[sizeof(T) / 16];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 16); ++i)
      bits[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
    memcpy(&value, bits, sizeof value);
  }
  return value;
#endif
}

}  // namespace bnext::cuda
