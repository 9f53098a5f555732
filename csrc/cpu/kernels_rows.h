// Rows: the channels of a position lie side by side. Every row needs the numbers of every channel. Sums, and
// elementwise work of narrow and of very wide rows, take some rows at a time, and of them a few vectors of channels,
// whose numbers stay in registers. Part of kernels_impl.h; no include guard on purpose.

// Vectors of channels in registers: two sums and a pivot, or four coefficients, for each. A Split is two.
template <typename T>
constexpr int kColumns = (kLongVectors ? 4 : 2) / (kIsSplit<T> ? 2 : 1);

// Of a row, what a block has of it.
template <typename T>
BNEXT_INLINE int64_t row_bytes(const Block& block) {
  return (block.channel_end - block.channel_begin) * static_cast<int64_t>(sizeof(T));
}

// Rows whose sums stay in registers. One row at a time, each sum is loaded and stored for each element. Zen 4, AVX-512,
// forward of 6272 x 256, float32: 0.49 -> 0.29 ms. Of 16-bit elements these sums are float32, and few rows leave it
// each: what rounding takes from a float32 sum of eight terms shows when there are not many more.
constexpr int64_t kFewPositions = 64;
template <typename T>
BNEXT_INLINE int rows_per_sum(const Geometry& g) {
  return kIsHalf<T> && g.num_positions() <= kFewPositions ? 1 : kGroup;
}

// Whether a block's rows follow one another without a gap. Those of runs hardly ever do: they lie a whole image apart.
BNEXT_INLINE bool rows_adjoin(const View& view, const Block& block) {
  return view.stride[2] == block.channel_end - block.channel_begin;
}

// Where they do, sums take so many groups of these rows in a pass, side by side, as long as the rows have no more than
// these bytes, and there are a few passes. Meanwhile the rows of the next pass are asked for. Zen 4, AVX-512, sums of
// 6272 x 1024 float32, not in cache, in a program of its own: 1.18 -> 0.86 ms, as long as reading takes. With vectors
// of 32 bytes, sums of x and dy took up to a quarter longer; in runs, a tenth.
constexpr int64_t kMostGroups = kLongVectors ? 4 : 1, kFewestPasses = 4, kSumPassBytes = int64_t{128} << 10;
template <typename T>
BNEXT_INLINE int rows_per_sum_pass(const Geometry& g, const Block& block, const View& x, int group) {
  if (!rows_adjoin(x, block)) return group;
  const int64_t by_bytes = kSumPassBytes / row_bytes<T>(block), by_passes = g.size[2] / kFewestPasses;
  const int64_t groups = (by_bytes < by_passes ? by_bytes : by_passes) / group;
  return group * static_cast<int>(groups < 1 ? 1 : groups > kMostGroups ? kMostGroups : groups);
}

// Where a block has so many channels, elementwise work takes its rows one by one, and a vector at a time: what it reads
// and writes is in the order of memory, and the numbers of the channels come from the nearest cache for each vector.
// Zen 4, AVX-512, tensors not in cache: backward of 6272 x 512 bfloat16 1.05 -> 0.79 ms.
constexpr int64_t kWideRowChannels = 128;
// Of narrower ones it takes several side by side, with the numbers in registers: eight, or as many as these bytes hold.
constexpr int64_t kApplyPassBytes = int64_t{1} << 10;
// The numbers of more channels than this have no room in the nearest cache, and should serve several rows each time.
// Zen 4, AVX-512, evaluation of 1568 x 2048 float32: 1.11 -> 0.88 ms.
constexpr int64_t kNearChannels = 1024;
constexpr int kFarRows = 4;

template <typename T>
BNEXT_INLINE int rows_per_apply(const Block& block) {
  if (block.channel_end - block.channel_begin > kNearChannels) return kFarRows;
  const int64_t rows = kApplyPassBytes / row_bytes<T>(block);
  return kIsHalf<T> || rows > kGroup ? kGroup : static_cast<int>(rows);
}

// Rows from one to that which is asked for: at least a pass. For reading, kAheadBytes as in planes.
template <typename T>
BNEXT_INLINE int64_t rows_ahead(const Block& block, int64_t bytes, int64_t pass) {
  const int64_t rows = ceil_div(bytes, row_bytes<T>(block));
  return rows > pass ? rows : pass;
}

// From the line that is written to one that will be, at least 2 KB on: in what the block has of this row, or in the
// next row that is not written side by side with this one. Other parts of the row are not this block's.
template <typename T>
class WriteAhead {
 public:
  // `step`: rows of a pass.
  BNEXT_INLINE WriteAhead(const View& view, const Block& block, int step) : end_(block.channel_end) {
    const int64_t channels = block.channel_end - block.channel_begin, stride = view.stride[2];
    beyond_ = channels > kDistance ? kDistance - channels + step * stride
                                   : rows_ahead<T>(block, kWriteAheadBytes, step) * stride;
  }
  BNEXT_INLINE int64_t operator()(int64_t c) const { return c + kDistance < end_ ? kDistance : beyond_; }

