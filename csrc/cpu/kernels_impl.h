// The inner loops themselves. Compiled once for each instruction set: kernels_<isa>.cpp defines BNEXT_ISA_LEVEL (0
// generic, 1 AVX2, 2 AVX-512) and BNEXT_ISA (the namespace), opens the target region and includes this file.
// Every header is included before that region, so that no inline function of theirs is compiled for an instruction set
// that the processor may lack and then picked by the linker for everybody.
// No include guard on purpose.

namespace bnext::cpu::BNEXT_ISA {

#include "simd.h"

// Calls f(offset_in(view)..., length) for each run of positions [begin, end) along the innermost dimension.
template <typename F, typename... Views>
BNEXT_INLINE void for_each_run(const Geometry& g, int64_t begin, int64_t end, F f, const Views&... views) {
  const int64_t inner = g.size[2];
  int64_t i2 = begin % inner;
  int64_t i1 = begin / inner % g.size[1];
  int64_t i0 = begin / inner / g.size[1];
  while (begin < end) {
    const int64_t length = inner - i2 < end - begin ? inner - i2 : end - begin;
    f((i0 * views.stride[0] + i1 * views.stride[1] + i2 * views.stride[2])..., length);
    begin += length;
    i2 = 0;
    if (++i1 == g.size[1]) {
      i1 = 0;
      ++i0;
    }
  }
}

template <typename T>
BNEXT_INLINE const T* at(const View& view, int64_t offset) {
  return static_cast<const T*>(view.data) + offset;
}
template <typename T>
BNEXT_INLINE T* at_mutable(const View& view, int64_t offset) {
  return static_cast<T*>(view.data) + offset;
}

// (x - mean) * scale + shift of one channel, in what T's elementwise loops compute in. What rounding takes from the mean
// goes into the shift. For float32 results, what it takes from the scale is kept as well, and a result is little more
// than one rounding away; without it, single results were 1.7 times as far off as PyTorch's.
template <typename T>
struct Affine {
  Scalar<T> mean, scale, scale_low, shift;

  Affine() = default;
  BNEXT_INLINE Affine(double m, double a, double b)
      : mean(to_scalar<Scalar<T>>(m)),
        scale(to_scalar<Scalar<T>>(a)),
        scale_low(std::isfinite(a) ? to_scalar<Scalar<T>>(a - static_cast<double>(scale)) : 0),
        shift(to_scalar<Scalar<T>>(std::isfinite(m) ? b + (static_cast<double>(mean) - m) * a : b)) {}
};

template <typename T>
struct AffineVector {
  Value<T> mean, scale, scale_low, shift;
  BNEXT_INLINE Value<T> operator()(Value<T> x) const {
    const Value<T> xmu = x - mean;
    if constexpr (std::is_same_v<T, float>) return xmu * scale + (xmu * scale_low + shift);
    return xmu * scale + shift;
  }
};

#include "kernels_planes.h"
#include "kernels_rows.h"

template <typename T>
void normalize(const Geometry& g, const View& x, const View& y, Block block, const double* mean, const double* scale,
               const double* shift, bool stream) {
  const bool planes = g.walk == Walk::kPlanes;
  stream = stream && (planes || has_aligned_rows<T>(y));
  auto* kernel = planes ? (stream ? normalize_planes<true, T> : normalize_planes<false, T>)
                        : (stream ? normalize_rows<true, T> : normalize_rows<false, T>);
  kernel(g, x, y, block, mean, scale, shift);
}

template <typename T>
void backward_apply(const Geometry& g, const View& x, const View& dy, const View& dx, Block block, const double* mean,
                    const double* scale_dy, const double* scale_x, const double* shift, bool stream) {
  const bool planes = g.walk == Walk::kPlanes;
  stream = stream && (planes || has_aligned_rows<T>(dx));
  auto* kernel = planes ? (stream ? backward_apply_planes<true, T> : backward_apply_planes<false, T>)
                        : (stream ? backward_apply_rows<true, T> : backward_apply_rows<false, T>);
  kernel(g, x, dy, dx, block, mean, scale_dy, scale_x, shift);
}

template <typename T>
const KernelTable& table_of(Walk walk) {
  static constexpr KernelTable planes = {moments_planes<T>, normalize<T>, backward_sums_planes<T>, backward_apply<T>};
  static constexpr KernelTable rows = {moments_rows<T>, normalize<T>, backward_sums_rows<T>, backward_apply<T>};
  return walk == Walk::kPlanes ? planes : rows;
}

const KernelTable& table(DType dtype, Walk walk) {
  switch (dtype) {
    case DType::kFloat64:
      return table_of<double>(walk);
    case DType::kFloat32:
      return table_of<float>(walk);
    case DType::kBFloat16:
      return table_of<BFloat16>(walk);
    default:
      return table_of<Float16>(walk);
  }
}

}  // namespace bnext::cpu::BNEXT_ISA
