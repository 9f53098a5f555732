// Rows: the channels of a position lie side by side. Every row needs the numbers of every channel, so loops take a few
// rows at once, and of them a few vectors of channels whose numbers stay in registers.
// Part of kernels_impl.h; no include guard on purpose.

// Vectors of channels in registers: two sums and a pivot, or four coefficients, for each. A Split is two.
template <typename T>
constexpr int kColumns = (BNEXT_ISA_LEVEL == 2 ? 4 : 2) / (kIsSplit<T> ? 2 : 1);
// Channels at a time whose numbers are laid out for vector loads: 10 KB of coefficients in float32.
constexpr int64_t kTileChannels = 512;

// Rows of one pass: the more, the less often the numbers of the channels are loaded; but rows side by side are as many
// streams for the processor to fetch ahead, and it does so badly when they are long. Backward sums of 6272 x 512 and of
// 6272 x 1024 float32 with passes of 8 rows: 3.7 and 5.8 ns for 16 elements; as here: 2.3 and 3.3.
constexpr int64_t kPassBytes = int64_t{8} << 10;

template <typename T>
BNEXT_INLINE int rows_per_pass(const Geometry& g) {
  const int64_t rows = kPassBytes / (g.num_channels * static_cast<int64_t>(sizeof(T)));
  return rows >= kGroup ? kGroup : rows <= 2 ? 2 : static_cast<int>(rows);
}

// The same for sums, whose chains are no longer than a pass. Few rows of bfloat16 go one by one: what rounding takes from
// a float32 sum of eight terms shows when there are not many more.
constexpr int64_t kFewPositions = 64;
template <typename T>
BNEXT_INLINE int rows_per_sum(const Geometry& g) {
  return kIsSplit<T> && g.num_positions() <= kFewPositions ? 1 : rows_per_pass<T>(g);
}

// Calls f(first_channel, width) for each tile of the block.
template <typename F>
BNEXT_INLINE void for_each_tile(const Block& block, F f) {
  for (int64_t c = block.channel_begin; c < block.channel_end; c += kTileChannels) {
    f(c, c + kTileChannels < block.channel_end ? kTileChannels : block.channel_end - c);
  }
}

// Calls pass(row, rows) over [0, length).
template <typename Pass>
BNEXT_INLINE void for_each_pass(int64_t length, int step, Pass pass) {
  for (int64_t r = 0; r < length; r += step) pass(r, r + step < length ? step : static_cast<int>(length - r));
}

// Calls f(i, vectors, count) over [0, width): kColumns whole vectors at a time, then single ones, then a partial one.
template <typename T, int64_t kLanesOfOne, typename F>
BNEXT_INLINE void for_each_column(int64_t width, F f) {
  int64_t i = 0;
  for (; i + kColumns<T> * kLanesOfOne <= width; i += kColumns<T> * kLanesOfOne) {
    f(i, std::integral_constant<int, kColumns<T>>(), Whole());
  }
  for (; i + kLanesOfOne <= width; i += kLanesOfOne) f(i, std::integral_constant<int, 1>(), Whole());
  if (i < width) f(i, std::integral_constant<int, 1>(), width - i);
}

// Two running sums and a pivot for each channel of a tile.
template <typename T>
struct TileSums {
  static constexpr int64_t kVectors = kTileChannels / kTermLanes<T>;
  alignas(64) TermScalar<T> pivot[kTileChannels];
  Total<T> a[kVectors], b[kVectors];

  BNEXT_INLINE TileSums(const double* pivots, int64_t width) {
    const int64_t padded = (width + kTermLanes<T> - 1) / kTermLanes<T> * kTermLanes<T>;
    for (int64_t i = 0; i < padded; ++i) pivot[slot<T>(i)] = i < width ? static_cast<TermScalar<T>>(pivots[i]) : 0;
    for (int64_t v = 0; v < padded / kTermLanes<T>; ++v) a[v] = b[v] = {};
  }
  BNEXT_INLINE void add_to(double* to_a, double* to_b, int64_t width) const {
    const double *from_a = reinterpret_cast<const double*>(a), *from_b = reinterpret_cast<const double*>(b);
    for (int64_t i = 0; i < width; ++i) {
      to_a[i] += from_a[slot<T>(i)];
      to_b[i] += from_b[slot<T>(i)];
    }
  }
};

