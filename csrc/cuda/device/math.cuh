// Element types and their arithmetic: what a dtype accumulates in, conversions, and vectors of one number per channel.
#pragma once

#include <cstring>

#include "../../cpu/half.h"
#include "../../problem.h"
#include "portability.cuh"

#ifdef BNEXT_SIMT
#include <cmath>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace bnext::cuda {

template <typename T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename AccumulateIn<T>::type;

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }

#ifdef BNEXT_SIMT
constexpr bool kHasPairs = false;
inline float widen(BFloat16 value) { return to_float(value); }
inline float widen(Float16 value) { return to_float(value); }
inline void narrow(BFloat16& to, float value) { to = to_bfloat16(value); }
inline void narrow(Float16& to, float value) { to = to_float16(value); }
#else
// bfloat16 is the upper half of a float.
__device__ inline float widen(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
__device__ inline float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline void narrow(BFloat16& to, float value) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
__device__ inline void narrow(Float16& to, float value) { to.bits = __half_as_ushort(__float2half_rn(value)); }

// Two of them in one register; the first argument only names the type.
constexpr bool kHasPairs = true;
__device__ inline void widen_pair(BFloat16, unsigned pair, float& first, float& second) {
  first = __uint_as_float(pair << 16);
  second = __uint_as_float(pair & 0xffff0000u);
}
__device__ inline void widen_pair(Float16, unsigned pair, float& first, float& second) {
  __half2 halves;
  memcpy(&halves, &pair, sizeof pair);
  first = __low2float(halves);
  second = __high2float(halves);
}
__device__ inline unsigned narrow_pair(BFloat16, float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ inline unsigned narrow_pair(Float16, float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
#endif
__device__ inline void narrow(float& to, float value) { to = value; }
__device__ inline void narrow(double& to, double value) { to = value; }

__device__ inline float square_root(float value) { return sqrtf(value); }
__device__ inline double square_root(double value) { return sqrt(value); }
#ifdef BNEXT_SIMT
inline double reciprocal_root(double value) { return 1 / sqrt(value); }
#else
__device__ inline double reciprocal_root(double value) { return rsqrt(value); }
#endif

#ifdef BNEXT_SIMT
inline int popcount(unsigned bits) { return __builtin_popcount(bits); }
#else
__device__ inline int popcount(unsigned bits) { return __popc(bits); }
#endif

template <typename Acc>
__device__ inline bool is_finite(Acc value) {
  return value - value == Acc(0);
}

// Number c of a vector, or `otherwise` where there is none.
__device__ inline double load_channel(const ChannelVector& v, int64_t c, double otherwise) {
  if (v.data == nullptr) return otherwise;
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(v.data)[i];
    case DType::kFloat32:
      return static_cast<const float*>(v.data)[i];
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(v.data)[i]);
    case DType::kFloat16:
      return widen(static_cast<const Float16*>(v.data)[i]);
  }
  return otherwise;
}

__device__ inline void store_channel(const ChannelVector& v, int64_t c, double value) {
#ifdef BNEXT_SIMT
  simt::check_dependency();
#endif
  if (v.data == nullptr) return;
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::kFloat64:
      static_cast<double*>(v.data)[i] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(v.data)[i] = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      narrow(static_cast<BFloat16*>(v.data)[i], static_cast<float>(value));
      break;
    case DType::kFloat16:
      narrow(static_cast<Float16*>(v.data)[i], static_cast<float>(value));
      break;
  }
}

// Without waiting for what is there: a load would hold up the thread, and with it its block, for a trip to memory.
__device__ inline void increment(int64_t* number) {
#ifdef BNEXT_SIMT
  ++*number;
#else
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(number)), "l"(int64_t{1}) : "memory");
#endif
}

}  // namespace bnext::cuda
