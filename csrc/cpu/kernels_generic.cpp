// The inner loops for any processor: the compiler's baseline for the target.
#include <cstdint>
#include <type_traits>

#include "half.h"
#include "kernels.h"

#define BNEXT_ISA_LEVEL 0
#define BNEXT_ISA generic

#include "kernels_impl.h"
