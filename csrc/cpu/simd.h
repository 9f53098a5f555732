// Vectors of floats and doubles in the compiler's own vector types, with loads and stores for all four dtypes.
// Included once for each instruction set, inside that set's namespace and target region; see kernels_impl.h.
// No include guard on purpose.

#if BNEXT_ISA_LEVEL == 2
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;  // without AVX the compiler splits it in two: more instructions in flight
#endif
constexpr int kDoubles = kVectorBytes / 8;
// Arithmetic on vectors this long is hardly ever what limits a loop, and their ends are masked at no cost.
constexpr bool kLongVectors = BNEXT_ISA_LEVEL == 2;

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
// Twice as many: a full vector of floats, for what writes 16-bit elements.
using WideFloats = Vec<float, 2 * kDoubles>;
using WideWords = Vec<uint32_t, 2 * kDoubles>;
using Halves = Vec<uint16_t, 2 * kDoubles>;

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
// The halves of a full vector of floats.
BNEXT_INLINE Floats low_half(WideFloats v) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<Floats>(_mm512_castps512_ps256(bit_cast<__m512>(v)));
#elif BNEXT_ISA_LEVEL == 1
  return bit_cast<Floats>(_mm256_castps256_ps128(bit_cast<__m256>(v)));
#else
  struct Parts {
    Floats low, high;
  };
  return bit_cast<Parts>(v).low;
#endif
}
BNEXT_INLINE Floats high_half(WideFloats v) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<Floats>(_mm512_extractf32x8_ps(bit_cast<__m512>(v), 1));
#elif BNEXT_ISA_LEVEL == 1
  return bit_cast<Floats>(_mm256_extractf128_ps(bit_cast<__m256>(v), 1));
#else
  struct Parts {
    Floats low, high;
  };
  return bit_cast<Parts>(v).high;
#endif
}

// ---- how many elements of a vector there are -----------------------------------------------------------------------

// All of them. Otherwise an int64_t: so many, from the first.
struct Whole {};
// All of them, to be stored around the caches.
struct Streamed : Whole {};

#if BNEXT_ISA_LEVEL == 2
BNEXT_INLINE uint32_t lane_mask(int64_t count) { return (uint32_t{1} << count) - 1; }
#elif BNEXT_ISA_LEVEL == 1
// The first `count` of eight 32-bit words, of none to all.
BNEXT_INLINE __m256i word_mask(int64_t count) {
  alignas(64) static constexpr int32_t kOnesAndZeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return load_raw<__m256i>(kOnesAndZeros + 8 - count);
}
#endif

// R is a vector of E, or of the bits of E.
template <typename R, typename E>
BNEXT_INLINE R load_lanes(const E* p, Whole) {
  return load_raw<R>(p);
}
// The other lanes are 0, and what lies behind the `count` elements is not read.
template <typename R, typename E>
BNEXT_INLINE R load_lanes(const E* p, int64_t count) {
#if BNEXT_ISA_LEVEL == 2
  const uint32_t mask = lane_mask(count);
  if constexpr (sizeof(R) == 64) {
    if constexpr (sizeof(E) == 8) return bit_cast<R>(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), p));
    if constexpr (sizeof(E) == 4) return bit_cast<R>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), p));
    if constexpr (sizeof(E) == 2) return bit_cast<R>(_mm512_maskz_loadu_epi16(mask, p));
  } else {
    static_assert(sizeof(R) == 32);
    if constexpr (sizeof(E) == 4) return bit_cast<R>(_mm256_maskz_loadu_epi32(static_cast<__mmask8>(mask), p));
    if constexpr (sizeof(E) == 2) return bit_cast<R>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
  }
