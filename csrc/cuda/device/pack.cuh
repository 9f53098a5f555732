// The one way to move activations: packs of 16 bytes, or of one element, with cache hints.
#pragma once

#include <cstring>

#include "math.cuh"

namespace bnext::cuda {

constexpr int kPackBytes = 16;

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T value[kVec];
};

// How long a line should stay in L2. What the apply pass reads or writes is not read again by this call, and should not
// push out what the reduce pass has left there for the blocks that come later.
enum class Cache : uint8_t { kKeep, kLastUse };

template <typename T>
__device__ inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0;
}

template <Cache kCache, typename T, int kVec>
__device__ inline void load_pack(Pack<T, kVec>& to, const T* from) {
#ifdef BNEXT_SIMT
  to = *static_cast<const Pack<T, kVec>*>(simt::check_load(from, sizeof to));
#else
  if constexpr (sizeof to == kPackBytes) {
    const uint4* p = reinterpret_cast<const uint4*>(from);
    const uint4 bits = kCache == Cache::kLastUse ? __ldcs(p) : __ldg(p);
    memcpy(&to, &bits, sizeof to);
  } else {
    to = *reinterpret_cast<const Pack<T, kVec>*>(from);
  }
#endif
}

template <typename T, int kVec>
__device__ inline void store_pack(T* to, const Pack<T, kVec>& from) {
#ifdef BNEXT_SIMT
  *static_cast<Pack<T, kVec>*>(simt::check_store(to, sizeof from)) = from;
#else
  if constexpr (sizeof from == kPackBytes) {
    uint4 bits;
    memcpy(&bits, &from, sizeof from);
    __stcs(reinterpret_cast<uint4*>(to), bits);
  } else {
    *reinterpret_cast<Pack<T, kVec>*>(to) = from;
  }
#endif
}

}  // namespace bnext::cuda
