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

constexpr int kUnroll = 4;  // independent accumulators: hides the latency of an add

// Calls step(offset, accumulator, first_lane) over [0, length): whole vectors, then one that overlaps what was done
// and must ignore the lanes below first_lane. Shorter than a vector: tail(offset) for each element.
template <typename Step, typename Tail>
BNEXT_INLINE void for_each_vector(int64_t length, Step step, Tail tail) {
  int64_t i = 0;
  for (; i + kUnroll * kDoubles <= length; i += kUnroll * kDoubles) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) step(i + u * kDoubles, u, 0);
  }
  for (; i + kDoubles <= length; i += kDoubles) step(i, 0, 0);
  if (i == length) return;
  if (length >= kDoubles) {
    step(length - kDoubles, 1, i - (length - kDoubles));
  } else {
    for (; i < length; ++i) tail(i);
  }
}

BNEXT_INLINE double sum_accumulators(const Doubles (&acc)[kUnroll]) {
  return sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <typename T>
void moments_planes(const Geometry& g, const View& x, Block block, const double* pivot, double* s1, double* s2) {
  for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
    const double p = pivot[c];
    Doubles a1[kUnroll] = {}, a2[kUnroll] = {};
    double t1 = 0, t2 = 0;
    for_each_run(
        g, block.begin, block.end,
        [&](int64_t offset, int64_t length) __attribute__((always_inline)) {
          const T* px = at<T>(x, c * x.stride_c + offset);
          for_each_vector(
              length,
              [&](int64_t i, int u, int64_t first) __attribute__((always_inline)) {
                Doubles d = load(px + i) - p;
                if (first > 0) d = keep_from(d, first);
                a1[u] += d;
                a2[u] += d * d;
              },
              [&](int64_t i) {
                const double d = load_one(px + i) - p;
                t1 += d;
                t2 += d * d;
              });
        },
        x);
    s1[c] += sum_accumulators(a1) + t1;
    s2[c] += sum_accumulators(a2) + t2;
  }
}

template <typename T>
void backward_sums_planes(const Geometry& g, const View& x, const View& dy, Block block, const double* mean,
                          double* sum_dy, double* sum_dy_xmu) {
  for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
    const double mu = mean[c];
    Doubles a_dy[kUnroll] = {}, a_dy_xmu[kUnroll] = {};
    double t_dy = 0, t_dy_xmu = 0;
    for_each_run(
        g, block.begin, block.end,
        [&](int64_t offset_x, int64_t offset_dy, int64_t length) __attribute__((always_inline)) {
          const T* px = at<T>(x, c * x.stride_c + offset_x);
          const T* pdy = at<T>(dy, c * dy.stride_c + offset_dy);
          for_each_vector(
              length,
              [&](int64_t i, int u, int64_t first) __attribute__((always_inline)) {
                Doubles xmu = load(px + i) - mu;
                Doubles d = load(pdy + i);
                if (first > 0) {
                  // Both: 0 * inf of the other lane would be a NaN.
                  xmu = keep_from(xmu, first);
                  d = keep_from(d, first);
                }
                a_dy[u] += d;
                a_dy_xmu[u] += d * xmu;
              },
              [&](int64_t i) {
                const double xmu = load_one(px + i) - mu;
                const double d = load_one(pdy + i);
                t_dy += d;
                t_dy_xmu += d * xmu;
              });
        },
        x, dy);
    sum_dy[c] += sum_accumulators(a_dy) + t_dy;
    sum_dy_xmu[c] += sum_accumulators(a_dy_xmu) + t_dy_xmu;
  }
}

