// A GPU for kernels that are compiled by g++: one fiber per thread, run one at a time in a random order that a seed
// decides. Included by csrc/cuda/device/portability.cuh in place of the CUDA runtime.
//
// It reports: a barrier or shuffle that some threads do not reach, or reach elsewhere; a partial warp; a misaligned
// pack; a load or store outside the tensors of the call; an element stored twice; shared memory used beyond its size,
// or that of a block that has ended; an asynchronous copy that nobody waits for; a wait for other blocks that nothing
// will end; a store, or a look at what a kernel before has left, in a kernel that may run at the same time and has not
// waited. Shared memory starts as NaN; asynchronous copies arrive when they are waited for, no sooner, and leave NaN
// until then: a value read too early shows in the result, and so does a missing barrier, since some seeds run the
// reader first. The blocks of a cluster, and of a cooperative launch, run at the same time, others one by one, and
// kernels one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ptx.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
#define __syncthreads() simt::barrier(__FILE__, __LINE__)
#define __grid_constant__
#define __shfl_sync(mask, value, lane) simt::shuffle(mask, value, lane, __LINE__)
#define __shfl_xor_sync(mask, value, distance) simt::shuffle(mask, value, threadIdx.x ^ (distance), __LINE__)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
using cudaStream_t = void*;
cudaError_t cudaGetLastError();

namespace simt {

struct Index {
  unsigned x;
};
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

void barrier(const char* file, int line);
unsigned char* shared_memory();

// Both halves of the barrier of a cluster, or of all blocks of a cooperative launch.
void cluster_arrive(const char* file, int line);
void cluster_wait(const char* file, int line);
// What lies at `own`'s place in the shared memory of another block of the cluster.
const void* cluster_memory(const void* own, size_t bytes, unsigned rank);

// Stores what other blocks may look at, and see as a whole; waits until there is such a word in global memory.
void post(void* to, const void* from, size_t bytes);
void await(const unsigned* word, unsigned bits, const char* file, int line);

// The kernels before have ended: what they have left may be looked at, and what they read may be overwritten.
void wait_for_kernels(const char* file, int line);
// Ends the launch with an error in a kernel that overlaps others, and a thread that has not waited for them.
void check_dependency();

// keeps: the cache should, for it will be read again.
void copy_async(void* to, const void* from, size_t bytes, bool keeps = false);
// The cache should have what lies there, which this block will load.
void ask_l2(const void* from);
void commit_async();
// Until all groups of this thread but the last `groups` have arrived.
void wait_async(int groups, const char* file, int line);

// The thread begins so many clocks late.
void count_late_thread(int clocks);

// Leaves `bits` for the other lanes, waits for all of them, returns what lane `from` has left.
uint64_t exchange(unsigned mask, uint64_t bits, unsigned from, int line);

template <typename T>
T shuffle(unsigned mask, T value, unsigned from, int line) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, from, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Return their argument, or end the launch with an error.
const void* check_load(const void* from, size_t bytes);
void* check_store(void* to, size_t bytes);

void run_grid(unsigned grid, unsigned block, unsigned cluster, bool cooperative, size_t shared_bytes, bool overlaps,
              const std::function<void()>& kernel);

template <typename Args>
void launch(void (*kernel)(Args), unsigned grid, unsigned block, unsigned cluster, bool cooperative,
            size_t shared_bytes, bool overlaps, cudaStream_t, const Args& args) {
  run_grid(grid, block, cluster, cooperative, shared_bytes, overlaps,
           [=] { has_ptx() ? run_ptx(reinterpret_cast<const void*>(kernel), &args, sizeof args) : kernel(args); });
}

// ---- for PTX, which does not say what it loads and stores -----------------------------------------------------------

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& what);

// Check an access by its address. What kernels leave for each other has to be loaded from L2; and stores there arrive
// when some thread releases them, or when the block has ended.
const void* load_anywhere(const void* from, size_t bytes, bool from_l2);
void store_anywhere(void* to, const void* value, size_t bytes);
void post_anywhere(void* to, const void* value, size_t bytes);
// What lies so many bytes into the shared memory of this block, or of one of the cluster.
unsigned char* touch_shared(uint64_t offset, size_t bytes, bool stores, int rank = -1, const void* value = nullptr);

// Adds to a word in global memory, with which all stores so far arrive.
void arrive_at(unsigned* word, unsigned amount, const char* file, int line);
// Until the word is no longer what was seen there.
void await_change(const unsigned* word, unsigned seen, const char* file, int line);

// By a thread that ends.
void count_instructions(int64_t count);

// What the barrier of a cooperative launch needs; nullptr in other launches.
unsigned* grid_memory();

// ---- for the driver ----------------------------------------------------------------------------------------------

struct Session {
  uint64_t seed = 0;
  // "file.cuh:line file.cuh:line": as if these barriers, or waits for copies, had been deleted.
  std::string skipped_barriers;
  int refused_launch = 0;  // this one, counted from 1, is an error and runs nothing
};

// Forgets memory, counts and errors of the session before.
void begin(const Session& session);
// Bytes that kernels may load, or store to, each of them once.
void allow_load(const void* data, size_t bytes);
void allow_store(const void* data, size_t bytes);
// Other memory of the call, and whether kernels leave something there for each other.
void allow_any(const void* data, size_t bytes, bool left = false);

const std::string& error();
int64_t bytes_loaded();
int64_t bytes_stored();
int64_t bytes_kept();
// By threads that had copies on their way.
int64_t bytes_stored_meanwhile();
// What the cache was asked for; by blocks that had loaded it before; and by blocks that did not load it afterwards.
int64_t num_asked();
int64_t num_asked_late();
int64_t num_asked_in_vain();
// Of PTX: by all threads, and by the one that had most.
struct Instructions {
  int64_t all = 0, most = 0;
};
Instructions instructions();
// How many threads began late, by how many clocks at least and at most, and the first block of them.
struct Late {
  int64_t threads = 0, least_clocks = INT64_MAX, most_clocks = 0, first_block = INT64_MAX;
};
Late late();
// Barriers and waits that some thread has reached since the library was loaded, each as "file.cuh:line".
const std::vector<std::string>& barriers();

}  // namespace simt