template <typename T>
void moments_rows(const Geometry& g, const View& x, Block block, const double* pivot, double* s1, double* s2) {
  constexpr int64_t lanes = kTermLanes<T>;
  const int step = rows_per_sum<T>(g);
  for_each_tile(block, [&](int64_t begin, int64_t width) __attribute__((always_inline)) {
    TileSums<T> tile(pivot + begin, width);
    for_each_run(
        g, block.begin, block.end,
        [&](int64_t offset, int64_t length) __attribute__((always_inline)) {
          for_each_pass(length, step, [&](int64_t row, int rows) __attribute__((always_inline)) {
            const T* first = at<T>(x, offset + row * x.stride[2] + begin);
            for_each_column<T, lanes>(width, [&](int64_t i, auto vectors, auto count) __attribute__((always_inline)) {
              constexpr int kVectors = decltype(vectors)::value;
              Term<T> a[kVectors] = {}, b[kVectors] = {}, p[kVectors];
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) p[v] = load_raw<Term<T>>(tile.pivot + i + v * lanes);
              for (int r = 0; r < rows; ++r) {
                const T* px = first + r * x.stride[2] + i;
                prefetch_run(px + step * x.stride[2], kVectors * lanes);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                  const Term<T> d = load_term(px + v * lanes, count) - p[v];
                  a[v] += d;
                  b[v] += d * d;
                }
              }
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) {
                tile.a[i / lanes + v].add(a[v]);
                tile.b[i / lanes + v].add(b[v]);
              }
            });
          });
        },
        x);
    tile.add_to(s1 + begin, s2 + begin, width);
  });
}

template <typename T>
void backward_sums_rows(const Geometry& g, const View& x, const View& dy, Block block, const double* pivot,
                        double* sum_dy, double* sum_dy_xmp) {
  constexpr int64_t lanes = kTermLanes<T>;
  const int step = rows_per_sum<T>(g);
  for_each_tile(block, [&](int64_t begin, int64_t width) __attribute__((always_inline)) {
    TileSums<T> tile(pivot + begin, width);
    for_each_run(
        g, block.begin, block.end,
        [&](int64_t offset_x, int64_t offset_dy, int64_t length) __attribute__((always_inline)) {
          for_each_pass(length, step, [&](int64_t row, int rows) __attribute__((always_inline)) {
            const T* first_x = at<T>(x, offset_x + row * x.stride[2] + begin);
            const T* first_dy = at<T>(dy, offset_dy + row * dy.stride[2] + begin);
            for_each_column<T, lanes>(width, [&](int64_t i, auto vectors, auto count) __attribute__((always_inline)) {
              constexpr int kVectors = decltype(vectors)::value;
              Term<T> a[kVectors] = {}, b[kVectors] = {}, p[kVectors];
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) p[v] = load_raw<Term<T>>(tile.pivot + i + v * lanes);
              for (int r = 0; r < rows; ++r) {
                const T* px = first_x + r * x.stride[2] + i;
                const T* pdy = first_dy + r * dy.stride[2] + i;
                prefetch_run(px + step * x.stride[2], kVectors * lanes);
                prefetch_run(pdy + step * dy.stride[2], kVectors * lanes);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                  const Term<T> d = load_term(pdy + v * lanes, count);
                  a[v] += d;
                  b[v] += d * (load_term(px + v * lanes, count) - p[v]);
                }
              }
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) {
                tile.a[i / lanes + v].add(a[v]);
                tile.b[i / lanes + v].add(b[v]);
              }
            });
          });
        },
        x, dy);
    tile.add_to(sum_dy + begin, sum_dy_xmp + begin, width);
  });
}

// The coefficients of a tile of channels, one array for each of them.
template <typename T>
struct TileCoefficients {
  alignas(64) Scalar<T> mean[kTileChannels], scale[kTileChannels], scale_low[kTileChannels], shift[kTileChannels];
  alignas(64) Scalar<T> scale_dy[kTileChannels];