// (x - mean) * scale + shift in what T's elementwise loops compute in.
template <typename V>
struct Affine;
template <>
struct Affine<Doubles> {
  Doubles mean, scale, shift;
  BNEXT_INLINE Affine(double m, double a, double b) : mean(Doubles{} + m), scale(Doubles{} + a), shift(Doubles{} + b) {}
  BNEXT_INLINE Affine(const double* m, const double* a, const double* b)
      : mean(load(m)), scale(load(a)), shift(load(b)) {}
  static BNEXT_INLINE Doubles splat(double value) { return Doubles{} + value; }
  static BNEXT_INLINE Doubles channels(const double* p) { return load(p); }
  BNEXT_INLINE Doubles operator()(Doubles x) const { return (x - mean) * scale + shift; }
};
template <>
struct Affine<WideFloats> {
  WideFloats mean, scale, shift;
  // What rounding takes from the mean goes into the shift.
  BNEXT_INLINE Affine(double m, double a, double b)
      : mean(splat(m)), scale(splat(a)), shift(splat(b + (static_cast<double>(static_cast<float>(m)) - m) * a)) {}
  BNEXT_INLINE Affine(const double* m, const double* a, const double* b) : mean(channels(m)), scale(channels(a)) {
    auto corrected = [&](int at) __attribute__((always_inline)) {
      const Doubles exact = load(m + at);
      return load(b + at) + (widen(narrow(exact)) - exact) * load(a + at);
    };
    shift = narrow(corrected(0), corrected(kDoubles));
  }
  static BNEXT_INLINE WideFloats splat(double value) { return WideFloats{} + static_cast<float>(value); }
  static BNEXT_INLINE WideFloats channels(const double* p) { return narrow(load(p), load(p + kDoubles)); }
  BNEXT_INLINE WideFloats operator()(WideFloats x) const { return (x - mean) * scale + shift; }
};

// Elements to do one by one before p is aligned for a streamed store.
template <typename T>
BNEXT_INLINE int64_t head_length(const T* p, int64_t length) {
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % kStoreBytes<T>);
  const int64_t head = (kStoreBytes<T> - past) % kStoreBytes<T> / static_cast<int64_t>(sizeof(T));
  return head < length ? head : length;
}

template <bool kStream, typename T>
void normalize_planes(const Geometry& g, const View& x, const View& y, Block block, const double* mean,
                      const double* scale, const double* shift) {
  for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
    const double mu = mean[c], a = scale[c], b = shift[c];
    const Affine<Elementwise<T>> f(mu, a, b);
    for_each_run(
        g, block.begin, block.end,
        [&](int64_t offset_x, int64_t offset_y, int64_t length) __attribute__((always_inline)) {
          const T* px = at<T>(x, c * x.stride_c + offset_x);
          T* py = at_mutable<T>(y, c * y.stride_c + offset_y);
          auto scalar = [&](int64_t i)
                            __attribute__((always_inline)) { store_one(py + i, (load_one(px + i) - mu) * a + b); };
          int64_t i = 0;
          for (const int64_t head = kStream ? head_length(py, length) : 0; i < head; ++i) scalar(i);
          for (; i + kStoreLanes<T> <= length; i += kStoreLanes<T>) store<kStream>(py + i, f(load_element(px + i)));
          for (; i < length; ++i) scalar(i);
        },
        x, y);
  }
  if constexpr (kStream) finish_stream();
}

template <bool kStream, typename T>
void backward_apply_planes(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                           const double* mean, const double* scale_dy, const double* scale_x, const double* shift) {
  for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
    const double mu = mean[c], a = scale_dy[c], b = scale_x[c], k = shift[c];
    const Affine<Elementwise<T>> f(mu, b, k);
    const auto va = f.splat(a);
    for_each_run(
        g, block.begin, block.end,
        [&](int64_t offset_x, int64_t offset_dy, int64_t offset_dx, int64_t length) __attribute__((always_inline)) {
          const T* px = at<T>(x, c * x.stride_c + offset_x);
          const T* pdy = at<T>(dy, c * dy.stride_c + offset_dy);
          T* pdx = at_mutable<T>(dx, c * dx.stride_c + offset_dx);
          auto scalar = [&](int64_t i) __attribute__((always_inline)) {
            store_one(pdx + i, load_one(pdy + i) * a + ((load_one(px + i) - mu) * b + k));
          };
          int64_t i = 0;
          for (const int64_t head = kStream ? head_length(pdx, length) : 0; i < head; ++i) scalar(i);
          for (; i + kStoreLanes<T> <= length; i += kStoreLanes<T>) {
            store<kStream>(pdx + i, load_element(pdy + i) * va + f(load_element(px + i)));
          }
          for (; i < length; ++i) scalar(i);
        },
        x, dy, dx);
  }
  if constexpr (kStream) finish_stream();
}