#elif BNEXT_ISA_LEVEL == 1
  const int64_t words = count * static_cast<int64_t>(sizeof(E)) / 4;
  const __m256i mask = word_mask(words);
  const auto* from = reinterpret_cast<const int*>(p);
  __m256i bits;
  if constexpr (sizeof(R) == 32) {
    bits = _mm256_maskload_epi32(from, mask);
  } else {
    static_assert(sizeof(R) == 16);
    bits = _mm256_castsi128_si256(_mm_maskload_epi32(from, _mm256_castsi256_si128(mask)));
  }
  if constexpr (sizeof(E) == 2) {  // the one behind whole words, if any
    const int last = count % 2 != 0 ? load_raw<uint16_t>(p + count - 1) : 0;
    const __m256i where = _mm256_andnot_si256(mask, word_mask(words + 1));
    bits = _mm256_or_si256(bits, _mm256_and_si256(_mm256_set1_epi32(last), where));
  }
  if constexpr (sizeof(R) == 32) return bit_cast<R>(bits);
  if constexpr (sizeof(R) == 16) return bit_cast<R>(_mm256_castsi256_si128(bits));
#else
  E some[sizeof(R) / sizeof(E)] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return load_raw<R>(some);
#endif
}

template <typename R, typename E>
BNEXT_INLINE void store_lanes(E* p, R bits, Whole) {
  __builtin_memcpy(p, &bits, sizeof bits);
}
template <typename R, typename E>
BNEXT_INLINE void store_lanes(E* p, R bits, int64_t count) {
#if BNEXT_ISA_LEVEL == 2
  const uint32_t mask = lane_mask(count);
  if constexpr (sizeof(R) == 64) {
    if constexpr (sizeof(E) == 8) _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(mask), bit_cast<__m512i>(bits));
    if constexpr (sizeof(E) == 4) _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(mask), bit_cast<__m512i>(bits));
    if constexpr (sizeof(E) == 2) _mm512_mask_storeu_epi16(p, mask, bit_cast<__m512i>(bits));
  } else {
    static_assert(sizeof(R) == 32 && sizeof(E) == 2);
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), bit_cast<__m256i>(bits));
  }
#elif BNEXT_ISA_LEVEL == 1
  // In pieces of half the vector, a quarter, and so on: each lies within what was just written, so that the processor
  // hands it on without waiting for memory.
  constexpr int64_t kAll = sizeof(R) / sizeof(E);
  E some[kAll];
  __builtin_memcpy(some, &bits, sizeof bits);
  int64_t done = 0;
#pragma GCC unroll 4
  for (int64_t piece = kAll / 2; piece > 0; piece /= 2) {
    if ((count & piece) == 0) continue;
    __builtin_memcpy(p + done, some + done, piece * sizeof(E));
    done += piece;
  }
#else
  E some[sizeof(R) / sizeof(E)];
  __builtin_memcpy(some, &bits, sizeof bits);
  for (int64_t i = 0; i < count; ++i) p[i] = some[i];
#endif
}

// All bits set in the first `count` words of a vector.
template <typename Word>
BNEXT_INLINE auto lanes_below(int64_t count) {
  Vec<Word, kVectorBytes / sizeof(Word)> lane;
  for (size_t i = 0; i < kVectorBytes / sizeof(Word); ++i) lane[i] = static_cast<Word>(i);
  return lane < static_cast<Word>(count);
}

// The first `count` lanes of a, and behind them those of b.
template <typename V>
BNEXT_INLINE V join_lanes(V a, V b, int64_t count) {
  using Word = std::conditional_t<std::is_same_v<V, Doubles>, int64_t, int32_t>;
  const auto of_a = lanes_below<Word>(count);
  using Words = Vec<Word, kVectorBytes / sizeof(Word)>;
  return bit_cast<V>((bit_cast<Words>(a) & of_a) | (bit_cast<Words>(b) & ~of_a));
}

// v, with 0 in the lanes that are not there.
template <typename V>
BNEXT_INLINE V keep_lanes(V v, Whole) {
  return v;
}
template <typename V>
BNEXT_INLINE V keep_lanes(V v, int64_t count) {
  return join_lanes(v, V{}, count);
}

// ---- elements in registers -----------------------------------------------------------------------------------------

// Two bfloat16 share each 32-bit word, and a shift or a mask makes a float of one of them: so vectors of bfloat16 are
// split into those at even and those at odd places, and cost half of what it takes to put them in order.
struct Split {
  WideFloats even, odd;

