// The inner loops for x86-64 with AVX-512 (F, BW, DQ, VL). Called only where the processor has them; see dispatch.cpp.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "half.h"
#include "kernels.h"

#define BNEXT_ISA_LEVEL 2
#define BNEXT_ISA avx512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
// GCC 12 warns of its own header: _mm512_cvtph_ps hands an undefined vector to a builtin that ignores it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
