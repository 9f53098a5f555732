// Planes: the positions of a channel lie side by side. A block has a few channels, so that what it reads at each step of
// the outer dimensions is contiguous and long enough for the processor to fetch ahead.
// Part of kernels_impl.h; no include guard on purpose.

// Runs up to this many bytes are asked for one step of the outer dimensions ahead: the processor's own prefetcher starts
// anew at each of them. Backward, 32 x 256 x 14 x 14 float32: 8.2 -> 4.8 ns for 16 elements, together with blocks of 8
// channels. In longer runs the instructions cost more than they bring (17 x 40 x 33 x 35: sums 1.7 -> 2.2), except for
// the lines that are written, which have to be fetched as well (32 x 64 x 56 x 56: apply 4.1 -> 3.7).
constexpr int64_t kReadAheadBytes = int64_t{4} << 10, kWriteAheadBytes = int64_t{16} << 10;
constexpr int64_t kLineBytes = 64;

template <bool kForWriting = false, typename T>
BNEXT_INLINE void prefetch_run(const T* p, int64_t length) {
  const char* byte = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < length * static_cast<int64_t>(sizeof(T)); i += kLineBytes) {
    __builtin_prefetch(byte + i, kForWriting);
  }
}

// Distance to the run that comes after this one, or 0 where asking for it does not pay.
template <typename T>
BNEXT_INLINE int64_t next_run(const Geometry& g, const View& view, int64_t length, int64_t limit) {
  return g.size[1] > 1 && length * static_cast<int64_t>(sizeof(T)) <= limit ? view.stride[1] : 0;
}

// Calls step(offset, count, a, b), which adds to a and b, over [0, length).
template <typename T, typename Step>
BNEXT_INLINE void sum_run(int64_t length, Step step, Total<T>& total_a, Total<T>& total_b) {
  constexpr int64_t lanes = kTermLanes<T>;
  int64_t i = 0;
  for (; i + kGroup * lanes <= length; i += kGroup * lanes) {
    Term<T> a{}, b{};
#pragma GCC unroll 8
    for (int u = 0; u < kGroup; ++u) step(i + u * lanes, Whole(), a, b);
    total_a.add(a);
    total_b.add(b);
  }
  if (i == length) return;
  Term<T> a{}, b{};
  for (; i + lanes <= length; i += lanes) step(i, Whole(), a, b);
  if (i < length) step(i, length - i, a, b);
  total_a.add(a);
  total_b.add(b);
}

// Two running sums for each channel of a block, in memory between one run and the next.
template <typename T>
class BlockTotals {
 public:
  explicit BlockTotals(const Block& block) : first_(block.channel_begin) {
    for (int64_t i = 0; i < block.channel_end - first_; ++i) a_[i] = b_[i] = {};
  }
  template <typename Step>
  BNEXT_INLINE void add_run(int64_t c, int64_t length, Step step) {
    Total<T> a = a_[c - first_], b = b_[c - first_];
    sum_run<T>(length, step, a, b);
    a_[c - first_] = a;
    b_[c - first_] = b;
  }
  void add_to(const Block& block, double* a, double* b) const {
    for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
      a[c] += a_[c - first_].sum();
      b[c] += b_[c - first_].sum();
    }
  }

 private:
  int64_t first_;
  Total<T> a_[kMaxBlockChannels], b_[kMaxBlockChannels];
};

template <typename T>
void moments_planes(const Geometry& g, const View& x, Block block, const double* pivot, double* s1, double* s2) {
  BlockTotals<T> totals(block);
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset, int64_t length) __attribute__((always_inline)) {
        const int64_t ahead = next_run<T>(g, x, length, kReadAheadBytes);
        for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
          const T* px = at<T>(x, c * x.stride_c + offset);
          if (ahead != 0) prefetch_run(px + ahead, length);
          const auto p = splat<Term<T>>(static_cast<TermScalar<T>>(pivot[c]));
          totals.add_run(c, length, [&](int64_t i, auto count, Term<T>& a, Term<T>& b) __attribute__((always_inline)) {
            const Term<T> d = keep_lanes(load_term(px + i, count) - p, count);
            a += d;
            b += d * d;
          });
        }
      },
      x);
  totals.add_to(block, s1, s2);
}