 private:
  static constexpr int64_t kWriteAheadBytes = int64_t{2} << 10;
  static constexpr int64_t kDistance = kWriteAheadBytes / static_cast<int64_t>(sizeof(T));
  int64_t end_, beyond_;
};

// Calls pass(row, rows) over [0, length).
template <typename Pass>
BNEXT_INLINE void for_each_pass(int64_t length, int step, Pass pass) {
  for (int64_t r = 0; r < length; r += step) pass(r, r + step < length ? step : static_cast<int>(length - r));
}

// Calls f(channel, vectors, count) over a block's channels: kVectors whole vectors at a time, then single ones, all
// with a count of All, then a partial one.
template <int kVectors, int64_t kLanesOfOne, typename All = Whole, typename F>
BNEXT_INLINE void for_each_column(const Block& block, F f) {
  int64_t c = block.channel_begin;
  const int64_t end = block.channel_end;
  for (; c + kVectors * kLanesOfOne <= end; c += kVectors * kLanesOfOne) {
    f(c, std::integral_constant<int, kVectors>(), All());
  }
  for (; c + kLanesOfOne <= end; c += kLanesOfOne) f(c, std::integral_constant<int, 1>(), All());
  if (c < end) f(c, std::integral_constant<int, 1>(), end - c);
}

// How many rows there are from this position on, in this block and in those behind it, whose turn comes next. Goes on
// by so many.
BNEXT_INLINE int64_t take_rows(const Geometry& g, int64_t& position, int64_t rows) {
  const int64_t left = g.size[2] - position % g.size[2];
  position += rows;
  return left;
}

// A pass takes its rows side by side, a few columns at a time. Meanwhile this asks for those of a later one in the
// order of memory, in which it is read best. Zen 4, sums of x and dy, 25088 x 128 float32: 0.75 -> 0.33 ms.
template <typename T>
class RowsAhead {
 public:
  BNEXT_INLINE RowsAhead(const T* row, const Block& block, int64_t stride)
      : next_(row + block.channel_begin), width_(block.channel_end - block.channel_begin), stride_(stride) {}
  BNEXT_INLINE void ask(int64_t count) {
    prefetch(next_ + asked_, count);
    asked_ += count;
    if (asked_ >= width_) {
      next_ += stride_;
      asked_ -= width_;
    }
  }

 private:
  const T* next_;
  int64_t width_, stride_, asked_ = 0;
};

// Sums in passes; see rows_per_sum for `group`.
template <typename T>
void moments_in_passes(const Geometry& g, const View& x, Block block, const void* pivots, double* s1, double* s2,
                       int group) {
  constexpr int64_t lanes = kTermLanes<T>;
  const auto* pivot = static_cast<const TermScalar<T>*>(pivots);
  const int step = rows_per_sum_pass<T>(g, block, x, group);
  const int64_t rows_on = rows_ahead<T>(block, kAheadBytes, step);
  int64_t position = block.begin;
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset, int64_t length, bool) __attribute__((always_inline)) {
        const int64_t left = take_rows(g, position, length);
        for_each_pass(length, step, [&](int64_t row, int rows) __attribute__((always_inline)) {
          const T* first = at<T>(x, offset + row * x.stride[2]);
          RowsAhead<T> ahead(first + (row + rows_on < left ? rows_on * x.stride[2] : 0), block, x.stride[2]);
          for_each_column<kColumns<T>, lanes>(
              block, [&](int64_t c, auto vectors, auto count) __attribute__((always_inline)) {
                constexpr int kVectors = decltype(vectors)::value;
                Term<T> p[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) p[v] = load_numbers<Term<T>>(pivot + c + v * lanes);
                for_each_pass(rows, group, [&](int64_t begin, int some) __attribute__((always_inline)) {
                  Term<T> a[kVectors] = {}, b[kVectors] = {};
                  for (int64_t r = begin; r < begin + some; ++r) {
                    const T* px = first + r * x.stride[2] + c;
                    ahead.ask(kVectors * lanes);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) {
                      const Term<T> d = keep_lanes(load_term(px + v * lanes, count) - p[v], count);
                      a[v] += d;
                      b[v] += d * d;
                    }
                  }
#pragma GCC unroll 4
                  for (int v = 0; v < kVectors; ++v) {
                    add_to_sums(s1 + c + v * lanes, a[v]);
                    add_to_sums(s2 + c + v * lanes, b[v]);
                  }
                });
              });
        });
      },
      x);
}

