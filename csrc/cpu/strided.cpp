// One element at a time, in the order of the walk: correct for any strides, without copying the tensor first.
#include "strided.h"

#include "half.h"

namespace bnext::cpu {
namespace {

// Calls f(c, pointer_into(view)...) for every element of the block.
template <typename T, typename F, typename... Views>
void for_each_element(const Geometry& g, Block block, F f, const Views&... views) {
  const bool rows = g.walk == Walk::kRows;
  // Planes: each channel in turn. Rows: all channels at each position.
  for (int64_t c0 = block.channel_begin; c0 < block.channel_end; c0 = rows ? block.channel_end : c0 + 1) {
    const int64_t c1 = rows ? block.channel_end : c0 + 1;
    int64_t i2 = block.begin % g.size[2];
    int64_t i1 = block.begin / g.size[2] % g.size[1];
    int64_t i0 = block.begin / g.size[2] / g.size[1];
    for (int64_t position = block.begin; position < block.end; ++position) {
      for (int64_t c = c0; c < c1; ++c) {
        f(c, static_cast<T*>(views.data) + c * views.stride_c + i0 * views.stride[0] + i1 * views.stride[1] +
                 i2 * views.stride[2]...);
      }
      if (++i2 < g.size[2]) continue;
      i2 = 0;
      if (++i1 < g.size[1]) continue;
      i1 = 0;
      ++i0;
    }
  }
}

void set_pivot(void* pivots, int64_t slot, double pivot) { static_cast<double*>(pivots)[slot] = pivot; }

void set_coefficients(void* arrays, int64_t, int64_t slot, const Coefficients& c) {
  static_cast<Coefficients*>(arrays)[slot] = c;
}
static_assert(sizeof(Coefficients) <= CoefficientArrays::kCount * sizeof(double));

const Coefficients* all_of(CoefficientArrays arrays) { return static_cast<const Coefficients*>(arrays.data); }

template <typename T>
void moments(const Geometry& g, const View& x, Block block, const void* pivots, double* s1, double* s2) {
  const auto* pivot = static_cast<const double*>(pivots);
  for_each_element<T>(
      g, block,
      [&](int64_t c, const T* px) {
        const double d = load_one(px) - pivot[c];
        s1[c] += d;
        s2[c] += d * d;
      },
      x);
}

double affine(const Coefficients& c, double x) { return (x - c.mean) * c.scale + c.shift; }

template <typename T>
void normalize(const Geometry& g, const View& x, const View& y, Block block, CoefficientArrays arrays,
               ElementwiseOptions) {
  const Coefficients* of = all_of(arrays);
  for_each_element<T>(
      g, block, [&](int64_t c, const T* px, T* py) { store_one(py, affine(of[c], load_one(px))); }, x, y);
}

template <typename T>
void backward_sums(const Geometry& g, const View& x, const View& dy, Block block, const void* pivots, double* sum_dy,
                   double* sum_dy_xmp) {
  const auto* pivot = static_cast<const double*>(pivots);
  for_each_element<T>(
      g, block,
      [&](int64_t c, const T* px, const T* pdy) {
        const double xmp = load_one(px) - pivot[c], d = load_one(pdy);
        sum_dy[c] += d;
        sum_dy_xmp[c] += d * xmp;
      },
      x, dy);
}

template <typename T>
void backward_apply(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                    CoefficientArrays arrays, ElementwiseOptions) {
  const Coefficients* of = all_of(arrays);
  for_each_element<T>(
      g, block,
      [&](int64_t c, const T* px, const T* pdy, T* pdx) {
        store_one(pdx, load_one(pdy) * of[c].scale_dy + affine(of[c], load_one(px)));
      },
      x, dy, dx);
}

template <typename T>
constexpr KernelTable kTable = {
    0, set_pivot, set_coefficients, moments<T>, normalize<T>, backward_sums<T>, backward_apply<T>};

}  // namespace

const KernelTable& strided_table(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return kTable<double>;
    case DType::kFloat32:
      return kTable<float>;
    case DType::kBFloat16:
      return kTable<BFloat16>;
    default:
      return kTable<Float16>;
  }
}

}  // namespace bnext::cpu