  BNEXT_INLINE Split operator+(Split v) const { return {even + v.even, odd + v.odd}; }
  BNEXT_INLINE Split operator-(Split v) const { return {even - v.even, odd - v.odd}; }
  BNEXT_INLINE Split operator*(Split v) const { return {even * v.even, odd * v.odd}; }
  BNEXT_INLINE Split& operator+=(Split v) { return *this = *this + v; }
};
BNEXT_INLINE Split join_lanes(Split a, Split b, int64_t count) {
  return {join_lanes(a.even, b.even, (count + 1) / 2), join_lanes(a.odd, b.odd, count / 2)};
}
BNEXT_INLINE Split keep_lanes(Split v, int64_t count) { return join_lanes(v, Split{}, count); }

BNEXT_INLINE Split decode(const BFloat16*, WideWords bits) {
  return {bit_cast<WideFloats>(bits << 16), bit_cast<WideFloats>(bits & 0xffff0000)};
}
BNEXT_INLINE WideFloats decode(const Float16*, Halves bits) {
#if BNEXT_ISA_LEVEL == 2
  return bit_cast<WideFloats>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif BNEXT_ISA_LEVEL == 1
  return bit_cast<WideFloats>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  WideFloats v;
  for (int i = 0; i < 2 * kDoubles; ++i) v[i] = to_float(Float16{bits[i]});
  return v;
#endif
}

template <typename T>
constexpr bool kIsHalf = sizeof(T) == 2;
template <typename T>
constexpr bool kIsSplit = std::is_same_v<T, BFloat16>;

// What elementwise loops compute in, one lane of it, and the bits that are loaded for it.
template <typename T>
using Value =
    std::conditional_t<kIsSplit<T>, Split, std::conditional_t<std::is_same_v<T, double>, Doubles, WideFloats>>;
template <typename T>
using Scalar = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename T>
using Bits = std::conditional_t<kIsSplit<T>, WideWords, std::conditional_t<kIsHalf<T>, Halves, Value<T>>>;
template <typename T>
constexpr int64_t kLanes = sizeof(Bits<T>) / sizeof(T);

template <typename T, typename Count>
BNEXT_INLINE Value<T> load_value(const T* p, Count count) {
  if constexpr (kIsHalf<T>) {
    return decode(p, load_lanes<Bits<T>>(p, count));
  } else {
    return load_lanes<Bits<T>>(p, count);
  }
}

// What sums are made of: float64, so that they are as good as exact. Terms of 16-bit elements have few bits, and groups
// of them are summed in float32; see Total.
template <typename T>
using Term = std::conditional_t<kIsHalf<T>, Value<T>, Doubles>;
template <typename T>
using TermScalar = std::conditional_t<kIsHalf<T>, float, double>;
template <typename T>
constexpr int64_t kTermLanes = kIsHalf<T> ? kLanes<T> : kDoubles;

template <typename T, typename Count>
BNEXT_INLINE Term<T> load_term(const T* p, Count count) {
  if constexpr (std::is_same_v<T, float>) {
    return widen(load_lanes<Floats>(p, count));
  } else {
    return load_value(p, count);
  }
}

// Numbers of neighbouring channels. A Split is loaded in its two halves: as one object it would go through the stack.
template <typename V, typename S>
BNEXT_INLINE V load_numbers(const S* p) {
  if constexpr (std::is_same_v<V, Split>) {
    return {load_raw<WideFloats>(p), load_raw<WideFloats>(p + 2 * kDoubles)};
  } else {
    return load_raw<V>(p);
  }
}

// One number repeated.
template <typename V, typename S>
BNEXT_INLINE V splat(S value) {
  if constexpr (std::is_same_v<V, Split>) {
    return {WideFloats{} + value, WideFloats{} + value};
  } else {
    return V{} + value;
  }
}

// A float64 in T's arithmetic. A NaN gets no payload, so that rounding it to 16 bits leaves a NaN.
template <typename S>
BNEXT_INLINE S to_scalar(double value) {
  return value == value ? static_cast<S>(value) : std::numeric_limits<S>::quiet_NaN();
}