template <typename T>
void backward_sums_in_passes(const Geometry& g, const View& x, const View& dy, Block block, const void* pivots,
                             double* sum_dy, double* sum_dy_xmp, int group) {
  constexpr int64_t lanes = kTermLanes<T>;
  const auto* pivot = static_cast<const TermScalar<T>*>(pivots);
  const int step = rows_per_sum_pass<T>(g, block, x, group);
  const int64_t rows_on = rows_ahead<T>(block, kAheadBytes, step);
  int64_t position = block.begin;
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_dy, int64_t length, bool) __attribute__((always_inline)) {
        const int64_t left = take_rows(g, position, length);
        for_each_pass(length, step, [&](int64_t row, int rows) __attribute__((always_inline)) {
          const T* first_x = at<T>(x, offset_x + row * x.stride[2]);
          const T* first_dy = at<T>(dy, offset_dy + row * dy.stride[2]);
          const int64_t on = row + rows_on < left ? rows_on : 0;
          RowsAhead<T> ahead_x(first_x + on * x.stride[2], block, x.stride[2]),
              ahead_dy(first_dy + on * dy.stride[2], block, dy.stride[2]);
          for_each_column<kColumns<T>, lanes>(
              block, [&](int64_t c, auto vectors, auto count) __attribute__((always_inline)) {
                constexpr int kVectors = decltype(vectors)::value;
                Term<T> p[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) p[v] = load_numbers<Term<T>>(pivot + c + v * lanes);
                for_each_pass(rows, group, [&](int64_t begin, int some) __attribute__((always_inline)) {
                  Term<T> a[kVectors] = {}, b[kVectors] = {};
                  for (int64_t r = begin; r < begin + some; ++r) {
                    const T* px = first_x + r * x.stride[2] + c;
                    const T* pdy = first_dy + r * dy.stride[2] + c;
                    ahead_x.ask(kVectors * lanes);
                    ahead_dy.ask(kVectors * lanes);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) {
                      const Term<T> d = load_term(pdy + v * lanes, count);
                      a[v] += d;
                      b[v] += d * keep_lanes(load_term(px + v * lanes, count) - p[v], count);
                    }
                  }
#pragma GCC unroll 4
                  for (int v = 0; v < kVectors; ++v) {
                    add_to_sums(sum_dy + c + v * lanes, a[v]);
                    add_to_sums(sum_dy_xmp + c + v * lanes, b[v]);
                  }
                });
              });
        });
      },
      x, dy);
}

template <typename T>
void moments_rows(const Geometry& g, const View& x, Block block, const void* pivots, double* s1, double* s2) {
  moments_in_passes<T>(g, x, block, pivots, s1, s2, rows_per_sum<T>(g));
}

template <typename T>
void backward_sums_rows(const Geometry& g, const View& x, const View& dy, Block block, const void* pivots,
                        double* sum_dy, double* sum_dy_xmp) {
  backward_sums_in_passes<T>(g, x, dy, block, pivots, sum_dy, sum_dy_xmp, rows_per_sum<T>(g));
}

// One row after the other is memory's order, if a block has all of each row, and what comes next the processor finds by
// itself, but for what it reads while streamed stores write. Zen 4, evaluation of 6272 x 512 float32: 0.71 -> 0.61 ms;
// but with vectors of 32 bytes training took a tenth longer.
template <bool kStream, bool kOneByOne>
BNEXT_INLINE bool asks_ahead(const View& to, const Block& block) {
  return !kLongVectors || kStream || !kOneByOne || !rows_adjoin(to, block);
}

template <bool kStream, bool kOneByOne, typename T>
void normalize_rows(const Geometry& g, const View& x, const View& y, Block block, CoefficientArrays arrays) {
  using All = std::conditional_t<kStream, Streamed, Whole>;
  constexpr int64_t lanes = kLanes<T>;
  const LoadCoefficients<T> coefficients(arrays);
  const bool asks = asks_ahead<kStream, kOneByOne>(y, block);
  const int step = kOneByOne ? 1 : rows_per_apply<T>(block);
  const int64_t rows_on = rows_ahead<T>(block, kAheadBytes, step);
  const WriteAhead<T> write_ahead(y, block, step);
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_y, int64_t length, bool) __attribute__((always_inline)) {
        for_each_pass(length, step, [&](int64_t row, int rows) __attribute__((always_inline)) {
          const T* first_x = at<T>(x, offset_x + row * x.stride[2]);
          T* first_y = at_mutable<T>(y, offset_y + row * y.stride[2]);
          const int64_t ahead = row + rows_on < length ? rows_on * x.stride[2] : 0;
          for_each_column<kOneByOne ? 1 : kColumns<T>, lanes, All>(
              block, [&](int64_t c, auto vectors, auto count) __attribute__((always_inline)) {
                constexpr int kVectors = decltype(vectors)::value;
                AffineVector<T> f[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) f[v] = coefficients.vector(c + v * lanes);
                for (int r = 0; r < (kOneByOne ? 1 : rows); ++r) {
                  const T* px = first_x + r * x.stride[2] + c;
                  T* py = first_y + r * y.stride[2] + c;
                  if (asks) prefetch(px + ahead, kVectors * lanes);
                  if (asks && !kStream) prefetch<true>(py + write_ahead(c), kVectors * lanes);
#pragma GCC unroll 4
                  for (int v = 0; v < kVectors; ++v) {
                    store_value(py + v * lanes, f[v](load_value(px + v * lanes, count)), count);
                  }
                }
              });
        });
      },
      x, y);
  if constexpr (kStream) finish_stream();
}