  // affine(c) and dy(c): the coefficients of channel c, which is the first of the tile for c = 0.
  template <typename F, typename G>
  BNEXT_INLINE TileCoefficients(int64_t width, F affine, G dy) {
    const int64_t padded = (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (int64_t i = 0; i < padded; ++i) {
      const Affine<T> f = i < width ? affine(i) : Affine<T>(0, 0, 0);
      const int64_t to = slot<T>(i);
      mean[to] = f.mean;
      scale[to] = f.scale;
      scale_low[to] = f.scale_low;
      shift[to] = f.shift;
      scale_dy[to] = i < width ? to_scalar<Scalar<T>>(dy(i)) : 0;
    }
  }
  BNEXT_INLINE AffineVector<T> vector(int64_t i) const {
    return {load_raw<Value<T>>(mean + i), load_raw<Value<T>>(scale + i), load_raw<Value<T>>(scale_low + i),
            load_raw<Value<T>>(shift + i)};
  }
};

template <bool kStream, typename T>
void normalize_rows(const Geometry& g, const View& x, const View& y, Block block, const double* mean,
                    const double* scale, const double* shift) {
  constexpr int64_t lanes = kLanes<T>;
  for_each_tile(block, [&](int64_t begin, int64_t width) __attribute__((always_inline)) {
    const TileCoefficients<T> tile(
        width, [&](int64_t i) { return Affine<T>(mean[begin + i], scale[begin + i], shift[begin + i]); },
        [](int64_t) { return 0.0; });
    for_each_run(
        g, block.begin, block.end,
        [&](int64_t offset_x, int64_t offset_y, int64_t length) __attribute__((always_inline)) {
          for_each_pass(length, rows_per_pass<T>(g), [&](int64_t row, int rows) __attribute__((always_inline)) {
            const T* first_x = at<T>(x, offset_x + row * x.stride[2] + begin);
            T* first_y = at_mutable<T>(y, offset_y + row * y.stride[2] + begin);
            for_each_column<T, lanes>(width, [&](int64_t i, auto vectors, auto count) __attribute__((always_inline)) {
              constexpr int kVectors = decltype(vectors)::value;
              AffineVector<T> f[kVectors];
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) f[v] = tile.vector(i + v * lanes);
              for (int r = 0; r < rows; ++r) {
                const T* px = first_x + r * x.stride[2] + i;
                T* py = first_y + r * y.stride[2] + i;
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                  put_value<kStream>(py + v * lanes, f[v](load_value(px + v * lanes, count)), count);
                }
              }
            });
          });
        },
        x, y);
  });
  if constexpr (kStream) finish_stream();
}

template <bool kStream, typename T>
void backward_apply_rows(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                         const double* mean, const double* scale_dy, const double* scale_x, const double* shift) {
  constexpr int64_t lanes = kLanes<T>;
  for_each_tile(block, [&](int64_t begin, int64_t width) __attribute__((always_inline)) {
    const TileCoefficients<T> tile(
        width, [&](int64_t i) { return Affine<T>(mean[begin + i], scale_x[begin + i], shift[begin + i]); },
        [&](int64_t i) { return scale_dy[begin + i]; });
    for_each_run(
        g, block.begin, block.end,
        [&](int64_t offset_x, int64_t offset_dy, int64_t offset_dx, int64_t length) __attribute__((always_inline)) {
          for_each_pass(length, rows_per_pass<T>(g), [&](int64_t row, int rows) __attribute__((always_inline)) {
            const T* first_x = at<T>(x, offset_x + row * x.stride[2] + begin);
            const T* first_dy = at<T>(dy, offset_dy + row * dy.stride[2] + begin);
            T* first_dx = at_mutable<T>(dx, offset_dx + row * dx.stride[2] + begin);
            for_each_column<T, lanes>(width, [&](int64_t i, auto vectors, auto count) __attribute__((always_inline)) {
              constexpr int kVectors = decltype(vectors)::value;
              AffineVector<T> f[kVectors];
              Value<T> a[kVectors];
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) {
                f[v] = tile.vector(i + v * lanes);
                a[v] = load_raw<Value<T>>(tile.scale_dy + i + v * lanes);
              }
              for (int r = 0; r < rows; ++r) {
                const T* px = first_x + r * x.stride[2] + i;
                const T* pdy = first_dy + r * dy.stride[2] + i;
                T* pdx = first_dx + r * dx.stride[2] + i;
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                  put_value<kStream>(
                      pdx + v * lanes,
                      load_value(pdy + v * lanes, count) * a[v] + f[v](load_value(px + v * lanes, count)), count);
                }
              }
            });
          });
        },
        x, dy, dx);
  });
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
