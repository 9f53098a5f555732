// A CUDA runtime whose devices are the SIMT shim: loaded before NVIDIA's library (LD_PRELOAD), it takes its place for a
// CUDA build of PyTorch and of bnext. What torch and bnext do on the host is then run as it is, down to each launch's
// attributes. A device's memory is the host's, and kernels of bnext run as the C++ compiler makes them. No other kernel
// runs, and torch's operators start none: see operators.py. What is not defined here is NVIDIA's, and says that there
// is no driver.
//
// Streams are queues. Work waits there until somebody waits for it; or it runs when other work comes, as a seed
// decides. It refuses what a device would: memory and clusters that a kernel has not been allowed, cooperative launches
// that are too large, calls that end a capture.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda/kernels/kernel_args.h"
#include "runtime.h"

namespace {

constexpr int kNumDevices = 2, kArch = 90, kWarp = 32, kNumSms = 16, kThreadsPerSm = 2048, kMaxThreads = 1024;
constexpr int kRegistersPerSm = 64 << 10, kL2Bytes = 50 << 20;
constexpr size_t kMemoryBytes = size_t{4} << 30, kSharedPerBlock = 48 << 10, kSharedOptIn = 227 << 10;
constexpr size_t kSharedPerSm = 228 << 10, kSharedReserved = 1 << 10, kAlignment = 512;
constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;

using Work = std::function<void()>;

struct Graph {
  std::vector<Work> work;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  bool broken = false;
};

struct Stream {
  int device = 0;
  std::deque<Work> work;  // an empty one sleeps until somebody waits for the stream
  Graph* capture = nullptr;
};

// A place in a stream's queue.
struct Marker {
  Stream* stream;
  bool passed = false;
  std::chrono::steady_clock::time_point when = {};

