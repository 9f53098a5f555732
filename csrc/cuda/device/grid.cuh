// What blocks of one kernel tell each other through global memory: numbers, and a counter that says when they are there.
// Those who wait rely on a cooperative launch, which starts all blocks or none.
#pragma once

#include "portability.cuh"

namespace bnext::cuda {

// A number for other blocks. They see it after arrive_at by the same thread, or in the next kernel.
__device__ inline void leave_number(double* to, double value) {
#ifdef BNEXT_SIMT
  simt::leave_number(to, value);
#else
  *to = value;
#endif
}

__device__ inline double read_number(const double* from) {
#ifdef BNEXT_SIMT
  return *from;
#else
  return __ldcg(from);  // L1 may have an older one
#endif
}

// One more has arrived. Who has waited for it sees what this thread has left before.
__device__ inline void arrive_at(int* counter BNEXT_AND_CALLER) {
#ifdef BNEXT_SIMT
  simt::arrive_at(counter, file, line);
#else
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
#endif
}

// Until `count` have arrived. For threads that do not wait themselves it takes a barrier as well.
__device__ inline void wait_at(const int* counter, int count BNEXT_AND_CALLER) {
#ifdef BNEXT_SIMT
  simt::wait_at(counter, count, file, line);
#else
  int arrived;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                 : "=r"(arrived)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
  } while (arrived < count);
#endif
}

}  // namespace bnext::cuda
