// Planes: the positions of a channel lie side by side. A block has a few channels, so that what it reads at each step
// of the outer dimensions is contiguous and long enough for the processor to fetch ahead. Part of kernels_impl.h; no
// include guard on purpose.

// How far ahead of a loop memory is asked for: the processor's own prefetcher begins anew at every run, and whenever
// sums and elementwise work take turns. Side by side, a backward pass of 32 x 256 x 28 x 28 float32: 1.41 -> 1.32 x an
// addition.
constexpr int64_t kAheadBytes = int64_t{4} << 10;
template <typename T>
constexpr int64_t kAhead = kAheadBytes / static_cast<int64_t>(sizeof(T));

// Asks for what a loop over the runs of a block will come to, in one tensor: beyond the end of a run, what comes next
// is the beginning of another one. Short runs of neighbouring channels are one run here.
template <typename T, bool kForWriting = false>
class Ahead {
 public:
  // `next`: from a run to the one after it; 0 where there is none, and nothing new is asked for.
  BNEXT_INLINE Ahead(const Geometry& g, const View& view, const Block& block, int64_t offset, int64_t length,
                     int64_t next) {
    const int64_t channels = view.stride_c == length ? block.channel_end - block.channel_begin : 1;
    const int64_t run = channels * length;
    stride_c_ = channels > 1 ? 0 : view.stride_c;
    end_ = at<T>(view, block.channel_begin * view.stride_c + offset) + run;
    distance_ = run < kAhead<T> ? run : kAhead<T>;
    jump_ = length < g.size[2] ? 0 : next - run;
  }
  // p: where the loop is, in channel `index` of the block.
  BNEXT_INLINE void ask(const T* p, int64_t index, int64_t length) const {
    const T* ahead = p + distance_;
    if (ahead >= end_ + index * stride_c_) ahead += jump_;
    prefetch<kForWriting>(ahead, length);
  }

 private:
  const T* end_;
  int64_t stride_c_, distance_, jump_;
};

// Streamed stores leave memory's reads idle, so elementwise work meanwhile asks for the block that comes next: as it
// goes backwards through the positions of its own block, forwards through the same positions of the next one. 32 x 64 x
// 56 x 56 float32, backward, 2 threads: 2.00 -> 1.81 ms. Stores into the caches read their lines first, and leave
// nothing to gain.
class NextBlock {
 public:
  BNEXT_INLINE NextBlock(const Geometry& g, const Block& block, const ElementwiseOptions& options)
      : g_(g),
        first_(options.next_begin - block.channel_begin),
        end_(options.next_end),
        position_(g.num_positions() - block.end) {}

  class Run {
   public:
    BNEXT_INLINE Run(const Geometry& g, int64_t position, int64_t first, int64_t end) : first_(first), end_(end) {
      const int64_t row = position / g.size[2];
      i2_ = position % g.size[2], i1_ = row % g.size[1], i0_ = row / g.size[1];
    }
    // Where to ask while p is read, which is where the run begins in channel c: p itself when there is nothing to ask
    // for.
    template <typename T>
    BNEXT_INLINE const T* instead_of(const T* p, const View& v, int64_t c) const {
      if (first_ + c >= end_) return p;
      return at<T>(v, (first_ + c) * v.stride_c + i0_ * v.stride[0] + i1_ * v.stride[1] + i2_ * v.stride[2]);
    }

   private:
    int64_t first_, end_, i0_, i1_, i2_;
  };
  // For the next `length` positions, which lie in one plane there as they do here.
  BNEXT_INLINE Run take(int64_t length) {
    const Run run(g_, position_, first_, end_);
    position_ += length;
    return run;
  }

 private:
  const Geometry& g_;
  int64_t first_, end_, position_;
};

// Elementwise work comes back to what the sums have left in the nearest cache. Of a channel that is too large for it,
// the runs are long, and this asks ahead in one: 6 x 3 x 400 x 300 float32, forward, 0.40 -> 0.37 ms.
template <typename T>
BNEXT_INLINE void ask_in_run(const T* p, int64_t i, int64_t length) {
  if (i + kAhead<T> < length) prefetch(p + i + kAhead<T>, kLanes<T>);
}