  void pass() {
    passed = true;
    when = std::chrono::steady_clock::now();
  }
};

struct Event {
  std::shared_ptr<Marker> marker;  // of the last record, if it was not captured
  Graph* capture = nullptr;
};

struct Kernel {
  std::string name;
  size_t shared_bytes = kSharedPerBlock;  // that it may have
  bool large_clusters = false;
};

struct Allocation {
  size_t bytes;
  int device;  // -1: the host's
};

// The one of the process. Never destroyed: others are, at its end, and call.
struct Runtime {
  std::recursive_mutex mutex;
  std::mt19937_64 random;
  Stream default_streams[kNumDevices];
  std::set<Stream*> streams;
  std::set<Graph*> captures;  // under way
  std::map<uintptr_t, Allocation> memory;
  std::unordered_map<const void*, Kernel> kernels;
  cudaError_t broken = cudaSuccess;  // by a kernel; for good
  int stream_sms = kNumSms;          // that the work of a stream may use
  std::string unloadable;            // kernels with this in their names cannot be loaded
};

Runtime& runtime() {
  static Runtime* const the_one = [] {
    auto* made = new Runtime;
    const char* seed = std::getenv("BNEXT_SHIM_SEED");
    made->random.seed(seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10));
    const char* sms = std::getenv("BNEXT_SHIM_STREAM_SMS");
    if (sms != nullptr) made->stream_sms = std::atoi(sms);
    const char* unloadable = std::getenv("BNEXT_SHIM_UNLOADABLE");
    if (unloadable != nullptr) made->unloadable = unloadable;
    for (int d = 0; d < kNumDevices; ++d) {
      made->default_streams[d].device = d;
      made->streams.insert(&made->default_streams[d]);
    }
    return made;
  }();
  return *the_one;
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

template <typename T>
cudaError_t give(T* to, T value) {
  if (to != nullptr) *to = value;
  return cudaSuccess;
}

// ---- streams ------------------------------------------------------------------------------------------------------

Stream& stream_of(cudaStream_t handle) {
  const bool is_default = handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
  return is_default ? runtime().default_streams[current_device] : *reinterpret_cast<Stream*>(handle);
}

void run_first(Stream& stream) {
  const Work work = std::move(stream.work.front());
  stream.work.pop_front();
  if (work) work();
}

void run_all(Stream& stream) {
  while (!stream.work.empty()) run_first(stream);
}

void run_until(const Marker& marker) {
  while (!marker.passed) run_first(*marker.stream);
}

void run_device(int device) {
  for (Stream* stream : runtime().streams) {
    if (stream->device == device) run_all(*stream);
  }
}

// As much as a device may have done meanwhile.
void run_some() {
  auto& random = runtime().random;
  for (uint64_t n = random() % 3; n > 0; --n) {
    std::vector<Stream*> busy;
    for (Stream* stream : runtime().streams) {
      if (!stream->work.empty() && stream->work.front()) busy.push_back(stream);
    }
    if (busy.empty()) return;
    run_first(*busy[random() % busy.size()]);
  }
}

cudaError_t enqueue(Stream& stream, Work work) {
  if (stream.capture != nullptr) {
    if (stream.capture->broken) return result(cudaErrorStreamCaptureInvalidated);
    stream.capture->work.push_back(std::move(work));
    return cudaSuccess;
  }
  if (runtime().broken != cudaSuccess) return result(runtime().broken);
  stream.work.push_back(std::move(work));
  run_some();
  return cudaSuccess;
}

// What no captured stream may be asked.
cudaError_t refuse_if_captured(Stream& stream) {
  if (stream.capture == nullptr) return cudaSuccess;
  stream.capture->broken = true;
  return result(cudaErrorStreamCaptureUnsupported);
}

// What no thread may do while any stream is captured, but one that says that it means it.
cudaError_t refuse_while_capturing() {
  if (capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  for (Graph* capture : runtime().captures) {
    if (capture->mode != cudaStreamCaptureModeGlobal) continue;
    capture->broken = true;
    error = result(cudaErrorStreamCaptureUnsupported);
  }
  return error;
}

// ---- kernels ------------------------------------------------------------------------------------------------------

decltype(&simt_run_kernel) find_shim() {
  const char* path = std::getenv("BNEXT_SHIM_LIBRARY");
  void* library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* found = library == nullptr ? nullptr : dlsym(library, "simt_run_kernel");
  if (found == nullptr) {
    std::fprintf(stderr, "BNEXT_SHIM_LIBRARY should be the shim's library: %s\n",
                 path == nullptr ? "unset" : dlerror());
    std::abort();
  }
  return reinterpret_cast<decltype(&simt_run_kernel)>(found);
}

struct Launch {
  std::string name;
  int device;
  unsigned blocks, threads, cluster = 1;
  bool cooperative = false, overlaps = false;
  size_t shared_bytes;
  std::vector<unsigned char> args;
};

void run_kernel(const Launch& launch) {
  static const auto shim = find_shim();
  std::vector<simt::Memory> memory;
  for (const auto& [data, allocation] : runtime().memory) {
    if (allocation.device == launch.device) memory.push_back({reinterpret_cast<void*>(data), allocation.bytes});
  }
  const simt::KernelLaunch described = {launch.name.c_str(), launch.blocks,   launch.threads,      launch.cluster,
                                        launch.cooperative,  launch.overlaps, launch.shared_bytes, launch.args.data(),
                                        memory.data(),       memory.size(),   runtime().random()};
  const std::string error = shim(&described);
  if (error.empty()) return;
  std::fprintf(stderr, "the shim on %s: %s\n", launch.name.c_str(), error.c_str());
  runtime().broken = cudaErrorLaunchFailure;
}

int blocks_on_sm(int threads, size_t shared_bytes) {
  const size_t by_memory = kSharedPerSm / (shared_bytes + kSharedReserved);
  return static_cast<int>(std::min<size_t>(by_memory, kThreadsPerSm / threads));
}

// Fills in what the attributes say. Returns an error where a device would refuse the launch.
cudaError_t read_config(const cudaLaunchConfig_t& config, const Kernel& kernel, Launch& launch) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeClusterDimension:
        launch.cluster = value.clusterDim.x;
        if (value.clusterDim.y != 1 || value.clusterDim.z != 1) return cudaErrorInvalidValue;
        break;
      case cudaLaunchAttributeCooperative:
        launch.cooperative = value.cooperative != 0;
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        launch.overlaps = value.programmaticStreamSerializationAllowed != 0;
        break;
      default:
        return cudaErrorNotSupported;
    }
  }
  launch.blocks = grid.x;
  launch.threads = block.x;
  launch.shared_bytes = config.dynamicSmemBytes;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) return cudaErrorInvalidConfiguration;
  if (block.x == 0 || block.x > kMaxThreads || launch.shared_bytes > kernel.shared_bytes) return cudaErrorInvalidValue;
  const unsigned largest = kernel.large_clusters ? kLargestCluster : kPortableCluster;
  if (launch.cluster == 0 || launch.cluster > largest || grid.x % launch.cluster != 0)
    return cudaErrorInvalidClusterSize;
  return cudaSuccess;
}

cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* function, void** args) {
  const auto found = runtime().kernels.find(function);
  if (found == runtime().kernels.end()) return result(cudaErrorInvalidDeviceFunction);
  const Kernel& kernel = found->second;
  Stream& stream = stream_of(config.stream);
  if (kernel.name.find("spin_kernel") != std::string::npos) return enqueue(stream, nullptr);  // torch.cuda._sleep
  if (kernel.name.rfind("_ZN5bnext", 0) != 0) {
    std::fprintf(stderr, "not a kernel of bnext: %s\n", kernel.name.c_str());
    return result(cudaErrorNotSupported);
  }
  Launch launch;
  launch.name = kernel.name;
  launch.device = current_device;
  if (stream.device != current_device) return result(cudaErrorInvalidResourceHandle);
  const cudaError_t error = read_config(config, kernel, launch);
  if (error != cudaSuccess) return result(error);
  const int on_sm = blocks_on_sm(static_cast<int>(launch.threads), launch.shared_bytes);
  const auto at_once = static_cast<unsigned>(runtime().stream_sms * on_sm);
  if (launch.cooperative && launch.blocks > at_once) return result(cudaErrorCooperativeLaunchTooLarge);
  if (launch.cluster > at_once) return result(cudaErrorInvalidClusterSize);
  const auto* bytes = static_cast<const unsigned char*>(args[0]);
  launch.args.assign(bytes, bytes + sizeof(bnext::cuda::KernelArgs));
  return enqueue(stream, [launch] { run_kernel(launch); });
}

const Allocation* find_memory(const void* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  auto next = runtime().memory.upper_bound(address);
  if (next == runtime().memory.begin()) return nullptr;
  --next;
  return address < next->first + next->second.bytes ? &next->second : nullptr;
}

size_t used_bytes(int device) {
  size_t used = 0;
  for (const auto& [data, allocation] : runtime().memory) used += allocation.device == device ? allocation.bytes : 0;
  return used;
}

cudaError_t allocate(void** to, size_t bytes, int device) {
  void* data = nullptr;
  if (used_bytes(device) + bytes > kMemoryBytes ||
      posix_memalign(&data, kAlignment, std::max(bytes, kAlignment)) != 0) {
    return result(cudaErrorMemoryAllocation);
  }
  std::memset(data, 0xff, bytes);
  runtime().memory[reinterpret_cast<uintptr_t>(data)] = {bytes, device};
  return give(to, data);
}

cudaError_t release(void* data) {
  if (data == nullptr) return cudaSuccess;
  for (int d = 0; d < kNumDevices; ++d) run_device(d);
  if (runtime().memory.erase(reinterpret_cast<uintptr_t>(data)) == 0) return result(cudaErrorInvalidValue);
  std::free(data);
  return cudaSuccess;
}

bool is_pageable(const void* at) { return find_memory(at) == nullptr; }

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  if (is_pageable(from)) {
    const auto* first = static_cast<const unsigned char*>(from);
    const auto staged = std::make_shared<std::vector<unsigned char>>(first, first + bytes);
    return enqueue(stream, [=] { std::memcpy(to, staged->data(), bytes); });
  }
  if (is_pageable(to)) {
    const cudaError_t error = refuse_if_captured(stream);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error = enqueue(stream, [=] { std::memmove(to, from, bytes); });
  if (error == cudaSuccess && is_pageable(to)) run_all(stream);
  return error == cudaSuccess ? result(runtime().broken) : error;
}

}  // namespace