// Rows. A pass over kRowsPerPass rows loads and stores the per-channel numbers once, not kRowsPerPass times.
constexpr int kRowsPerPass = 8;

// A pass reads its rows side by side, which the processor's own prefetcher does not follow. Asking for the next pass's
// rows took the backward pass from 0.55 to 1.02 of the speed of PyTorch's, with and without this line in
// `python -m benchmarks --shape 32,256,28,28 --layout channels_last --direction backward --level op --threads 1`.
template <typename T>
BNEXT_INLINE void prefetch_next_pass(const T* p, const View& view) {
  __builtin_prefetch(p + kRowsPerPass * view.stride[2]);
}

// Calls pass(row, std::integral_constant<int, rows>) over [0, length). Streamed stores want one row after the other: a
// line of memory has to be complete before the processor's few buffers for such stores are needed for the next ones.
template <bool kStream = false, typename Pass>
BNEXT_INLINE void for_each_pass(int64_t length, Pass pass) {
  int64_t r = 0;
  if constexpr (!kStream) {
    for (; r + kRowsPerPass <= length; r += kRowsPerPass) pass(r, std::integral_constant<int, kRowsPerPass>());
  }
  for (; r < length; ++r) pass(r, std::integral_constant<int, 1>());
}

template <typename T>
void moments_rows(const Geometry& g, const View& x, Block block, const double* pivot, double* s1, double* s2) {
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset, int64_t length) __attribute__((always_inline)) {
        for_each_pass(length, [&](int64_t row, auto rows) __attribute__((always_inline)) {
          const T* px = at<T>(x, offset + row * x.stride[2]);
          int64_t c = block.channel_begin;
          for (; c + kDoubles <= block.channel_end; c += kDoubles) {
            const Doubles p = load(pivot + c);
            Doubles a1 = load(s1 + c), a2 = load(s2 + c);
#pragma GCC unroll 8
            for (int r = 0; r < rows.value; ++r) {
              prefetch_next_pass(px + r * x.stride[2] + c, x);
              const Doubles d = load(px + r * x.stride[2] + c) - p;
              a1 += d;
              a2 += d * d;
            }
            store<false>(s1 + c, a1);
            store<false>(s2 + c, a2);
          }
          for (; c < block.channel_end; ++c) {
            for (int r = 0; r < rows.value; ++r) {
              const double d = load_one(px + r * x.stride[2] + c) - pivot[c];
              s1[c] += d;
              s2[c] += d * d;
            }
          }
        });
      },
      x);
}

template <typename T>
void backward_sums_rows(const Geometry& g, const View& x, const View& dy, Block block, const double* mean,
                        double* sum_dy, double* sum_dy_xmu) {
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_dy, int64_t length) __attribute__((always_inline)) {
        for_each_pass(length, [&](int64_t row, auto rows) __attribute__((always_inline)) {
          const T* px = at<T>(x, offset_x + row * x.stride[2]);
          const T* pdy = at<T>(dy, offset_dy + row * dy.stride[2]);
          int64_t c = block.channel_begin;
          for (; c + kDoubles <= block.channel_end; c += kDoubles) {
            const Doubles mu = load(mean + c);
            Doubles a_dy = load(sum_dy + c);
            Doubles a_dy_xmu = load(sum_dy_xmu + c);
#pragma GCC unroll 8
            for (int r = 0; r < rows.value; ++r) {
              prefetch_next_pass(px + r * x.stride[2] + c, x);
              prefetch_next_pass(pdy + r * dy.stride[2] + c, dy);
              const Doubles xmu = load(px + r * x.stride[2] + c) - mu;
              const Doubles d = load(pdy + r * dy.stride[2] + c);
              a_dy += d;
              a_dy_xmu += d * xmu;
            }
            store<false>(sum_dy + c, a_dy);
            store<false>(sum_dy_xmu + c, a_dy_xmu);
          }
          for (; c < block.channel_end; ++c) {
            for (int r = 0; r < rows.value; ++r) {
              const double xmu = load_one(px + r * x.stride[2] + c) - mean[c];
              const double d = load_one(pdy + r * dy.stride[2] + c);
              sum_dy[c] += d;
              sum_dy_xmu[c] += d * xmu;
            }
          }
        });
      },
      x, dy);
}

