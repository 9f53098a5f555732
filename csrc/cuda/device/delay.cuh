// A pause that moves nothing and asks nobody.
#pragma once

#include "portability.cuh"

namespace bnext::cuda {

// For about so many of the SM's clocks. For speed only: the shim has no clock.
__device__ inline void wait_clocks([[maybe_unused]] int clocks) {
#ifdef BNEXT_SIMT
  simt::count_late_thread();
#else
  const long long begin = clock64();
  while (clock64() - begin < clocks) __nanosleep(50);
#endif
}

}  // namespace bnext::cuda
