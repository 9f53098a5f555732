// Short planes (7 x 7) of neighbouring channels, as rows: for each n, the channels of a block are one contiguous
// run, whose columns belong to one channel after the other. Vectors then go across the ends of planes, and no part of a
// vector is masked, or stored twice, at each of them.
// Part of kernels_impl.h; no include guard on purpose.

// Columns of a run at most: their numbers should stay in the nearest cache.
constexpr int64_t kMaxColumns = 1024;
// Longer planes have few ends: with sums of 8 x 8 plane by plane, whole passes take 0 to 15 % less, in the mean of four
// shapes, in all dtypes and instruction sets. Fewer rows than this do not pay for laying out numbers for every column.
// Nor does bfloat16 with long vectors, of which one has most of a plane. AVX2, forward of 32 x 2048 x 7 x 7, bfloat16:
// 18 -> 3.8 ms.
constexpr int64_t kMaxRunPositions = 63, kMinRunRows = 8;

// Depends on the shape and the layout alone; blocks of planes always have whole ones this short.
template <typename T, typename... Views>
BNEXT_INLINE bool has_runs(const Geometry& g, const Views&... views) {
  const bool dense = ((views.stride_c == g.size[2]) && ...);
  if (kIsSplit<T> && kLongVectors) return false;
  return dense && g.size[2] > 1 && g.size[2] <= kMaxRunPositions && g.size[0] == 1 && g.size[1] >= kMinRunRows;
}

// Elementwise work has vectors across the ends of planes anyway (map_planes), whose lanes take the numbers of two
// channels: for 7 x 7 float32 that is faster than numbers laid out for all columns (backward 3 to 20 %, forward 0 to 15
// %; 5 x 5 about the same, 4 x 4 up to 30 % slower), for 7 x 7 float16 slower by up to 8 %. A block with one row would
// lay out numbers for each element.
template <typename T>
constexpr int64_t kMaxElementwiseRun = sizeof(T) == 2 ? kMaxRunPositions : 24;
template <typename T, typename... Views>
BNEXT_INLINE bool block_has_runs(const Geometry& g, const Block& block, const Views&... views) {
  return g.size[2] <= kMaxElementwiseRun<T> && block.end - block.begin > g.size[2] && has_runs<T>(g, views...);
}

// Channels [begin, end) of a block, as rows.
struct Run {
  int64_t channel_begin, channel_end, length;  // length of a plane
  Geometry geometry;
  Block block;

  BNEXT_INLINE int64_t columns() const { return block.channel_end; }
  BNEXT_INLINE View view(const View& v, int64_t element_bytes) const {
    View rows = v;
    rows.data = static_cast<char*>(v.data) + channel_begin * v.stride_c * element_bytes;
    rows.stride_c = 1;
    rows.stride[2] = v.stride[1];
    return rows;
  }
};

// From the order of columns to that in which loops over rows of T have them, and back.
template <typename T, bool kBack, typename S>
BNEXT_INLINE void reorder(const Run& run, S* of_columns) {
  constexpr int64_t half = kLanes<T> / 2;
  for (int64_t i = 0; kIsSplit<T> && i < run.columns(); i += kLanes<T>) {
    S from[kLanes<T>], *to = of_columns + i;
    __builtin_memcpy(from, to, sizeof from);
    for (int64_t k = 0; k < half; ++k) {
      to[kBack ? 2 * k : k] = from[kBack ? k : 2 * k];
      to[kBack ? 2 * k + 1 : half + k] = from[kBack ? half + k : 2 * k + 1];
    }
  }
}

// Numbers of columns, with zeros up to the end of the last vector.
template <typename T, typename S>
BNEXT_INLINE void repeat(const Run& run, const S* of_channels, S* of_columns) {
  S* to = of_columns;
  for (int64_t c = run.channel_begin; c < run.channel_end; ++c) {
    for (int64_t i = 0; i < run.length; ++i) *to++ = of_channels[c];
  }
  for (int64_t i = run.columns(); i % kLanes<T> != 0; ++i) *to++ = 0;
  reorder<T, false>(run, of_columns);
}

