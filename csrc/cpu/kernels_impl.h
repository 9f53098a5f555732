// The inner loops themselves. Compiled once for each instruction set: kernels_<isa>.cpp defines BNEXT_ISA_LEVEL (0
// generic, 1 AVX2, 2 AVX-512) and BNEXT_ISA (the namespace), opens the target region and includes this file.
// Every header is included before that region, so that no inline function of theirs is compiled for an instruction set
// that the processor may lack and then picked by the linker for everybody.
// No include guard on purpose.

namespace bnext::cpu::BNEXT_ISA {

#include "simd.h"

// Calls f(offset_in(view)..., length, more) for each run of positions [begin, end) along the innermost dimension;
// `more` tells whether another one follows at stride[1].
template <typename F, typename... Views>
BNEXT_INLINE void for_each_run(const Geometry& g, int64_t begin, int64_t end, F f, const Views&... views) {
  const int64_t inner = g.size[2];
  int64_t i2 = begin % inner;
  int64_t i1 = begin / inner % g.size[1];
  int64_t i0 = begin / inner / g.size[1];
  while (begin < end) {
    const int64_t length = inner - i2 < end - begin ? inner - i2 : end - begin;
    f((i0 * views.stride[0] + i1 * views.stride[1] + i2 * views.stride[2])..., length, i1 + 1 < g.size[1]);
    begin += length;
    i2 = 0;
    if (++i1 == g.size[1]) {
      i1 = 0;
      ++i0;
    }
  }
}

// The same, the last run first: what the sums have read last is in the nearest cache. Within a run it goes forwards.
template <typename F, typename... Views>
BNEXT_INLINE void for_each_run_backwards(const Geometry& g, int64_t begin, int64_t end, F f, const Views&... views) {
  const int64_t inner = g.size[2];
  for (int64_t run = (end - 1) / inner; end > begin; --run) {
    const int64_t first = run * inner > begin ? run * inner : begin;
    const int64_t i2 = first - run * inner, i1 = run % g.size[1], i0 = run / g.size[1];
    f((i0 * views.stride[0] + i1 * views.stride[1] + i2 * views.stride[2])..., end - first, i1 > 0);
    end = first;
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

constexpr int64_t kLineBytes = 64;

// Whether a view's data, and so many elements after it each, are aligned for streamed stores.
template <typename T, typename... Steps>
bool has_aligned_steps(const View& view, Steps... steps) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data));
  return (address | (steps | ...) * static_cast<int64_t>(sizeof(T))) % kStoreBytes<T> == 0;
}

template <bool kForWriting = false, typename T>
BNEXT_INLINE void prefetch(const T* p, int64_t length) {
  const char* byte = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < length * static_cast<int64_t>(sizeof(T)); i += kLineBytes) {
    __builtin_prefetch(byte + i, kForWriting);
  }
}

template <typename T>
void set_pivot(void* pivots, int64_t slot, double pivot) {
  static_cast<TermScalar<T>*>(pivots)[slot] = static_cast<TermScalar<T>>(pivot);
}

// (x - mean) * scale + shift in what T's elementwise loops compute in. What rounding takes from the mean goes into the
// shift. For float32 results, what it takes from the scale is kept as well, and a result is little more than one
// rounding away; without it, single results were 1.7 times as far off as PyTorch's. Both parts of the scale have its
// sign, and neither is 0 alone: where x is infinite, so is the result.
template <typename T>
struct AffineVector {
  Value<T> mean, scale, scale_low, shift;
  BNEXT_INLINE Value<T> operator()(Value<T> x) const {
    const Value<T> xmu = x - mean;
    if constexpr (std::is_same_v<T, float>) return xmu * scale + (xmu * scale_low + shift);
    return xmu * scale + shift;
  }
};

template <typename T>
void set_coefficients(void* arrays, int64_t width, int64_t slot, const Coefficients& c) {
  Scalar<T>* to = static_cast<Scalar<T>*>(arrays) + slot;
  const auto mean = to_scalar<Scalar<T>>(c.mean);
  auto scale = to_scalar<Scalar<T>>(c.scale);
  const double lost_mean = std::isfinite(c.mean) ? static_cast<double>(mean) - c.mean : 0;
  double lost_scale = 0;
  if constexpr (std::is_same_v<T, float>) {
    // The next number towards 0, without a branch: no processor could tell which way it goes.
    const auto bits = bit_cast<uint32_t>(scale);
    scale = bit_cast<float>(bits - (std::abs(static_cast<double>(scale)) > std::abs(c.scale) ? 1u : 0u));
    const double lost = c.scale - static_cast<double>(scale);
    lost_scale = lost != 0 && std::isfinite(lost) ? lost : 0x1p-60 * c.scale;
    constexpr double kLeast = std::numeric_limits<float>::denorm_min();
    // Of a scale that is less itself, and is 0 in float32, that would be more than there is.
    if (scale != 0 && std::abs(lost_scale) < kLeast) lost_scale = std::copysign(kLeast, c.scale);
  }
  to[0] = mean;
  to[width] = scale;
  to[2 * width] = to_scalar<Scalar<T>>(lost_scale);
  to[3 * width] = to_scalar<Scalar<T>>(c.shift + lost_mean * c.scale);
  to[4 * width] = to_scalar<Scalar<T>>(c.scale_dy);
}

