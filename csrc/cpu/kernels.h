// The four inner loops of batch norm on a CPU, as tables of function pointers: one table for each instruction set,
// dtype and walk. What to call on which block, and on which thread, is decided in batchnorm.cpp.
#pragma once

#include "../problem.h"

namespace bnext::cpu {

enum class Isa : uint8_t { kGeneric, kAvx2, kAvx512 };

const char* isa_name(Isa isa);

// The widest instruction set that this processor has and this build holds; BNEXT_CPU_ISA=generic|avx2|avx512 forces
// one.
Isa current_isa();

// Channels [channel_begin, channel_end) at positions [begin, end) of a Geometry; of planes that are summed, at most so
// many.
constexpr int64_t kMaxBlockChannels = 32;
struct Block {
  int64_t channel_begin, channel_end;
  int64_t begin, end;
};

struct ElementwiseOptions {
  bool stream = false;  // stores go around the caches where they can
  // Of planes, a block has one of each of its channels, side by side in memory, and the block behind it comes next.
  bool in_order = false;
  // Channels whose sums come next, if any. Planes ask for them while streamed stores write; nobody else looks at this.
  int64_t next_begin = 0, next_end = 0;
};

// dx = scale_dy * dy + scale * (x - mean) + shift, or y without the first term, for one channel.
struct Coefficients {
  double mean, scale, shift, scale_dy = 0;
};

// The coefficients of all channels as the loops of one table load them; see KernelTable::set_coefficients.
struct CoefficientArrays {
  static constexpr int kCount = 5;
  const void* data;
  int64_t width;  // elements from one array to the next
};

// Sums are added to. They are float64, so that results are the nearest numbers of their dtype, and no other kernel is
// closer; where tensors are in memory or in the last cache, that costs no time. Of 16-bit elements, eight terms at a
// time are summed in float32 first. Their pivots have to have 16 bits too: then x - pivot and its product with dy lose
// next to nothing. Elementwise work is float32, for float64 float64.
struct KernelTable {
  // Numbers of channels lie in arrays, that of channel c at slot(c, split). They are laid out once for a pass.
  int64_t split;
  void (*set_pivot)(void* pivots, int64_t slot, double pivot);
  void (*set_coefficients)(void* arrays, int64_t width, int64_t slot, const Coefficients&);

  // s1 += sum(x - pivot), s2 += sum((x - pivot)^2)
  void (*moments)(const Geometry&, const View& x, Block, const void* pivots, double* s1, double* s2);
  // y = (x - mean) * scale + shift
  void (*normalize)(const Geometry&, const View& x, const View& y, Block, CoefficientArrays, ElementwiseOptions);
  // sum_dy += sum(dy), sum_dy_xmp += sum(dy * (x - pivot))
  void (*backward_sums)(const Geometry&, const View& x, const View& dy, Block, const void* pivots, double* sum_dy,
                        double* sum_dy_xmp);
  // dx = scale_dy * dy + scale * (x - mean) + shift
  void (*backward_apply)(const Geometry&, const View& x, const View& dy, const View& dx, Block, CoefficientArrays,
                         ElementwiseOptions);
};

// Where kernels that take vectors of `split` channels (a power of two) apart into even and odd ones want channel c.
// Others have a split of 0.
inline int64_t slot(int64_t c, int64_t split) {
  if (split == 0) return c;
  const int64_t lane = c & (split - 1);
  return c - lane + (lane & 1) * (split >> 1) + (lane >> 1);
}

const KernelTable& kernel_table(Isa isa, const Geometry& geometry);

}  // namespace bnext::cpu