template <typename F>
BNEXT_INLINE void for_each_of_runs(const Geometry& g, const Block& block, F f) {
  const int64_t length = g.size[2];
  int64_t most = kMaxBlockChannels;  // a power of two, as blocks have: runs then begin aligned where the tensor is
  while (most * length > kMaxColumns) most /= 2;
  for (int64_t c = block.channel_begin; c < block.channel_end; c += most) {
    const int64_t end = c + most < block.channel_end ? c + most : block.channel_end;
    Run run{c, end, length, g, {0, (end - c) * length, block.begin / length, block.end / length}};
    run.geometry.num_channels = run.columns();
    run.geometry.size[1] = 1;
    run.geometry.size[2] = g.size[1];
    run.geometry.walk = Walk::kRows;
    f(run);
  }
}

// Pivots and two sums for each column.
template <typename T>
struct ColumnSums {
  alignas(64) TermScalar<T> pivot[kMaxColumns];
  alignas(64) double a[kMaxColumns] = {}, b[kMaxColumns] = {};

  BNEXT_INLINE ColumnSums(const Run& run, const void* pivots) {
    repeat<T>(run, static_cast<const TermScalar<T>*>(pivots), pivot);
  }
  BNEXT_INLINE void add_to(const Run& run, double* to_a, double* to_b) {
    add(run, a, to_a);
    add(run, b, to_b);
  }

 private:
  // Four at a time: one addition after the other would take as long as a pass over a few rows.
  static BNEXT_INLINE void add(const Run& run, double* from, double* to) {
    reorder<T, true>(run, from);
    for (int64_t c = run.channel_begin; c < run.channel_end; ++c, from += run.length) {
      double part[4] = {};
      int64_t i = 0;
      for (; i + 4 <= run.length; i += 4) {
        for (int k = 0; k < 4; ++k) part[k] += from[i + k];
      }
      for (; i < run.length; ++i) part[0] += from[i];
      to[c] += (part[0] + part[1]) + (part[2] + part[3]);
    }
  }
};

template <typename T>
void moments_runs(const Geometry& g, const View& x, Block block, const void* pivots, double* s1, double* s2) {
  for_each_of_runs(g, block, [&](const Run& run) __attribute__((always_inline)) {
    ColumnSums<T> sums(run, pivots);
    moments_in_passes<T>(run.geometry, run.view(x, sizeof(T)), run.block, sums.pivot, sums.a, sums.b,
                         rows_per_sum<T>(g));
    sums.add_to(run, s1, s2);
  });
}

template <typename T>
void backward_sums_runs(const Geometry& g, const View& x, const View& dy, Block block, const void* pivots,
                        double* sum_dy, double* sum_dy_xmp) {
  for_each_of_runs(g, block, [&](const Run& run) __attribute__((always_inline)) {
    ColumnSums<T> sums(run, pivots);
    backward_sums_in_passes<T>(run.geometry, run.view(x, sizeof(T)), run.view(dy, sizeof(T)), run.block, sums.pivot,
                               sums.a, sums.b, rows_per_sum<T>(g));
    sums.add_to(run, sum_dy, sum_dy_xmp);
  });
}

template <typename T>
struct ColumnCoefficients {
  alignas(64) Scalar<T> number[CoefficientArrays::kCount][kMaxColumns];

  BNEXT_INLINE ColumnCoefficients(const Run& run, CoefficientArrays of_channels) {
    const auto* from = static_cast<const Scalar<T>*>(of_channels.data);
    for (int k = 0; k < CoefficientArrays::kCount; ++k) repeat<T>(run, from + k * of_channels.width, number[k]);
  }
  BNEXT_INLINE CoefficientArrays arrays() const { return {number, kMaxColumns}; }
};

template <typename T>
void normalize_runs(const Geometry& g, const View& x, const View& y, Block block, CoefficientArrays arrays,
                    ElementwiseOptions options) {
  for_each_of_runs(g, block, [&](const Run& run) __attribute__((always_inline)) {
    const ColumnCoefficients<T> columns(run, arrays);
    normalize_any_rows<T>(run.geometry, run.view(x, sizeof(T)), run.view(y, sizeof(T)), run.block, columns.arrays(),
                          options);
  });
}

template <typename T>
void backward_apply_runs(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                         CoefficientArrays arrays, ElementwiseOptions options) {
  for_each_of_runs(g, block, [&](const Run& run) __attribute__((always_inline)) {
    const ColumnCoefficients<T> columns(run, arrays);
    backward_apply_any_rows<T>(run.geometry, run.view(x, sizeof(T)), run.view(dy, sizeof(T)), run.view(dx, sizeof(T)),
                               run.block, columns.arrays(), options);
  });
}
