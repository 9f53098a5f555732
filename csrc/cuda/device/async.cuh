// Copies from global to shared memory that take no registers and go on while the thread does something else. Before
// sm_80 they are plain loads and stores.
#pragma once

#include "pack.cuh"

namespace bnext::cuda {

// How long L2 should keep what is copied, in the form that copies take. Where they have such a policy, ptxas
// (CUDA 13.0) may still add to their address a uniform register, a number that only the launch knows and that is the
// same for all threads, in a way that does not go with it: an H200 takes that for an illegal instruction. On sm_90 it
// does so for no address that is used here, as tests/test_cuda_static.py sees to; from sm_100 on it does, so there is
// no policy.
#if !defined(BNEXT_SIMT) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
#define BNEXT_CACHE_POLICY
using CachePolicy = uint64_t;
__device__ inline CachePolicy cache_policy(Cache cache) {
  CachePolicy keep, last_use;  // constants, which only ptxas knows
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(keep));
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(last_use));
  return cache == Cache::kLastUse ? last_use : keep;
}
#else
using CachePolicy = Cache;
__device__ inline CachePolicy cache_policy(Cache cache) { return cache; }
#endif

// 16 bytes. Only this thread may look at `to`, and only after wait_async: for others it takes a barrier as well.
template <typename T>
__device__ inline void copy_async(SharedAddress to, const T* from, CachePolicy policy) {
#ifdef BNEXT_SIMT
  simt::copy_async(to, simt::check_load(from, kPackBytes), kPackBytes, policy == Cache::kKeep);
#elif defined(BNEXT_CACHE_POLICY)
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "l"(policy)
               : "memory");
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
#else
  Pack<T, kPackBytes / sizeof(T)> pack;
  policy == Cache::kLastUse ? load_pack<Cache::kLastUse>(pack, from) : load_pack<Cache::kKeep>(pack, from);
  store_slot(to, pack);
#endif
}

// L2 should have the line that this lies in: 128 bytes, as CUB's transforms take it. Nobody waits for it.
template <typename T>
__device__ inline void ask_l2(const T* from) {
#ifdef BNEXT_SIMT
  simt::ask_l2(from);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
#endif
}

// Ends a group of copies: all since the last call, or none.
__device__ inline void commit_async() {
#ifdef BNEXT_SIMT
  simt::commit_async();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

#if !defined(BNEXT_SIMT) && __CUDA_ARCH__ >= 800
template <int kGroups>
__device__ inline void wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}
#endif

// Waits for all groups of this thread but the last so many, or the last kMostGroups where that is less.
__device__ inline void wait_async(int groups BNEXT_AND_CALLER) {
#ifdef BNEXT_SIMT
  simt::wait_async(groups < kMostGroups ? groups : kMostGroups, file, line);
#elif __CUDA_ARCH__ >= 800
  static_assert(kMostGroups == 6, "a case for each");
  if (groups >= kMostGroups) return wait_group<kMostGroups>();  // nearly always
  switch (groups) {
    case 0:
      return wait_group<0>();
    case 1:
      return wait_group<1>();
    case 2:
      return wait_group<2>();
    case 3:
      return wait_group<3>();
    case 4:
      return wait_group<4>();
    default:
      return wait_group<kMostGroups - 1>();
  }
#endif
}

}  // namespace bnext::cuda
