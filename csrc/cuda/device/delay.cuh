// A pause that moves nothing and asks nobody.
#pragma once

#include "portability.cuh"

namespace bnext::cuda {

// For about so many of the SM's clocks. For speed only: the shim has no clock.
__device__ inline void wait_clocks(int clocks) {
#ifdef BNEXT_SIMT
  simt::count_late_thread(clocks);
#else
  const auto begin = static_cast<unsigned long long>(clock64()), end = static_cast<unsigned long long>(clocks);
  for (;;) {
    const unsigned long long gone = static_cast<unsigned long long>(clock64()) - begin;
    if (gone >= end) return;
    __nanosleep(static_cast<unsigned>(end - gone) / 4 + 20);  // it may take twice as long, or not as long
  }
#endif
}

}  // namespace bnext::cuda