template <bool kStream, bool kOneByOne, typename T>
void backward_apply_rows(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                         CoefficientArrays arrays) {
  using All = std::conditional_t<kStream, Streamed, Whole>;
  constexpr int64_t lanes = kLanes<T>;
  const LoadCoefficients<T> coefficients(arrays);
  const bool asks = asks_ahead<kStream, kOneByOne>(dx, block);
  const int step = kOneByOne ? 1 : rows_per_apply<T>(block);
  const int64_t rows_on = rows_ahead<T>(block, kAheadBytes, step);
  const WriteAhead<T> write_ahead(dx, block, step);
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_dy, int64_t offset_dx, int64_t length, bool) __attribute__((always_inline)) {
        for_each_pass(length, step, [&](int64_t row, int rows) __attribute__((always_inline)) {
          const T* first_x = at<T>(x, offset_x + row * x.stride[2]);
          const T* first_dy = at<T>(dy, offset_dy + row * dy.stride[2]);
          const int64_t on = row + rows_on < length ? rows_on : 0;
          const int64_t ahead_x = on * x.stride[2], ahead_dy = on * dy.stride[2];
          T* first_dx = at_mutable<T>(dx, offset_dx + row * dx.stride[2]);
          for_each_column<kOneByOne ? 1 : kColumns<T>, lanes, All>(
              block, [&](int64_t c, auto vectors, auto count) __attribute__((always_inline)) {
                constexpr int kVectors = decltype(vectors)::value;
                AffineVector<T> f[kVectors];
                Value<T> a[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                  f[v] = coefficients.vector(c + v * lanes);
                  a[v] = coefficients.scale_dy(c + v * lanes);
                }
                for (int r = 0; r < (kOneByOne ? 1 : rows); ++r) {
                  const T* px = first_x + r * x.stride[2] + c;
                  const T* pdy = first_dy + r * dy.stride[2] + c;
                  T* pdx = first_dx + r * dx.stride[2] + c;
                  if (asks) prefetch(px + ahead_x, kVectors * lanes);
                  if (asks) prefetch(pdy + ahead_dy, kVectors * lanes);
                  if (asks && !kStream) prefetch<true>(pdx + write_ahead(c), kVectors * lanes);
#pragma GCC unroll 4
                  for (int v = 0; v < kVectors; ++v) {
                    store_value(pdx + v * lanes,
                                load_value(pdy + v * lanes, count) * a[v] + f[v](load_value(px + v * lanes, count)),
                                count);
                  }
                }
              });
        });
      },
      x, dy, dx);
  if constexpr (kStream) finish_stream();
}

// Calls f(stream, one_by_one): how a kernel that writes `to` should go.
template <typename T, typename F>
void choose_apply(const Block& block, const View& to, bool stream, F f) {
  const int64_t channels = block.channel_end - block.channel_begin;
  const bool wide = channels >= kWideRowChannels && channels <= kNearChannels;
  stream = stream && has_aligned_steps<T>(to, to.stride[0], to.stride[1], to.stride[2]);
  if (stream && wide) return f(std::true_type(), std::true_type());
  if (stream) return f(std::true_type(), std::false_type());
  if (wide) return f(std::false_type(), std::true_type());
  f(std::false_type(), std::false_type());
}

template <typename T>
void normalize_any_rows(const Geometry& g, const View& x, const View& y, Block block, CoefficientArrays c,
                        ElementwiseOptions options) {
  choose_apply<T>(block, y, options.stream, [&](auto stream, auto one_by_one) {
    normalize_rows<decltype(stream)::value, decltype(one_by_one)::value, T>(g, x, y, block, c);
  });
}

template <typename T>
void backward_apply_any_rows(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                             CoefficientArrays c, ElementwiseOptions options) {
  choose_apply<T>(block, dx, options.stream, [&](auto stream, auto one_by_one) {
    backward_apply_rows<decltype(stream)::value, decltype(one_by_one)::value, T>(g, x, dy, dx, block, c);
  });
}
