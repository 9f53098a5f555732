// The one way to move activations: packs of 16 bytes, or of one element, with cache hints.
#pragma once

#include <cstring>
#include <type_traits>

#include "../kernels/kernel_args.h"
#include "math.cuh"

namespace bnext::cuda {

// Halves go in pairs, as words: the hardware converts them so, and compilers that get them one by one take every word
// apart when it is loaded, and put it together again.
template <typename T, int kVec>
constexpr bool kInPairs = kHasPairs && sizeof(T) == 2 && kVec % 2 == 0;

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  static constexpr int kOfWord = kInPairs<T, kVec> ? 2 : 1;  // elements
  std::conditional_t<kInPairs<T, kVec>, uint32_t, T> word[kVec / kOfWord];

  __device__ T get(int v) const {
    if constexpr (kOfWord == 1) {
      return word[v];
    } else {
      const auto bits = static_cast<uint16_t>(word[v / 2] >> v % 2 * 16);
      T value;
      memcpy(&value, &bits, sizeof value);
      return value;
    }
  }
  __device__ void set(int v, T value) {
    if constexpr (kOfWord == 1) {
      word[v] = value;
    } else {
      uint16_t bits;
      memcpy(&bits, &value, sizeof bits);
      word[v / 2] = (word[v / 2] & 0xffff0000u >> v % 2 * 16) | static_cast<uint32_t>(bits) << v % 2 * 16;
    }
  }
};

// How long a line should stay in L2. What a call does not read again should not push out what it will.
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
    const uint4 bits = kCache == Cache::kLastUse ? __ldcs(p) : __ldcg(p);  // not __ldg: dx may be written over dy
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

// A place in the block's shared memory. On a GPU not a pointer: from one, compilers work out anew at each use where the
// shared memory of a cluster's block begins.
#ifdef BNEXT_SIMT
using SharedAddress = unsigned char*;
#else
using SharedAddress = unsigned;
#endif

__device__ inline SharedAddress shared_address(int offset) {
#ifdef BNEXT_SIMT
  return shared_memory() + offset;
#else
  return static_cast<unsigned>(__cvta_generic_to_shared(shared_memory())) + static_cast<unsigned>(offset);
#endif
}

// Packs of 16 bytes there. Nothing but these and asynchronous copies may touch them: what compilers keep in order here
// are volatile statements, not other accesses.
template <typename T, int kVec>
__device__ inline void load_slot(Pack<T, kVec>& to, SharedAddress from) {
  static_assert(sizeof to == kPackBytes, "whole packs only");
#ifdef BNEXT_SIMT
  memcpy(&to, from, sizeof to);
#else
  uint4 bits;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "r"(from));
  memcpy(&to, &bits, sizeof to);
#endif
}

template <typename T, int kVec>
__device__ inline void store_slot(SharedAddress to, const Pack<T, kVec>& from) {
  static_assert(sizeof from == kPackBytes, "whole packs only");
#ifdef BNEXT_SIMT
  memcpy(to, &from, sizeof from);
#else
  uint4 bits;
  memcpy(&bits, &from, sizeof from);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#endif
}

// From a pack to numbers for arithmetic, and back.
template <typename Acc, typename T, int kVec>
__device__ inline void widen_pack(Acc (&to)[kVec], const Pack<T, kVec>& from) {
  if constexpr (kInPairs<T, kVec>) {
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) widen_pair(T(), from.word[i], to[2 * i], to[2 * i + 1]);
  } else {
#pragma unroll
    for (int v = 0; v < kVec; ++v) to[v] = widen(from.word[v]);
  }
}

template <typename T, typename Acc, int kVec>
__device__ inline Pack<T, kVec> narrow_pack(const Acc (&from)[kVec]) {
  Pack<T, kVec> to;
  if constexpr (kInPairs<T, kVec>) {
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) to.word[i] = narrow_pair(T(), from[2 * i], from[2 * i + 1]);
  } else {
#pragma unroll
    for (int v = 0; v < kVec; ++v) narrow(to.word[v], from[v]);
  }
  return to;
}

}  // namespace bnext::cuda
