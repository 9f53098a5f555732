// Kernels that do one thing wrong each, to show that the shim notices.
#include <cstdio>

#include "simt.h"

namespace {

struct Memory {
  float* loads;   // 64 floats, 16-byte aligned
  float* stores;  // 64 floats
};

void skipped_barrier(Memory) {
  if (threadIdx.x >= 32) __syncthreads();
}

void two_barriers(Memory) {
  if (threadIdx.x >= 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void half_warp_shuffle(Memory) {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

void partial_mask(Memory) { __shfl_xor_sync(0xffffu, 1.0f, 1); }

void misaligned_load(Memory memory) { simt::check_load(memory.loads + 1, 16); }

void load_outside(Memory memory) { simt::check_load(memory.loads + 64 + threadIdx.x, 4); }

void store_outside(Memory memory) { simt::check_store(memory.stores - 1, 4); }

void store_twice(Memory memory) { simt::check_store(memory.stores + threadIdx.x / 2, 4); }

void beyond_shared(Memory) { simt::shared_memory()[256 + threadIdx.x] = 0; }

void nothing_wrong(Memory memory) {
  auto* shared = reinterpret_cast<float*>(simt::shared_memory());
  shared[threadIdx.x] = *static_cast<const float*>(simt::check_load(memory.loads + threadIdx.x, 4));
  __syncthreads();
  const float sum = __shfl_xor_sync(0xffffffffu, shared[63 - threadIdx.x], 1);
  *static_cast<float*>(simt::check_store(memory.stores + threadIdx.x, 4)) = sum;
}

}  // namespace

extern "C" void simt_fault(int64_t which, int64_t seed, char* error, int64_t error_bytes) {
  void (*const kernels[])(Memory) = {skipped_barrier, two_barriers,  half_warp_shuffle, partial_mask,  misaligned_load,
                                     load_outside,    store_outside, store_twice,       beyond_shared, nothing_wrong};
  alignas(16) float loads[64] = {}, stores[64] = {};
  simt::begin({static_cast<uint64_t>(seed), ""});
  simt::allow_load(loads, sizeof loads);
  simt::allow_store(stores, sizeof stores);
  simt::launch(kernels[which], 2 - (which == 9), 64, 1, 256, nullptr, Memory{loads, stores});
  std::snprintf(error, error_bytes, "%s", simt::error().c_str());
}
