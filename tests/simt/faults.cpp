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

void cluster_barrier_missed(Memory) {
  if (threadIdx.x >= 32) simt::cluster_arrive(__FILE__, __LINE__);
  simt::cluster_wait(__FILE__, __LINE__);
}

void ended_block(Memory) {
  auto* shared = reinterpret_cast<double*>(simt::shared_memory());
  shared[0] = 0;
  simt::cluster_arrive(__FILE__, __LINE__);
  simt::cluster_wait(__FILE__, __LINE__);
  const unsigned other = (blockIdx.x + 1) % 2;
  for (int i = 0; i < 8; ++i) {
    simt::cluster_memory(shared, sizeof *shared, other);
    __syncthreads();
  }
}

void two_cluster_barriers(Memory) {
  if (blockIdx.x % 2 == 0) {
    simt::cluster_arrive(__FILE__, __LINE__);
  } else {
    simt::cluster_arrive(__FILE__, __LINE__);
  }
  simt::cluster_wait(__FILE__, __LINE__);
}

void left_in_flight(Memory memory) {
  simt::copy_async(simt::shared_memory() + 4 * threadIdx.x, memory.loads + threadIdx.x, 4);
  simt::commit_async();
}

void early_look(Memory memory) {
  auto* shared = reinterpret_cast<float*>(simt::shared_memory());
  simt::copy_async(shared + threadIdx.x, simt::check_load(memory.loads + threadIdx.x, 4), 4);
  simt::commit_async();
  const bool early = shared[threadIdx.x] == 0;
  simt::wait_async(0, __FILE__, __LINE__);
  if (early || shared[threadIdx.x] != 0) simt::check_store(nullptr, 4);
}

void store_without_waiting(Memory memory) { simt::check_store(memory.stores + threadIdx.x, 4); }

void store_after_waiting(Memory memory) {
  simt::wait_for_kernels(__FILE__, __LINE__);
  store_without_waiting(memory);
}

unsigned word = 0;
const unsigned one = 1;
float number = 0;

void waits_for_ever(Memory) {
  if (threadIdx.x == 0 && blockIdx.x > 0) simt::await(&word, 9, __FILE__, __LINE__);
  __syncthreads();
  if (threadIdx.x == 0) simt::post(&word, &one, sizeof word);
}

void read_after(void (*leave)()) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) return leave();
  simt::await(&word, 1, __FILE__, __LINE__);
  if (number != 1) simt::check_store(nullptr, 4);
}

void posts_too_early(Memory) {
  read_after([] {
    simt::post(&word, &one, sizeof word);
    number = 1;
  });
}

void posts_at_last(Memory) {
  read_after([] {
    number = 1;
    simt::post(&word, &one, sizeof word);
  });
}

void nothing_wrong(Memory memory) {
  auto* shared = reinterpret_cast<float*>(simt::shared_memory());
  shared[threadIdx.x] = *static_cast<const float*>(simt::check_load(memory.loads + threadIdx.x, 4));
  __syncthreads();
  const float sum = __shfl_xor_sync(0xffffffffu, shared[63 - threadIdx.x], 1);
  *static_cast<float*>(simt::check_store(memory.stores + threadIdx.x, 4)) = sum;
}

}  // namespace

extern "C" void simt_fault(int64_t which, int64_t seed, char* error, int64_t error_bytes) {
  struct Fault {
    void (*kernel)(Memory);
    unsigned grid, cluster;
    bool overlaps = false, cooperative = false;
  };
  const Fault faults[] = {{skipped_barrier, 2, 1},
                          {two_barriers, 2, 1},
                          {half_warp_shuffle, 2, 1},
                          {partial_mask, 2, 1},
                          {misaligned_load, 2, 1},
                          {load_outside, 2, 1},
                          {store_outside, 2, 1},
                          {store_twice, 2, 1},
                          {beyond_shared, 2, 1},
                          {cluster_barrier_missed, 2, 2},
                          {ended_block, 2, 2},
                          {two_cluster_barriers, 2, 2},
                          {left_in_flight, 2, 1},
                          {early_look, 2, 1},
                          {nothing_wrong, 1, 1},
                          {store_without_waiting, 1, 1, true},
                          {store_after_waiting, 1, 1, true},
                          {store_without_waiting, 1, 1},
                          {waits_for_ever, 3, 1, false, true},
                          {posts_too_early, 2, 1, false, true},
                          {posts_at_last, 2, 1, false, true},
                          {ended_block, 2, 1, false, true}};
  const Fault& fault = faults[which];
  word = 0;
  number = 0;
  alignas(16) float loads[64] = {}, stores[64] = {};
  simt::begin({static_cast<uint64_t>(seed), ""});
  simt::allow_load(loads, sizeof loads);
  simt::allow_store(stores, sizeof stores);
  simt::launch(fault.kernel, fault.grid, 64, fault.cluster, fault.cooperative, 256, fault.overlaps, nullptr,
               Memory{loads, stores});
  std::snprintf(error, error_bytes, "%s", simt::error().c_str());
}
