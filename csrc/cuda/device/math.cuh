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

template <typename To, typename From>
__device__ inline To bits_as(From from) {
  constexpr size_t kBytes = sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To);
  To to = {};
  memcpy(&to, &from, kBytes);
  return to;
}

// Bits of a number, of which some may be on their way still.
struct Asked {
  uint32_t lower, upper;
};

// Number c of a vector, as it is there; nothing where c is less than 0, or there is no vector. A thread may go on until
// it reads it: that is another function, because to convert it is to wait for it. (To copy it, too, and that is what
// compilers do behind branches on its size: tests/test_cuda_static.py sees to it that nobody waits.)
__device__ inline void ask_channel(Asked& bits, const ChannelVector& v, int64_t c) {
  const unsigned size = v.dtype == DType::kFloat64 ? 8 : v.dtype == DType::kFloat32 ? 4 : 2;
  const unsigned bytes = v.data == nullptr || c < 0 ? 0 : size;
  const auto* from = static_cast<const unsigned char*>(v.data) + c * v.stride * size;
#ifdef BNEXT_SIMT
  if (bytes > 0) memcpy(&bits, from, bytes);
#else
  asm volatile(
      "{\n\t.reg .pred half, word, both;\n\tsetp.eq.u32 half, %3, 2;\n\tsetp.ge.u32 word, %3, 4;\n\t"
      "setp.eq.u32 both, %3, 8;\n\t@half ld.global.u16 %0, [%2];\n\t@word ld.global.u32 %0, [%2];\n\t"
      "@both ld.global.u32 %1, [%2+4];\n\t}"
      : "+r"(bits.lower), "+r"(bits.upper)
      : "l"(__cvta_generic_to_global(from)), "r"(bytes));
#endif
}
// What it is, or `otherwise` where there is no vector.
__device__ inline double read_channel(const ChannelVector& v, Asked bits, double otherwise) {
  if (v.data == nullptr) return otherwise;
  switch (v.dtype) {
    case DType::kFloat64:
      return bits_as<double>(bits);
    case DType::kFloat32:
      return bits_as<float>(bits.lower);
    case DType::kBFloat16:
      return widen(bits_as<BFloat16>(bits.lower));
    case DType::kFloat16:
      return widen(bits_as<Float16>(bits.lower));
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