template <bool kStream, typename T>
void normalize_rows(const Geometry& g, const View& x, const View& y, Block block, const double* mean,
                    const double* scale, const double* shift) {
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_y, int64_t length) __attribute__((always_inline)) {
        for_each_pass<kStream>(length, [&](int64_t row, auto rows) __attribute__((always_inline)) {
          const T* px = at<T>(x, offset_x + row * x.stride[2]);
          T* py = at_mutable<T>(y, offset_y + row * y.stride[2]);
          int64_t c = block.channel_begin;
          for (; c + kStoreLanes<T> <= block.channel_end; c += kStoreLanes<T>) {
            const Affine<Elementwise<T>> f(mean + c, scale + c, shift + c);
#pragma GCC unroll 8
            for (int r = 0; r < rows.value; ++r) {
              prefetch_next_pass(px + r * x.stride[2] + c, x);
              store<kStream>(py + r * y.stride[2] + c, f(load_element(px + r * x.stride[2] + c)));
            }
          }
          for (; c < block.channel_end; ++c) {
            for (int r = 0; r < rows.value; ++r) {
              store_one(py + r * y.stride[2] + c, (load_one(px + r * x.stride[2] + c) - mean[c]) * scale[c] + shift[c]);
            }
          }
        });
      },
      x, y);
  if constexpr (kStream) finish_stream();
}

template <bool kStream, typename T>
void backward_apply_rows(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                         const double* mean, const double* scale_dy, const double* scale_x, const double* shift) {
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_dy, int64_t offset_dx, int64_t length) __attribute__((always_inline)) {
        for_each_pass<kStream>(length, [&](int64_t row, auto rows) __attribute__((always_inline)) {
          const T* px = at<T>(x, offset_x + row * x.stride[2]);
          const T* pdy = at<T>(dy, offset_dy + row * dy.stride[2]);
          T* pdx = at_mutable<T>(dx, offset_dx + row * dx.stride[2]);
          int64_t c = block.channel_begin;
          for (; c + kStoreLanes<T> <= block.channel_end; c += kStoreLanes<T>) {
            const Affine<Elementwise<T>> f(mean + c, scale_x + c, shift + c);
            const auto a = f.channels(scale_dy + c);
#pragma GCC unroll 8
            for (int r = 0; r < rows.value; ++r) {
              prefetch_next_pass(px + r * x.stride[2] + c, x);
              prefetch_next_pass(pdy + r * dy.stride[2] + c, dy);
              store<kStream>(pdx + r * dx.stride[2] + c,
                             load_element(pdy + r * dy.stride[2] + c) * a + f(load_element(px + r * x.stride[2] + c)));
            }
          }
          for (; c < block.channel_end; ++c) {
            for (int r = 0; r < rows.value; ++r) {
              store_one(pdx + r * dx.stride[2] + c,
                        load_one(pdy + r * dy.stride[2] + c) * scale_dy[c] +
                            ((load_one(px + r * x.stride[2] + c) - mean[c]) * scale_x[c] + shift[c]));
            }
          }
        });
      },
      x, dy, dx);
  if constexpr (kStream) finish_stream();
}

// Where every row of a view is aligned for streamed stores.
template <typename T>
bool has_aligned_rows(const View& view) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % kStoreBytes<T> == 0;
  for (int64_t stride : view.stride)
    aligned = aligned && stride * static_cast<int64_t>(sizeof(T)) % kStoreBytes<T> == 0;
  return aligned;
}

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
