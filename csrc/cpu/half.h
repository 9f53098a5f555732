// The two 16-bit floating-point types as plain bits, and their conversions one number at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace bnext {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(BFloat16 h) { return float_from_bits(static_cast<uint32_t>(h.bits) << 16); }

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // round to nearest even
}

inline float to_float(Float16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, nan
  if (magnitude < 0x400) {  // subnormal: an integer times 2^-24
    return float_from_bits(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
  }
  return float_from_bits(sign | ((magnitude << 13) + ((127 - 15) << 23)));
}

inline Float16 to_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 2^-1 lets the FPU round to a multiple of 2^-24
    half = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    half = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// One element of any dtype, as the CPU computes with it.
inline double load_one(const double* p) { return *p; }
inline double load_one(const float* p) { return *p; }
inline double load_one(const BFloat16* p) { return to_float(*p); }
inline double load_one(const Float16* p) { return to_float(*p); }
inline void store_one(double* p, double value) { *p = value; }
inline void store_one(float* p, double value) { *p = static_cast<float>(value); }
inline void store_one(BFloat16* p, double value) { *p = to_bfloat16(static_cast<float>(value)); }
inline void store_one(Float16* p, double value) { *p = to_float16(static_cast<float>(value)); }

}  // namespace bnext
