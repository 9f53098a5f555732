// What the CUDA runtime of runtime.cpp asks of the library that has the shim and the kernels. Plain data: neither knows
// the other's headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

struct Memory {
  void* data;
  size_t bytes;
};

struct KernelLaunch {
  const char* name;  // as nvcc and the C++ compiler mangle it
  unsigned blocks, threads, cluster;
  bool cooperative, overlaps;
  size_t shared_bytes;
  const void* args;      // KernelArgs
  const Memory* memory;  // all of the device
  size_t num_memory;
  uint64_t seed;
};

}  // namespace simt

// Runs it. Returns what the shim has caught it at, or "".
extern "C" const char* simt_run_kernel(const simt::KernelLaunch* launch);
