// Vectors of floats and doubles in the compiler's own vector types, with loads and stores for all four dtypes.
// Included once for each instruction set, inside that set's namespace and target region; see kernels_impl.h.
// No include guard on purpose.

#if BNEXT_ISA_LEVEL == 2
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;  // without AVX the compiler splits it in two: more instructions in flight
#endif
constexpr int kDoubles = kVectorBytes / 8;

template <typename E, int W>
struct VecOf {
  typedef E type __attribute__((vector_size(sizeof(E) * W)));
};
template <typename E, int W>
using Vec = typename VecOf<E, W>::type;

#define BNEXT_INLINE inline __attribute__((always_inline))

template <typename V>
BNEXT_INLINE V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename To, typename From>
BNEXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

using Doubles = Vec<double, kDoubles>;
using Floats = Vec<float, kDoubles>;
using Words = Vec<uint32_t, kDoubles>;
using Halves = Vec<uint16_t, kDoubles>;
// Twice as many: a full vector of floats, for what writes 16-bit elements.
using WideFloats = Vec<float, 2 * kDoubles>;
using WideWords = Vec<uint32_t, 2 * kDoubles>;
using WideHalves = Vec<uint16_t, 2 * kDoubles>;

// Conversions of whole vectors. GCC does __builtin_convertvector in halves and puts them together again, which costs
// twice the one instruction that there is.
BNEXT_INLINE Doubles widen(Floats v) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<Doubles>(_mm512_cvtps_pd(bit_cast<__m256>(v)));
#elif BNEXT_ISA_LEVEL == 1
  return bit_cast<Doubles>(_mm256_cvtps_pd(bit_cast<__m128>(v)));
#else
  return __builtin_convertvector(v, Doubles);
#endif
}
BNEXT_INLINE Floats narrow(Doubles v) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<Floats>(_mm512_cvtpd_ps(bit_cast<__m512d>(v)));
#elif BNEXT_ISA_LEVEL == 1
  return bit_cast<Floats>(_mm256_cvtpd_ps(bit_cast<__m256d>(v)));
#else
  return __builtin_convertvector(v, Floats);
#endif
}
BNEXT_INLINE Words widen(Halves v) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#elif BNEXT_ISA_LEVEL == 1
  return bit_cast<Words>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(v))));
#else
  return __builtin_convertvector(v, Words);
#endif
}
BNEXT_INLINE WideWords widen(WideHalves v) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<WideWords>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(v)));
#elif BNEXT_ISA_LEVEL == 1
  return bit_cast<WideWords>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, WideWords);
#endif
}
BNEXT_INLINE WideHalves narrow(WideWords v) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<WideHalves>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#elif BNEXT_ISA_LEVEL == 1
  const __m256i words = bit_cast<__m256i>(v);
  return bit_cast<WideHalves>(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
  return __builtin_convertvector(v, WideHalves);
#endif
}
// Two vectors of doubles make one of floats.
BNEXT_INLINE WideFloats narrow(Doubles low, Doubles high) {
  struct Parts {
    Floats low, high;
  };
  return bit_cast<WideFloats>(Parts{narrow(low), narrow(high)});
}

BNEXT_INLINE Floats load_floats(const float* p) { return load_raw<Floats>(p); }
BNEXT_INLINE Floats load_floats(const BFloat16* p) { return bit_cast<Floats>(widen(load_raw<Halves>(p)) << 16); }
BNEXT_INLINE Floats load_floats(const Float16* p) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<Floats>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#elif BNEXT_ISA_LEVEL == 1
  return bit_cast<Floats>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Floats v;
  for (int i = 0; i < kDoubles; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// kDoubles elements of any dtype, as doubles.
template <typename T>
BNEXT_INLINE Doubles load(const T* p) {
  return widen(load_floats(p));
}
template <>
BNEXT_INLINE Doubles load(const double* p) {
  return load_raw<Doubles>(p);
}

BNEXT_INLINE WideFloats load_wide(const BFloat16* p) {
  return bit_cast<WideFloats>(widen(load_raw<WideHalves>(p)) << 16);
}
BNEXT_INLINE WideFloats load_wide(const Float16* p) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<WideFloats>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#elif BNEXT_ISA_LEVEL == 1
  return bit_cast<WideFloats>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
  WideFloats v;
  for (int i = 0; i < 2 * kDoubles; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// What elementwise loops compute in. A 16-bit result has bits to spare in float32, and twice the lanes.
template <typename T>
using Elementwise = std::conditional_t<sizeof(T) == 2, WideFloats, Doubles>;

template <typename T>
BNEXT_INLINE Elementwise<T> load_element(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return load_wide(p);
  } else {
    return load(p);
  }
}

// to<T>(v): the bits of v as elements of dtype T.
template <typename T>
BNEXT_INLINE auto to(Elementwise<T> v) {
  if constexpr (std::is_same_v<T, double>) {
    return v;
  } else if constexpr (std::is_same_v<T, float>) {
    return narrow(v);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const WideWords bits = bit_cast<WideWords>(v);
    const WideWords rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const WideWords is_nan = bit_cast<WideWords>(v != v);
    return narrow((rounded & ~is_nan) | (is_nan & 0x7fc0));
  } else {
#if BNEXT_ISA_LEVEL == 2
    return _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif BNEXT_ISA_LEVEL == 1
    return _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    WideHalves half;
    for (int i = 0; i < 2 * kDoubles; ++i) half[i] = to_float16(v[i]).bits;
    return half;
#endif
  }
}

template <typename T>
constexpr int64_t kStoreBytes = sizeof(to<T>(Elementwise<T>()));
template <typename T>
constexpr int64_t kStoreLanes = kStoreBytes<T> / static_cast<int64_t>(sizeof(T));

// Stores v as elements of T. kStream goes around the caches, and needs an address aligned to kStoreBytes<T>.
template <bool kStream, typename T>
BNEXT_INLINE void store(T* p, Elementwise<T> v) {
  const auto bits = to<T>(v);
#if defined(__x86_64__)
  if constexpr (kStream) {
#if BNEXT_ISA_LEVEL == 2
    if constexpr (sizeof bits == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(bits));
#endif
#if BNEXT_ISA_LEVEL >= 1
    if constexpr (sizeof bits == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(bits));
#endif
    struct Parts {
      __m128i part[sizeof bits / 16];
    };
    const Parts parts = bit_cast<Parts>(bits);
    for (size_t i = 0; i < sizeof bits / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, parts.part[i]);
    return;
  }
#endif
  __builtin_memcpy(p, &bits, sizeof bits);
}

// Streamed stores are in order with later ones only after this.
BNEXT_INLINE void finish_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// v where lane >= first, 0 elsewhere.
BNEXT_INLINE Doubles keep_from(Doubles v, int64_t first) {
  Vec<int64_t, kDoubles> lane;
  for (int i = 0; i < kDoubles; ++i) lane[i] = i;
  return bit_cast<Doubles>(bit_cast<Vec<int64_t, kDoubles>>(v) & (lane >= first));
}

BNEXT_INLINE double sum_lanes(Doubles v) {
  double sum = 0;
  for (int i = 0; i < kDoubles; ++i) sum += v[i];
  return sum;
}
