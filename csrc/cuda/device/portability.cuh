// Whether kernels are compiled by nvcc for a GPU or by g++ for the SIMT shim of tests/simt: only the files of this
// folder know. Here are shared memory and the launch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../kernels/kernel_args.h"

#ifdef BNEXT_SIMT
#include "simt.h"  // threadIdx, __syncthreads, shuffles, cudaError_t: the shim's own
// The shim knows a barrier by the place that calls it.
#define BNEXT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define BNEXT_AND_CALLER , BNEXT_CALLER
#else
#include <cuda_runtime.h>
#define BNEXT_CALLER
#define BNEXT_AND_CALLER
#endif

namespace bnext::cuda {

constexpr int kClusterArch = 90;  // the first one with clusters, and with kernels that overlap
// What device code is being compiled for. (Nothing in host code depends on it.)
#ifdef __CUDA_ARCH__
constexpr int kDeviceArch = __CUDA_ARCH__ / 10;
#else
constexpr int kDeviceArch = kClusterArch;
#endif

// For 32 bits. Compilers work out again at each use what they could keep: they count registers, not a loop's
// instructions.
template <typename T>
__device__ inline void keep_in_register(T& value) {
#ifdef BNEXT_SIMT
  (void)value;
#else
  static_assert(sizeof value == 4, "one register");
  asm volatile("" : "+r"(value));
#endif
}

// All shared memory is dynamic: its size is in the plan, where tests can see it, and the shim can poison it.
__device__ inline unsigned char* shared_memory() {
#ifdef BNEXT_SIMT
  return simt::shared_memory();
#else
  extern __shared__ __align__(16) unsigned char bnext_shared_memory[];
  return bnext_shared_memory;
#endif
}

// Of an SM's memory, bytes that should be shared: all, where blocks keep data there; or what the blocks of streaming
// that run at once take, and the rest for L1, where loads on their way arrive. The same for all kernels of a pass: an
// SM must be empty to change it.
constexpr int64_t kAllShared = INT64_MAX;
constexpr int64_t kSomeShared = kStreamingBlocksPerSm * (kStreamingSharedBytes + kReservedSharedBytes);

// Blocks of `cluster` neighbours run together and see each other's shared memory. Cooperative: all blocks run at once,
// or the launch is an error. A kernel that overlaps the one before it may begin before that has ended: see overlap.cuh.
struct LaunchShape {
  unsigned blocks = 0, threads = 0, cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false, overlaps = false;
  int64_t sm_shared_bytes = kSomeShared;
};

#ifdef BNEXT_SIMT
template <auto kKernel, typename Args>
cudaError_t launch_kernel(const LaunchShape& shape, cudaStream_t stream, const Args& args) {
  simt::launch(kKernel, shape.blocks, shape.threads, shape.cluster, shape.cooperative, shape.shared_bytes,
               shape.overlaps, stream, args);
  return cudaGetLastError();
}

template <auto kKernel>
cudaError_t prepare_kernel(int64_t) {
  return cudaSuccess;
}

// What the shim can run is up to those who ask for plans.
template <auto kKernel>
int count_clusters(const LaunchShape&) {
  return 1;
}
template <auto kKernel>
int count_blocks(const LaunchShape&) {
  return 1;
}
template <auto kKernel>
int compiled_arch() {
  return simt::has_ptx() ? simt::ptx_arch() : kClusterArch;
}
#else

// The runtime remembers an error until somebody asks, and this one is not for somebody else to find.
inline cudaError_t keep_to_ourselves(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// What a kernel must be told once per device: that it may have large shared memory and large clusters, and how much of
// an SM's memory should be shared, which is always the same for a kernel. It is loaded by that, if it was not yet.
template <auto kKernel>
cudaError_t prepare_kernel(int64_t sm_shared_bytes) {
  static std::atomic<uint64_t> prepared{0};  // one bit per device
  int device = 0, shared_bytes = 0, per_sm = 0, arch_major = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (error != cudaSuccess || (device < 64 && (prepared.load(std::memory_order_relaxed) & bit) != 0)) return error;
  const void* kernel = reinterpret_cast<const void*>(kKernel);
  auto attempt = [&](auto call) {
    if (error == cudaSuccess) error = call();
  };
  attempt([&] { return cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); });
  attempt([&] { return cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device); });
  attempt([&] { return cudaDeviceGetAttribute(&arch_major, cudaDevAttrComputeCapabilityMajor, device); });
  attempt([&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes); });
  attempt([&] {
    const int percent = sm_shared_bytes < per_sm ? static_cast<int>(ceil_div(100 * sm_shared_bytes, per_sm)) : 100;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent);
  });
  // Where that is refused, count_clusters finds no clusters of 16.
  if (arch_major >= 9)
    keep_to_ourselves(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// No kernel is two of these.
inline cudaLaunchConfig_t launch_config(const LaunchShape& shape, cudaStream_t stream, cudaLaunchAttribute& attribute) {
  attribute = {};
  if (shape.overlaps) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  } else if (shape.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.overlaps || shape.cooperative || shape.cluster > 1 ? 1 : 0;
  return config;
}

// The only launch of the package.
template <auto kKernel, typename Args>
cudaError_t launch_kernel(const LaunchShape& shape, cudaStream_t stream, const Args& args) {
  cudaError_t error = prepare_kernel<kKernel>(shape.sm_shared_bytes);
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = launch_config(shape, stream, attribute);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kKernel, args);
  return keep_to_ourselves(error);
}

// The __CUDA_ARCH__ that a kernel's code was compiled with; 0 if the current device has none. The device's architecture
// does not tell: a driver also runs what it has translated from the PTX of an older one. ptxVersion is that number;
// binaryVersion is the device's after translation.
template <auto kKernel>
int compiled_arch() {
  cudaFuncAttributes compiled = {};
  const cudaError_t error = cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kKernel));
  return keep_to_ourselves(error) == cudaSuccess ? compiled.ptxVersion : 0;
}

// Clusters of this shape that the current device can run at once; 0 if it cannot run any.
template <auto kKernel>
int count_clusters(const LaunchShape& shape) {
  int count = 0;
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = launch_config(shape, nullptr, attribute);
  if (compiled_arch<kKernel>() < kClusterArch) return 0;
  cudaError_t error = prepare_kernel<kKernel>(shape.sm_shared_bytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kKernel, &config);
  return keep_to_ourselves(error) == cudaSuccess ? count : 0;
}

// Blocks of this shape that an SM of the current device has room for; 0 if it cannot run any.
template <auto kKernel>
int count_blocks(const LaunchShape& shape) {
  int count = 0;
  cudaError_t error = prepare_kernel<kKernel>(shape.sm_shared_bytes);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kKernel, static_cast<int>(shape.threads),
                                                          shape.shared_bytes);
  }
  return keep_to_ourselves(error) == cudaSuccess ? count : 0;
}
#endif

}  // namespace bnext::cuda