extern "C" {

// ---- devices --------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { return give(count, kNumDevices); }

cudaError_t cudaGetDevice(int* device) { return give(device, current_device); }

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kNumDevices) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  cudaDeviceProp p = {};
  std::snprintf(p.name, sizeof p.name, "SIMT shim %d", device);
  p.uuid.bytes[0] = static_cast<char>(device + 1);
  p.totalGlobalMem = kMemoryBytes;
  p.sharedMemPerBlock = kSharedPerBlock;
  p.sharedMemPerBlockOptin = kSharedOptIn;
  p.sharedMemPerMultiprocessor = kSharedPerSm;
  p.reservedSharedMemPerBlock = kSharedReserved;
  p.regsPerBlock = p.regsPerMultiprocessor = kRegistersPerSm;
  p.warpSize = kWarp;
  p.maxThreadsPerBlock = kMaxThreads;
  p.maxThreadsPerMultiProcessor = kThreadsPerSm;
  p.major = kArch / 10;
  p.minor = kArch % 10;
  p.multiProcessorCount = kNumSms;
  p.l2CacheSize = kL2Bytes;
  p.cooperativeLaunch = p.clusterLaunch = p.unifiedAddressing = p.concurrentKernels = 1;
  p.pciDeviceID = device;
  return give(properties, p);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return give(value, kArch / 10);
    case cudaDevAttrComputeCapabilityMinor:
      return give(value, kArch % 10);
    case cudaDevAttrMultiProcessorCount:
      return give(value, kNumSms);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return give(value, kThreadsPerSm);
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return give(value, kRegistersPerSm);
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return give(value, static_cast<int>(kSharedPerBlock));
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return give(value, static_cast<int>(kSharedOptIn));
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return give(value, static_cast<int>(kSharedPerSm));
    case cudaDevAttrL2CacheSize:
      return give(value, kL2Bytes);
    case cudaDevAttrMemoryClockRate:
    case cudaDevAttrGlobalMemoryBusWidth:
      return give(value, 0);
    case cudaDevAttrCooperativeLaunch:
      return give(value, 1);
    default:
      std::fprintf(stderr, "device attribute %d is not known to the shim\n", attribute);
      return result(cudaErrorInvalidValue);
  }
}

cudaError_t cudaDriverGetVersion(int* version) { return give(version, CUDART_VERSION); }
cudaError_t cudaRuntimeGetVersion(int* version) { return give(version, CUDART_VERSION); }

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return give(can, 0); }

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  give(least, 0);
  return give(greatest, 0);
}

cudaError_t cudaDeviceSynchronize() {
  const Lock lock(runtime().mutex);
  const cudaError_t error = refuse_while_capturing();
  if (error != cudaSuccess) return error;
  run_device(current_device);
  return result(runtime().broken);
}

// Of the driver's library, whose name this one bears.
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  give(flags, 0u);
  give(active, 1);
  return 0;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = dlsym(RTLD_DEFAULT, name);
  give(found, *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

// ---- memory
// -----------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** to, size_t bytes) {
  const Lock lock(runtime().mutex);
  const cudaError_t error = refuse_while_capturing();
  return error == cudaSuccess ? allocate(to, bytes, current_device) : error;
}

cudaError_t cudaFree(void* data) {
  const Lock lock(runtime().mutex);
  const cudaError_t error = data == nullptr ? cudaSuccess : refuse_while_capturing();
  return error == cudaSuccess ? release(data) : error;
}

cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
  const Lock lock(runtime().mutex);
  return allocate(to, bytes, -1);
}

