// The inner loops for any processor: the compiler's baseline for the target.
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "half.h"
#include "kernels.h"

#define BNEXT_ISA_LEVEL 0
#define BNEXT_ISA generic

#include "kernels_impl.h"
