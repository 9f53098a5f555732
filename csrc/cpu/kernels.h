// The four inner loops of batch norm on a CPU, as tables of function pointers: one table for each instruction set,
// dtype and walk. What to call on which block, and on which thread, is decided in batchnorm.cpp.
#pragma once

#include "../problem.h"

namespace bnext::cpu {

enum class Isa : uint8_t { kGeneric, kAvx2, kAvx512 };

const char* isa_name(Isa isa);

// The widest instruction set that this processor has and this build holds; BNEXT_CPU_ISA=generic|avx2|avx512 forces one.
Isa current_isa();

// Channels [channel_begin, channel_end) at positions [begin, end) of a Geometry.
struct Block {
  int64_t channel_begin, channel_end;
  int64_t begin, end;
};

// Per-channel arrays are indexed by channel; sums are added to. All arithmetic between a load and a store is float64,
// but for float32 where the result has 16 bits: so a result is the nearest number of its dtype, and no other kernel is
// closer. Sums of float32 lanes were faster, but on small tensors further off than PyTorch's.
struct KernelTable {
  // s1 += sum(x - pivot), s2 += sum((x - pivot)^2)
  void (*moments)(const Geometry&, const View& x, Block, const double* pivot, double* s1, double* s2);
  // y = (x - mean) * scale + shift; `stream` stores around the caches where it can
  void (*normalize)(const Geometry&, const View& x, const View& y, Block, const double* mean, const double* scale,
                    const double* shift, bool stream);
  // sum_dy += sum(dy), sum_dy_xmu += sum(dy * (x - mean))
  void (*backward_sums)(const Geometry&, const View& x, const View& dy, Block, const double* mean, double* sum_dy,
                        double* sum_dy_xmu);
  // dx = scale_dy * dy + scale_x * (x - mean) + shift
  void (*backward_apply)(const Geometry&, const View& x, const View& dy, const View& dx, Block, const double* mean,
                         const double* scale_dy, const double* scale_x, const double* shift, bool stream);
};

const KernelTable& kernel_table(Isa isa, const Geometry& geometry);

}  // namespace bnext::cpu