cudaError_t cudaFreeHost(void* data) {
  const Lock lock(runtime().mutex);
  return release(data);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock(runtime().mutex);
  give(free, kMemoryBytes - used_bytes(current_device));
  return give(total, kMemoryBytes);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* at) {
  const Lock lock(runtime().mutex);
  const Allocation* memory = find_memory(at);
  cudaPointerAttributes found = {};
  found.type = memory == nullptr    ? cudaMemoryTypeUnregistered
               : memory->device < 0 ? cudaMemoryTypeHost
                                    : cudaMemoryTypeDevice;
  found.device = memory == nullptr || memory->device < 0 ? 0 : memory->device;
  found.devicePointer = found.hostPointer = const_cast<void*>(at);
  return give(attributes, found);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  return copy(to, from, bytes, stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const Lock lock(runtime().mutex);
  const cudaError_t error = copy(to, from, bytes, nullptr);
  run_all(stream_of(nullptr));
  return error;
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  return enqueue(stream_of(stream), [=] { std::memset(to, value, bytes); });
}

// ---- streams and events
// -------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* to, unsigned, int) {
  const Lock lock(runtime().mutex);
  auto* stream = new Stream;
  stream->device = current_device;
  runtime().streams.insert(stream);
  return give(to, reinterpret_cast<cudaStream_t>(stream));
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* to, unsigned flags) {
  return cudaStreamCreateWithPriority(to, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* to) { return cudaStreamCreateWithPriority(to, 0, 0); }

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return give(priority, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  Stream& stream = stream_of(handle);
  run_all(stream);
  runtime().streams.erase(&stream);
  delete &stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  Stream& stream = stream_of(handle);
  const cudaError_t error = refuse_if_captured(stream);
  if (error != cudaSuccess) return error;
  run_all(stream);
  return result(runtime().broken);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  Stream& stream = stream_of(handle);
  const cudaError_t error = refuse_if_captured(stream);
  if (error != cudaSuccess) return error;
  return stream.work.empty() ? result(runtime().broken) : cudaErrorNotReady;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* to, unsigned) {
  return give(to, reinterpret_cast<cudaEvent_t>(new Event));
}
cudaError_t cudaEventCreate(cudaEvent_t* to) { return cudaEventCreateWithFlags(to, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t of) {
  const Lock lock(runtime().mutex);
  Stream& stream = stream_of(of);
  auto& event = *reinterpret_cast<Event*>(handle);
  event.capture = stream.capture;
  event.marker = nullptr;
  if (stream.capture != nullptr) return cudaSuccess;
  const auto marker = event.marker = std::make_shared<Marker>(Marker{&stream, false});
  return enqueue(stream, [marker] { marker->pass(); });
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

// A captured graph's work keeps one order, that of its calls.
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t of, unsigned) {
  const Lock lock(runtime().mutex);
  Stream& stream = stream_of(handle);
  const auto& event = *reinterpret_cast<Event*>(of);
  if (event.capture != nullptr && runtime().captures.count(event.capture) != 0) {
    stream.capture = event.capture;
    return cudaSuccess;
  }
  const auto marker = event.marker;
  if (marker == nullptr || marker->passed) return cudaSuccess;
  if (stream.capture != nullptr) return result(cudaErrorStreamCaptureIsolation);
  return enqueue(stream, [marker] { run_until(*marker); });
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const Lock lock(runtime().mutex);
  const auto& event = *reinterpret_cast<Event*>(handle);
  if (event.capture != nullptr) return result(cudaErrorCapturedEvent);
  const cudaError_t error = refuse_while_capturing();
  if (error != cudaSuccess) return error;
  return event.marker == nullptr || event.marker->passed ? result(runtime().broken) : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Lock lock(runtime().mutex);
  const auto& event = *reinterpret_cast<Event*>(handle);
  if (event.capture != nullptr) return result(cudaErrorCapturedEvent);
  if (event.marker != nullptr) run_until(*event.marker);
  return result(runtime().broken);
}

// Of the host, which means nothing.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t last) {
  const Lock lock(runtime().mutex);
  const auto from = reinterpret_cast<Event*>(first)->marker, to = reinterpret_cast<Event*>(last)->marker;
  if (from == nullptr || to == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (!from->passed || !to->passed) return cudaErrorNotReady;
  return give(milliseconds, std::chrono::duration<float, std::milli>(to->when - from->when).count());
}

// ---- graphs
// -------------------------------------------------------------------------------------------------------------

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Lock lock(runtime().mutex);
  Stream& stream = stream_of(handle);
  if (stream.capture != nullptr || &stream == &stream_of(nullptr)) return result(cudaErrorStreamCaptureUnsupported);
  auto* graph = new Graph;
  graph->mode = mode;
  runtime().captures.insert(graph);
  stream.capture = graph;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* to) {
  const Lock lock(runtime().mutex);
  Graph* graph = stream_of(handle).capture;
  if (graph == nullptr) return result(cudaErrorIllegalState);
  for (Stream* stream : runtime().streams) {
    if (stream->capture == graph) stream->capture = nullptr;
  }
  runtime().captures.erase(graph);
  give(to, graph->broken ? nullptr : reinterpret_cast<cudaGraph_t>(graph));
  return graph->broken ? result(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* num_dependencies) {
  const Lock lock(runtime().mutex);
  Graph* capture = stream_of(handle).capture;
  give(id, static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(capture)));
  give(graph, reinterpret_cast<cudaGraph_t>(capture));
  give(dependencies, static_cast<const cudaGraphNode_t*>(nullptr));
  give(edges, static_cast<const cudaGraphEdgeData*>(nullptr));
  give(num_dependencies, size_t{0});
  return give(status, capture == nullptr ? cudaStreamCaptureStatusNone
                      : capture->broken  ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return give(count, reinterpret_cast<Graph*>(graph)->work.size());
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* to, cudaGraph_t graph, unsigned long long) {
  return give(to, reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph))));
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  for (const Work& work : reinterpret_cast<Graph*>(handle)->work) {
    const cudaError_t error = enqueue(stream_of(stream), work);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return cudaGraphDestroy(reinterpret_cast<cudaGraph_t>(graph));
}

