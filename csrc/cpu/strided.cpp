// One element at a time, in the order of the walk: correct for any strides, without copying the tensor first.
#include "strided.h"

#include <algorithm>
#include <type_traits>

#include "half.h"

namespace bnext::cpu {
namespace {

// Elements of one channel that lie `step` apart.
template <typename T>
struct Strided {
  T* first;
  int64_t step;

  T* operator+(int64_t i) const { return first + i * step; }
};

// How many elements a run of rows has, for the compiler.
using One = std::integral_constant<int64_t, 1>;

// Calls f(c, n, n elements of each view...) until every element of the block has been there. Planes: each channel in
// turn, as many as lie along the innermost dimension. Rows: one of each channel at each position.
template <typename T, typename F, typename... Views>
void for_each_run(const Geometry& g, Block block, F f, const Views&... views) {
  const bool rows = g.walk == Walk::kRows;
  for (int64_t c0 = block.channel_begin; c0 < block.channel_end; c0 = rows ? block.channel_end : c0 + 1) {
    int64_t i2 = block.begin % g.size[2];
    int64_t i1 = block.begin / g.size[2] % g.size[1];
    int64_t i0 = block.begin / g.size[2] / g.size[1];
    auto elements = [&](int64_t c, const View& view) {
      return Strided<T>{static_cast<T*>(view.data) + c * view.stride_c + i0 * view.stride[0] + i1 * view.stride[1] +
                            i2 * view.stride[2],
                        view.stride[2]};
    };
    for (int64_t position = block.begin; position < block.end;) {
      const int64_t n = rows ? 1 : std::min(g.size[2] - i2, block.end - position);
      if (rows) {
        for (int64_t c = c0; c < block.channel_end; ++c) f(c, One(), elements(c, views)...);
      } else {
        f(c0, n, elements(c0, views)...);
      }
      position += n;
      i2 += n;
      if (i2 < g.size[2]) continue;
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
  for_each_run<T>(
      g, block,
      [&](int64_t c, auto n, Strided<T> px) {
        const double around = pivot[c];
        double sum1 = s1[c], sum2 = s2[c];
        for (int64_t i = 0; i < n; ++i) {
          const double d = load_one(px + i) - around;
          sum1 += d;
          sum2 += d * d;
        }
        s1[c] = sum1;
        s2[c] = sum2;
      },
      x);
}

double affine(const Coefficients& c, double x) { return (x - c.mean) * c.scale + c.shift; }

template <typename T>
void normalize(const Geometry& g, const View& x, const View& y, Block block, CoefficientArrays arrays,
               ElementwiseOptions) {
  const Coefficients* of = all_of(arrays);
  for_each_run<T>(
      g, block,
      [&](int64_t c, auto n, Strided<T> px, Strided<T> py) {
        const Coefficients channel = of[c];
        for (int64_t i = 0; i < n; ++i) store_one(py + i, affine(channel, load_one(px + i)));
      },
      x, y);
}

template <typename T>
void backward_sums(const Geometry& g, const View& x, const View& dy, Block block, const void* pivots, double* sum_dy,
                   double* sum_dy_xmp) {
  const auto* pivot = static_cast<const double*>(pivots);
  for_each_run<T>(
      g, block,
      [&](int64_t c, auto n, Strided<T> px, Strided<T> pdy) {
        const double around = pivot[c];
        double sum = sum_dy[c], sum_xmp = sum_dy_xmp[c];
        for (int64_t i = 0; i < n; ++i) {
          const double xmp = load_one(px + i) - around, d = load_one(pdy + i);
          sum += d;
          sum_xmp += d * xmp;
        }
        sum_dy[c] = sum;
        sum_dy_xmp[c] = sum_xmp;
      },
      x, dy);
}

template <typename T>
void backward_apply(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                    CoefficientArrays arrays, ElementwiseOptions) {
  const Coefficients* of = all_of(arrays);
  for_each_run<T>(
      g, block,
      [&](int64_t c, auto n, Strided<T> px, Strided<T> pdy, Strided<T> pdx) {
        const Coefficients channel = of[c];
        for (int64_t i = 0; i < n; ++i) {
          store_one(pdx + i, load_one(pdy + i) * channel.scale_dy + affine(channel, load_one(px + i)));
        }
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
