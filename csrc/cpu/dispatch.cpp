// Which compiled set of inner loops runs: by what the processor has, or by BNEXT_CPU_ISA.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "strided.h"

namespace bnext::cpu {

// Defined by kernels_impl.h, once for each instruction set.
namespace generic {
const KernelTable& table(DType dtype, Walk walk);
}  // namespace generic
#if defined(__x86_64__)
namespace avx2 {
const KernelTable& table(DType dtype, Walk walk);
}  // namespace avx2
namespace avx512 {
const KernelTable& table(DType dtype, Walk walk);
}  // namespace avx512
#endif

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return "generic";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "?";
}

namespace {

Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA has F16C.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

Isa choose_isa() {
  const Isa widest = widest_isa();
  const char* forced = std::getenv("BNEXT_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return widest;
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(forced) != isa_name(isa)) continue;
    if (isa > widest) {
      throw std::runtime_error("BNEXT_CPU_ISA=" + std::string(forced) + ", but this processor or build has only " +
                               isa_name(widest));
    }
    return isa;
  }
  throw std::runtime_error("BNEXT_CPU_ISA should be generic, avx2 or avx512, not " + std::string(forced));
}

}  // namespace

Isa current_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const KernelTable& kernel_table(Isa isa, const Geometry& g) {
  if (!g.unit_stride) return strided_table(g.dtype);
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::table(g.dtype, g.walk);
  if (isa == Isa::kAvx2) return avx2::table(g.dtype, g.walk);
#endif
  return generic::table(g.dtype, g.walk);
}

}  // namespace bnext::cpu