// ---- kernels
// --------------------------------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const Lock lock(runtime().mutex);
  runtime().kernels[function].name = name;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const Lock lock(runtime().mutex);
  const cudaError_t error = refuse_while_capturing();
  if (error != cudaSuccess) return error;
  Kernel& kernel = runtime().kernels.at(function);
  const std::string& unloadable = runtime().unloadable;
  if (!unloadable.empty() && std::string(kernel.name).find(unloadable) != std::string::npos)
    return result(cudaErrorInvalidKernelImage);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (static_cast<size_t>(value) > kSharedOptIn) return result(cudaErrorInvalidValue);
    kernel.shared_bytes = static_cast<size_t>(value);
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    kernel.large_clusters = value != 0;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  const Lock lock(runtime().mutex);
  const cudaError_t error = refuse_while_capturing();
  if (error != cudaSuccess) return error;
  cudaFuncAttributes found = {};
  found.ptxVersion = found.binaryVersion = kArch;
  found.maxThreadsPerBlock = kMaxThreads;
  return give(attributes, found);
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* function, const cudaLaunchConfig_t* config) {
  const Lock lock(runtime().mutex);
  Launch launch;
  cudaError_t error = refuse_while_capturing();
  if (error == cudaSuccess) error = read_config(*config, runtime().kernels.at(function), launch);
  if (error != cudaSuccess) return result(error);
  const int blocks = blocks_on_sm(static_cast<int>(launch.threads), launch.shared_bytes);
  return give(count, blocks * kNumSms / static_cast<int>(launch.cluster));
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int threads,
                                                                   size_t shared_bytes, unsigned) {
  return give(count, blocks_on_sm(threads, shared_bytes));
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  const Lock lock(runtime().mutex);
  return launch_kernel(*config, function, args);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared_bytes,
                             cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelExC(&config, function, args);
}

// What kernel<<<...>>> becomes: of torch's own kernels.
thread_local struct {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return give(kernel, reinterpret_cast<cudaKernel_t>(const_cast<void*>(function)));
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared_bytes,
                               cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, args, shared_bytes, stream);
}

}  // extern "C"