template <typename T>
void backward_sums_planes(const Geometry& g, const View& x, const View& dy, Block block, const double* pivot,
                          double* sum_dy, double* sum_dy_xmp) {
  BlockTotals<T> totals(block);
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_dy, int64_t length) __attribute__((always_inline)) {
        const int64_t ahead_x = next_run<T>(g, x, length, kReadAheadBytes),
                      ahead_dy = next_run<T>(g, dy, length, kReadAheadBytes);
        for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
          const T* px = at<T>(x, c * x.stride_c + offset_x);
          const T* pdy = at<T>(dy, c * dy.stride_c + offset_dy);
          if (ahead_x != 0) prefetch_run(px + ahead_x, length);
          if (ahead_dy != 0) prefetch_run(pdy + ahead_dy, length);
          const auto p = splat<Term<T>>(static_cast<TermScalar<T>>(pivot[c]));
          totals.add_run(c, length, [&](int64_t i, auto count, Term<T>& a, Term<T>& b) __attribute__((always_inline)) {
            const Term<T> d = load_term(pdy + i, count);
            a += d;
            // Lanes that are not there have to be 0 in both: 0 * inf is a NaN.
            b += d * keep_lanes(load_term(px + i, count) - p, count);
          });
        }
      },
      x, dy);
  totals.add_to(block, sum_dy, sum_dy_xmp);
}

template <typename T>
BNEXT_INLINE AffineVector<T> broadcast(const Affine<T>& f) {
  return {splat<Value<T>>(f.mean), splat<Value<T>>(f.scale), splat<Value<T>>(f.scale_low), splat<Value<T>>(f.shift)};
}

// Calls body(i, Whole()) for vectors and body(i, count) for what is left. Streamed stores to `to` begin where it is aligned.
template <bool kStream, typename T, typename Body>
BNEXT_INLINE void for_each_value(const T* to, int64_t length, Body body) {
  int64_t i = 0;
  if constexpr (kStream) {
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kStoreBytes<T>);
    const int64_t head = (kStoreBytes<T> - past) % kStoreBytes<T> / static_cast<int64_t>(sizeof(T));
    i = head < length ? head : length;
    if (i > 0) body(0, i);
  }
  for (; i + kLanes<T> <= length; i += kLanes<T>) body(i, Whole());
  if (i < length) body(i, length - i);
}

// Stores one vector of a run: streamed when it is whole and the caller wants it.
template <bool kStream, typename T, typename Count>
BNEXT_INLINE void put_value(T* p, Value<T> v, Count count) {
  if constexpr (kStream && std::is_same_v<Count, Whole>) {
    stream_value(p, v);
  } else {
    store_value(p, v, count);
  }
}

template <bool kStream, typename T>
void normalize_planes(const Geometry& g, const View& x, const View& y, Block block, const double* mean,
                      const double* scale, const double* shift) {
  Affine<T> of_channel[kMaxBlockChannels];
  for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
    of_channel[c - block.channel_begin] = {mean[c], scale[c], shift[c]};
  }
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_y, int64_t length) __attribute__((always_inline)) {
        const int64_t ahead = kStream ? 0 : next_run<T>(g, y, length, kWriteAheadBytes);
        for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
          const T* px = at<T>(x, c * x.stride_c + offset_x);
          T* py = at_mutable<T>(y, c * y.stride_c + offset_y);
          if (ahead != 0) prefetch_run<true>(py + ahead, length);
          const AffineVector<T> f = broadcast(of_channel[c - block.channel_begin]);
          for_each_value<kStream>(py, length, [&](int64_t i, auto count) __attribute__((always_inline)) {
            put_value<kStream>(py + i, f(load_value(px + i, count)), count);
          });
        }
      },
      x, y);
  if constexpr (kStream) finish_stream();
}

template <bool kStream, typename T>
void backward_apply_planes(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                           const double* mean, const double* scale_dy, const double* scale_x, const double* shift) {
  Affine<T> of_channel[kMaxBlockChannels];
  for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
    of_channel[c - block.channel_begin] = {mean[c], scale_x[c], shift[c]};
  }
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_dy, int64_t offset_dx, int64_t length) __attribute__((always_inline)) {
        const int64_t ahead = kStream ? 0 : next_run<T>(g, dx, length, kWriteAheadBytes);
        for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
          const T* px = at<T>(x, c * x.stride_c + offset_x);
          const T* pdy = at<T>(dy, c * dy.stride_c + offset_dy);
          T* pdx = at_mutable<T>(dx, c * dx.stride_c + offset_dx);
          if (ahead != 0) prefetch_run<true>(pdx + ahead, length);
          const AffineVector<T> f = broadcast(of_channel[c - block.channel_begin]);
          const auto a = splat<Value<T>>(to_scalar<Scalar<T>>(scale_dy[c]));
          for_each_value<kStream>(pdx, length, [&](int64_t i, auto count) __attribute__((always_inline)) {
            put_value<kStream>(pdx + i, load_value(pdy + i, count) * a + f(load_value(px + i, count)), count);
          });
        }
      },
      x, dy, dx);
  if constexpr (kStream) finish_stream();
}