// ---- stores --------------------------------------------------------------------------------------------------------

// To the nearest bfloat16, ties to even, in the upper half of the words. The lower half of a NaN is zero: it comes from
// a bfloat16, from to_scalar or from the processor.
BNEXT_INLINE WideWords round_to_upper(WideFloats v) {
  const WideWords bits = bit_cast<WideWords>(v);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// The bits of v as elements of dtype T.
template <typename T>
BNEXT_INLINE auto encode(Value<T> v) {
  if constexpr (!kIsHalf<T>) {
    return v;
  } else if constexpr (kIsSplit<T>) {
    return (round_to_upper(v.even) >> 16) | (round_to_upper(v.odd) & 0xffff0000);
  } else {
#if BNEXT_ISA_LEVEL == 2
    return _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif BNEXT_ISA_LEVEL == 1
    return _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Halves half;
    for (int i = 0; i < 2 * kDoubles; ++i) half[i] = to_float16(v[i]).bits;
    return half;
#endif
  }
}

template <typename T>
constexpr int64_t kStoreBytes = kLanes<T> * static_cast<int64_t>(sizeof(T));

template <typename T, typename Count>
BNEXT_INLINE void store_value(T* p, Value<T> v, Count count) {
  store_lanes(p, encode<T>(v), count);
}
// p is aligned to kStoreBytes<T>.
template <typename T>
BNEXT_INLINE void store_value(T* p, Value<T> v, Streamed) {
  const auto bits = encode<T>(v);
#if BNEXT_ISA_LEVEL == 2
  if constexpr (sizeof bits == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(bits));
#endif
#if BNEXT_ISA_LEVEL >= 1
  if constexpr (sizeof bits == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(bits));
#endif
#if defined(__x86_64__)
  struct Parts {
    __m128i part[sizeof bits / 16];
  };
  const Parts parts = bit_cast<Parts>(bits);
  for (size_t i = 0; i < sizeof bits / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, parts.part[i]);
#else
  store_lanes(p, bits, Whole());
#endif
}

// Streamed stores are in order with later ones only after this.
BNEXT_INLINE void finish_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// Terms at most that are added up in float32, or in registers, before their sum goes on.
constexpr int kGroup = 8;

// Calls f(i, part) for the ith vector of float64 that v fills.
template <typename F>
BNEXT_INLINE void for_each_doubles(Doubles v, F f) {
  f(0, v);
}
template <typename F>
BNEXT_INLINE void for_each_doubles(WideFloats v, F f) {
  f(0, widen(low_half(v)));
  f(1, widen(high_half(v)));
}
template <typename F>
BNEXT_INLINE void for_each_doubles(Split v, F f) {
  f(0, widen(low_half(v.even)));
  f(1, widen(high_half(v.even)));
  f(2, widen(low_half(v.odd)));
  f(3, widen(high_half(v.odd)));
}

// to[lane] += v, in float64.
template <typename V>
BNEXT_INLINE void add_to_sums(double* to, V v) {
  for_each_doubles(v, [&](int i, Doubles part) __attribute__((always_inline)) {
    const Doubles sum = load_raw<Doubles>(to + i * kDoubles) + part;
    __builtin_memcpy(to + i * kDoubles, &sum, sizeof sum);
  });
}

// The sum of groups of Terms, in float64, each lane by itself. A float32 chain is no longer than a group: eight
// products of two bfloat16, of 16 bits each, or of two float16, of 22, of which next to nothing is lost.
template <typename T>
struct Total {
  static constexpr int kParts = kTermLanes<T> / kDoubles;
  Doubles part[kParts];

  BNEXT_INLINE void add(Term<T> v) {
    for_each_doubles(v, [&](int i, Doubles more) __attribute__((always_inline)) { part[i] += more; });
  }
  BNEXT_INLINE double sum() const {
    Doubles all = part[0];
    for (int i = 1; i < kParts; ++i) all += part[i];
    double sum = 0;
    for (int i = 0; i < kDoubles; ++i) sum += all[i];
    return sum;
  }
};