// What set_coefficients has laid out: of a vector of channels, or of one channel, repeated.
template <typename T>
class LoadCoefficients {
 public:
  BNEXT_INLINE explicit LoadCoefficients(CoefficientArrays arrays)
      : from_(static_cast<const Scalar<T>*>(arrays.data)), width_(arrays.width) {}
  BNEXT_INLINE AffineVector<T> vector(int64_t i) const { return {load(0, i), load(1, i), load(2, i), load(3, i)}; }
  BNEXT_INLINE Value<T> scale_dy(int64_t i) const { return load(4, i); }
  BNEXT_INLINE AffineVector<T> one(int64_t c) const { return {repeat(0, c), repeat(1, c), repeat(2, c), repeat(3, c)}; }
  BNEXT_INLINE Value<T> one_scale_dy(int64_t c) const { return repeat(4, c); }

 private:
  BNEXT_INLINE Value<T> load(int k, int64_t i) const { return load_numbers<Value<T>>(from_ + k * width_ + i); }
  BNEXT_INLINE Value<T> repeat(int k, int64_t c) const { return splat<Value<T>>(from_[k * width_ + c]); }

  const Scalar<T>* from_;
  int64_t width_;
};

#include "kernels_planes.h"
#include "kernels_rows.h"
#include "kernels_runs.h"

template <typename T>
void moments_of_planes(const Geometry& g, const View& x, Block block, const void* pivots, double* s1, double* s2) {
  (has_runs<T>(g, x) ? moments_runs<T> : moments_planes<T>)(g, x, block, pivots, s1, s2);
}

template <typename T>
void backward_sums_of_planes(const Geometry& g, const View& x, const View& dy, Block block, const void* pivots,
                             double* sum_dy, double* sum_dy_xmp) {
  auto* kernel = has_runs<T>(g, x, dy) ? backward_sums_runs<T> : backward_sums_planes<T>;
  kernel(g, x, dy, block, pivots, sum_dy, sum_dy_xmp);
}

// Whether streamed stores have whole lines to fill: not where elements themselves lie askew. Of planes as short as
// these, taken one by one, too many lines are written in pieces, by stores of both kinds. Zen 4, 32 x 2048 x 14 x 14
// bfloat16: forward 3.3 -> 2.5 ms, backward 5.4 -> 4.6.
constexpr int64_t kShortPlaneBytes = 512;
template <typename T>
bool fills_lines(const Geometry& g, const View& view, int64_t together) {
  const int64_t bytes = together * g.size[2] * static_cast<int64_t>(sizeof(T));
  return bytes >= kShortPlaneBytes && reinterpret_cast<uintptr_t>(view.data) % sizeof(T) == 0;
}

template <typename T>
void normalize_of_planes(const Geometry& g, const View& x, const View& y, Block block, CoefficientArrays c,
                         ElementwiseOptions options) {
  if (block_has_runs<T>(g, block, x, y)) return normalize_runs<T>(g, x, y, block, c, options);
  const int64_t together = channels_together<T>(g, block, x, y);
  const bool stream = options.stream && fills_lines<T>(g, y, together);
  auto* kernel = stream ? normalize_planes<true, T> : normalize_planes<false, T>;
  kernel(g, x, y, block, c, options, together);
}

template <typename T>
void backward_apply_of_planes(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                              CoefficientArrays c, ElementwiseOptions options) {
  if (block_has_runs<T>(g, block, x, dy, dx)) return backward_apply_runs<T>(g, x, dy, dx, block, c, options);
  const int64_t together = channels_together<T>(g, block, x, dy, dx);
  const bool stream = options.stream && fills_lines<T>(g, dx, together);
  auto* kernel = stream ? backward_apply_planes<true, T> : backward_apply_planes<false, T>;
  kernel(g, x, dy, dx, block, c, options, together);
}

template <typename T>
const KernelTable& table_of(Walk walk) {
  static constexpr KernelTable planes = {0,
                                         set_pivot<T>,
                                         set_coefficients<T>,
                                         moments_of_planes<T>,
                                         normalize_of_planes<T>,
                                         backward_sums_of_planes<T>,
                                         backward_apply_of_planes<T>};
  static constexpr KernelTable rows = {
      kIsSplit<T> ? kLanes<T> : 0, set_pivot<T>,          set_coefficients<T>,       moments_rows<T>,
      normalize_any_rows<T>,       backward_sums_rows<T>, backward_apply_any_rows<T>};
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