// Calls ask(offset, count) and then step(offset, count, a, b), which adds to a and b, over [0, length).
template <typename T, typename Ask, typename Step>
BNEXT_INLINE void sum_run(int64_t length, Ask ask, Step step, Total<T>& total_a, Total<T>& total_b) {
  constexpr int64_t lanes = kTermLanes<T>;
  int64_t i = 0;
  for (; i + kGroup * lanes <= length; i += kGroup * lanes) {
    Term<T> a{}, b{};
    ask(i, kGroup * lanes);
#pragma GCC unroll 8
    for (int u = 0; u < kGroup; ++u) step(i + u * lanes, Whole(), a, b);
    total_a.add(a);
    total_b.add(b);
  }
  if (i == length) return;
  Term<T> a{}, b{};
  ask(i, length - i);
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
  template <typename Ask, typename Step>
  BNEXT_INLINE void add_run(int64_t c, int64_t length, Ask ask, Step step) {
    Total<T> a = a_[c - first_], b = b_[c - first_];
    sum_run<T>(length, ask, step, a, b);
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
void moments_planes(const Geometry& g, const View& x, Block block, const void* pivots, double* s1, double* s2) {
  const auto* pivot = static_cast<const TermScalar<T>*>(pivots);
  BlockTotals<T> totals(block);
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset, int64_t length, bool more) __attribute__((always_inline)) {
        const Ahead<T> ahead(g, x, block, offset, length, more ? x.stride[1] : 0);
        for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
          const T* px = at<T>(x, c * x.stride_c + offset);
          const auto p = splat<Term<T>>(pivot[c]);
          totals.add_run(
              c, length,
              [&](int64_t i, int64_t count)
                  __attribute__((always_inline)) { ahead.ask(px + i, c - block.channel_begin, count); },
              [&](int64_t i, auto count, Term<T>& a, Term<T>& b) __attribute__((always_inline)) {
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
void backward_sums_planes(const Geometry& g, const View& x, const View& dy, Block block, const void* pivots,
                          double* sum_dy, double* sum_dy_xmp) {
  const auto* pivot = static_cast<const TermScalar<T>*>(pivots);
  BlockTotals<T> totals(block);
  for_each_run(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_dy, int64_t length, bool more) __attribute__((always_inline)) {
        const Ahead<T> ahead_x(g, x, block, offset_x, length, more ? x.stride[1] : 0),
            ahead_dy(g, dy, block, offset_dy, length, more ? dy.stride[1] : 0);
        for (int64_t c = block.channel_begin; c < block.channel_end; ++c) {
          const T* px = at<T>(x, c * x.stride_c + offset_x);
          const T* pdy = at<T>(dy, c * dy.stride_c + offset_dy);
          const auto p = splat<Term<T>>(pivot[c]);
          totals.add_run(
              c, length,
              [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                ahead_x.ask(px + i, c - block.channel_begin, count);
                ahead_dy.ask(pdy + i, c - block.channel_begin, count);
              },
              [&](int64_t i, auto count, Term<T>& a, Term<T>& b) __attribute__((always_inline)) {
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

// How many channels elementwise work takes at a time: all that a block has, where their planes lie side by side, as one
// stretch of memory, or one. Planes shorter than a line would bring three channels into a vector. (A block has parts of
// planes only where it is shorter than they are.)
template <typename T, typename... Views>
BNEXT_INLINE int64_t channels_together(const Geometry& g, const Block& block, const Views&... views) {
  const bool dense = ((views.stride_c == g.size[2]) && ...) && g.size[2] <= block.end - block.begin;
  const bool fills_line = g.size[2] * static_cast<int64_t>(sizeof(T)) >= kLineBytes;
  return dense && fills_line ? block.channel_end - block.channel_begin : 1;
}

// Sets `channels` neighbouring planes of `length` elements, from channel c on, to map(i, count, numbers_of(channel))
// for a vector that begins at element i, before which it calls ask(i). Vectors go across the ends of planes: then they
// have lanes of two channels. With kStream, stores go around the caches in whole lines: one that is written in pieces,
// by stores of both kinds, costs a read of memory. Zen 4, evaluation of 32 x 1024 x 14 x 14 float32, where planes are
// 12 lines and a quarter: 1.76 -> 1.25 ms.
template <bool kStream, typename T, typename NumbersOf, typename Ask, typename Map>
BNEXT_INLINE void map_planes(T* to, int64_t length, int64_t c, int64_t channels, NumbersOf numbers_of, Ask ask,
                             Map map) {
  constexpr int64_t lanes = kLanes<T>, line = kLineBytes / static_cast<int64_t>(sizeof(T));
  const int64_t all = channels * length;
  auto numbers = numbers_of(c);
  int64_t i = 0, end = length;  // of this channel
  auto whole_vectors = [&](int64_t stop, auto count) __attribute__((always_inline)) {
    while (i + lanes <= stop) {
      const int64_t near = end < stop ? end : stop;
      for (; i + lanes <= near; i += lanes) {
        ask(i);
        store_value(to + i, map(i, count, numbers), count);
      }
      if (i + lanes > stop) return;
      const auto before = numbers;
      numbers = numbers_of(++c);
      if (i < end) {
        ask(i);
        store_value(to + i, join_lanes(map(i, count, before), map(i, count, numbers), end - i), count);
        i += lanes;
      }
      end += length;
    }
  };
  auto up_to = [&](int64_t stop) __attribute__((always_inline)) {
    whole_vectors(stop, Whole());
    if (i < stop) {
      ask(i);
      store_value(to + i, map(i, stop - i, numbers), stop - i);
    }
    i = stop;
  };
  if constexpr (kStream) {
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLineBytes / sizeof(T));
    const int64_t head = (line - past) % line;
    if (head < all) {
      up_to(head);
      whole_vectors(all - (all - head) % line, Streamed());
    }
  }
  up_to(all);
}

template <bool kStream, typename T>
void normalize_planes(const Geometry& g, const View& x, const View& y, Block block, CoefficientArrays arrays,
                      const ElementwiseOptions& options, int64_t together) {
  const LoadCoefficients<T> coefficients(arrays);
  NextBlock next(g, block, options);
  // In memory's order, the processor finds what comes next by itself, but for what it reads while streamed stores
  // write. Zen 4, evaluation of 32 x 512 x 14 x 14 float32: 0.94 -> 0.78 ms.
  const bool asks = !options.in_order;
  for_each_run_backwards(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_y, int64_t length, bool more) __attribute__((always_inline)) {
        const NextBlock::Run next_run = next.take(length);
        const Ahead<T, true> ahead(g, y, block, offset_y, length, more ? -y.stride[1] : 0);
        for (int64_t c = block.channel_begin; c < block.channel_end; c += together) {
          const T* px = at<T>(x, c * x.stride_c + offset_x);
          T* py = at_mutable<T>(y, c * y.stride_c + offset_y);
          const T* next_x = asks ? next_run.instead_of(px, x, c) : px + kAhead<T>;
          map_planes<kStream>(
              py, length, c, together,
              [&](int64_t channel) __attribute__((always_inline)) { return coefficients.one(channel); },
              [&](int64_t i) __attribute__((always_inline)) {
                if (!kStream && asks) ahead.ask(py + i, c - block.channel_begin, kLanes<T>);
                if (kStream) prefetch(next_x + i, kLanes<T>);
                if (asks) ask_in_run(px, i, together * length);
              },
              [&](int64_t i, auto count, const AffineVector<T>& f)
                  __attribute__((always_inline)) { return f(load_value(px + i, count)); });
        }
      },
      x, y);
  if constexpr (kStream) finish_stream();
}

template <typename T>
struct BackwardNumbers {
  AffineVector<T> f;
  Value<T> scale_dy;
};

template <bool kStream, typename T>
void backward_apply_planes(const Geometry& g, const View& x, const View& dy, const View& dx, Block block,
                           CoefficientArrays arrays, const ElementwiseOptions& options, int64_t together) {
  const LoadCoefficients<T> coefficients(arrays);
  NextBlock next(g, block, options);
  for_each_run_backwards(
      g, block.begin, block.end,
      [&](int64_t offset_x, int64_t offset_dy, int64_t offset_dx, int64_t length, bool more)
          __attribute__((always_inline)) {
            const NextBlock::Run next_run = next.take(length);
            const Ahead<T, true> ahead(g, dx, block, offset_dx, length, more ? -dx.stride[1] : 0);
            for (int64_t c = block.channel_begin; c < block.channel_end; c += together) {
              const T* px = at<T>(x, c * x.stride_c + offset_x);
              const T* pdy = at<T>(dy, c * dy.stride_c + offset_dy);
              T* pdx = at_mutable<T>(dx, c * dx.stride_c + offset_dx);
              const T* next_x = next_run.instead_of(px, x, c);
              const T* next_dy = next_run.instead_of(pdy, dy, c);
              map_planes<kStream>(
                  pdx, length, c, together,
                  [&](int64_t channel) __attribute__((always_inline)) {
                    return BackwardNumbers<T>{coefficients.one(channel), coefficients.one_scale_dy(channel)};
                  },
                  [&](int64_t i) __attribute__((always_inline)) {
                    if (!kStream) ahead.ask(pdx + i, c - block.channel_begin, kLanes<T>);
                    if (kStream) prefetch(next_x + i, kLanes<T>);
                    if (kStream) prefetch(next_dy + i, kLanes<T>);
                    ask_in_run(px, i, together * length);
                    ask_in_run(pdy, i, together * length);
                  },
                  [&](int64_t i, auto count, const BackwardNumbers<T>& numbers) __attribute__((always_inline)) {
                    return load_value(pdy + i, count) * numbers.scale_dy + numbers.f(load_value(px + i, count));
                  });
            }
          },
      x, dy, dx);
  if constexpr (kStream) finish_stream();
}
