// How the work of one pass is cut into blocks and spread over torch's threads. How a channel's positions are cut
// depends on the shape alone, never on the number of threads, and partial sums are added in their order: the same bits
// every time. How many channels a block has changes nothing about the sums of each.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "cache.h"
#include "kernels.h"
#include "threads.h"

namespace bnext::cpu {

// Elements below which waking other threads costs more than it gains.
constexpr int64_t kSerialElements = 32768;
// Elements in a block: 32 KB of float32, small enough to balance and to be in cache for a second visit.
constexpr int64_t kBlockElements = 8192;
// Rows in a block of channels_last. At least kMinRows, because a block leaves 2 float64 sums for each channel. Else as
// many as kRowsBytes hold, so that a thread's last block is still in its own cache when it comes back for it, but no
// more than leave kEnoughChunks blocks to share.
constexpr int64_t kMinRows = 64, kRowsBytes = int64_t{256} << 10, kEnoughChunks = 16;
// What is done once for each channel takes 15 to 50 ns, and for this many about as long as waking other threads.
constexpr int64_t kManyChannels = 256;
// The widest vectors have so many lanes. Rows should have a multiple of kLaneChannels (floats in 64 bytes), and want a
// few vectors in a row; with more channels than kMostFolded, folded rows would be longer than that is worth.
constexpr int64_t kMaxLanes = 32, kLaneChannels = 16, kWideRow = 64, kMostFolded = 1024;
// Channels that a block of rows has: all of them, up to so many, where that leaves two blocks for each thread. Whole
// rows are memory's order: Zen 4, AVX-512, sums of 1568 x 2048 float32 in two parts 0.82 ms, whole 0.58.
constexpr int64_t kWidestRows = 4096, kNarrowestRows = 1024;
static_assert(kNarrowestRows % kMaxLanes == 0, "blocks of rows are made of whole vectors, but for the last");

// Planes: contiguous bytes that a block of channels should have at each step of the outer dimensions, so that memory is
// read in runs that are worth it; and what a block may take of the processor's own cache, where its second visit should
// find it.
constexpr int64_t kRunBytes = int64_t{8} << 10, kMinRunBytes = int64_t{2} << 10;
constexpr int64_t kBlockBytes = int64_t{512} << 10;

// Rows of so few channels fill no vector, and if they begin so close to each other, a line of the cache has several.
constexpr int64_t kFewChannels = 3, kCloseRowsBytes = 32;

// Whether rows follow one another without a gap, in all views that are given.
inline bool has_dense_rows(const Geometry& g, std::initializer_list<const View*> views) {
  bool dense = g.walk == Walk::kRows && g.unit_stride && g.size[0] == 1 && g.size[1] == 1;
  for (const View* view : views) dense = dense && (view->data == nullptr || view->stride[2] == g.num_channels);
  return dense;
}

// Whether planes lie side by side, and are neither so short that they are better taken as rows, several at a time, nor
// long enough for a block each.
constexpr int64_t kMinPlane = 16;
inline bool has_medium_planes(const Geometry& g, std::initializer_list<const View*> views) {
  const int64_t length = g.size[2];
  bool medium = g.walk == Walk::kPlanes && g.unit_stride && length >= kMinPlane && length < kBlockElements;
  for (const View* view : views) medium = medium && (view->data == nullptr || view->stride_c == length);
  return medium;
}

// The walk that is fastest here. Two or three channels with gaps between the rows, as RGB without A: each channel by
// itself, one element at a time. AVX2, float32, backward of 3 of 4 channels: 6.8 -> 4.4 ms.
inline Geometry choose_walk(Geometry g, std::initializer_list<const View*> views) {
  bool alone = g.walk == Walk::kRows && g.num_channels <= kFewChannels && !has_dense_rows(g, views);
  for (const View* view : views) alone = alone && view->stride[2] * dtype_bytes(g.dtype) <= kCloseRowsBytes;
  if (alone) {
    g.walk = Walk::kPlanes;
    g.unit_stride = false;
  }
  return g;
}

class Partition {
 public:
  // Sums want all positions of a few channels, which are in cache for a second visit then. Without sums, planes are
  // taken in memory's order, one of each of a block's channels. 32 x 512 x 14 x 14 float32, evaluation, Zen 4: 1.11 ->
  // 0.83 ms.
  Partition(const Geometry& geometry, std::initializer_list<const View*> views, bool has_sums) : geometry_(geometry) {
    const int64_t channels = geometry.num_channels, positions = geometry.num_positions();
    int64_t num_tensors = 0;
    for (const View* view : views) num_tensors += view->data != nullptr;
    const int64_t tensor_bytes = channels * positions * dtype_bytes(geometry.dtype);
    stream_ = num_tensors * tensor_bytes > last_cache_bytes();
    serial_ = channels * positions < kSerialElements || at::in_parallel_region() || at::get_num_threads() == 1 ||
              pool_is_lost();
    if (has_dense_rows(geometry, views)) fold_ = choose_fold(channels);
    planes_in_order_ = !has_sums && has_medium_planes(geometry, views);
    chunk_ = planes_in_order_ ? geometry.size[2] : ceil_div(choose_chunk(geometry), fold_) * fold_;
    num_chunks_ = ceil_div(positions, chunk_);
    const int64_t threads = serial_ ? 1 : at::get_num_threads();
    if (geometry.walk == Walk::kRows) {
      channels_per_block_ = fold_ > 1 ? channels : choose_row_channels(threads);
    } else if (planes_in_order_) {
      channels_per_block_ = std::min(channels, kBlockElements / geometry.size[2]);
    } else {
      // A few channels at a time keeps them in cache between their two visits; with few channels the cores would idle.
      channel_by_channel_ = channels >= 4 * threads || channels % threads == 0;
      channels_per_block_ = choose_block_channels(threads, num_tensors);
    }
  }

  int64_t num_channels() const { return geometry_.num_channels; }
  // Whether stores go around the caches.
  bool stream() const { return stream_; }
  // Whether a block has one plane of each of its channels, and the block behind it comes next.
  bool planes_in_order() const { return planes_in_order_; }
  int64_t num_chunks() const { return num_chunks_; }
  bool channel_by_channel() const { return channel_by_channel_; }

  int64_t num_channel_blocks() const { return ceil_div(num_channels(), channels_per_block_); }

  // Channels that kernels see: those of `fold` rows, where rows are folded.
  int64_t wide_channels() const { return num_channels() * fold_; }

  // Length of arrays with a number for each of them, whole vectors long.
  int64_t array_width() const { return ceil_div(wide_channels(), kMaxLanes) * kMaxLanes; }

  // Calls f(begin, end) on ranges that together make [0, count).
  template <typename F>
  void parallel(int64_t count, F f) const {
    if (serial_) {
      f(int64_t{0}, count);
    } else {
      note_pool_use();
      at::parallel_for(0, count, 1, f);
    }
  }

  // Calls f(channel) for every channel: what is done once for each, which is worth other threads where there are many.
  template <typename F>
  void for_each_channel(F f) const {
    auto some = [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c);
    };
    if (num_channels() >= kManyChannels) return parallel(num_channels(), some);
    some(0, num_channels());
  }

  // Calls f(block, chunk) for every block, last first when asked: in the order in which they lie in memory. The parts
  // of a chunk of rows are neighbours, so that two threads share at most one: what the processor fetches ahead of one
  // would be what the other is writing. 1568 x 2048 float32, forward: 1.28 -> 0.73 ms.
  template <typename F>
  void for_each_block(bool reverse, F f) const {
    const int64_t num_blocks = num_channel_blocks();
    const bool in_order = geometry_.walk == Walk::kRows || planes_in_order_;
    parallel(num_blocks * num_chunks_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t task = reverse ? begin + end - 1 - i : i;
        const int64_t channel_block = in_order ? task % num_blocks : task / num_chunks_;
        const int64_t chunk = in_order ? task / num_blocks : task % num_chunks_;
        f(block(channel_block, chunk), chunk);
      }
    });
  }

  Block block(int64_t channel_block, int64_t chunk) const {
    const int64_t channel = channel_block * channels_per_block_;
    return {channel, std::min(channel + channels_per_block_, num_channels()), chunk * chunk_,
            std::min((chunk + 1) * chunk_, geometry_.num_positions())};
  }

  // Calls kernel(geometry, block, fold) for the folded part of a block (fold > 1, and the geometry and block are those
  // of the wide rows) and for what is left of it (fold == 1).
  template <typename Kernel>
  void for_each_part(const Block& block, Kernel kernel) const {
    int64_t done = block.begin;
    if (fold_ > 1) {
      const Block wide = {0, wide_channels(), block.begin / fold_, block.end / fold_};
      Geometry folded = geometry_;
      folded.num_channels = wide_channels();
      folded.size[2] = geometry_.size[2] / fold_;
      if (wide.end > wide.begin) kernel(folded, wide, fold_);
      done = wide.end * fold_;
    }
    if (done < block.end) kernel(geometry_, Block{block.channel_begin, block.channel_end, done, block.end}, 1);
  }

 private:
  // Positions in a block, before rows are folded.
  static int64_t choose_chunk(const Geometry& g) {
    if (g.walk == Walk::kRows) {
      const int64_t rows =
          std::min(kRowsBytes / (g.num_channels * dtype_bytes(g.dtype)), g.num_positions() / kEnoughChunks);
      return std::max({kMinRows, kBlockElements / g.num_channels, rows});
    }
    const int64_t run = g.size[2];
    return run < kBlockElements ? kBlockElements / run * run : kBlockElements;  // whole runs
  }

  // Of dense rows that do not fill vectors, so many make one row of channels * fold.
  static int64_t choose_fold(int64_t channels) {
    if (channels % kLaneChannels == 0) return 1;
    const int64_t step = kLaneChannels / std::gcd(kLaneChannels, channels);
    const int64_t fold = step * ceil_div(kWideRow, step * channels);
    return fold * channels <= kMostFolded ? fold : 1;
  }

  // Sums of a channel do not depend on the channels beside it, so this and the next may depend on the number of
  // threads.
  int64_t choose_row_channels(int64_t threads) const {
    const int64_t enough = threads > 1 ? 2 * threads : 1;
    int64_t count = kWidestRows;
    while (count > kNarrowestRows && ceil_div(num_channels(), count) * num_chunks_ < enough) count /= 2;
    return std::min(num_channels(), count);
  }

  int64_t choose_block_channels(int64_t threads, int64_t num_tensors) const {
    const int64_t run_bytes = geometry_.size[2] * dtype_bytes(geometry_.dtype);
    const int64_t channel_bytes = num_tensors * geometry_.num_positions() * dtype_bytes(geometry_.dtype);
    auto too_large = [&](int64_t count) {
      return count * run_bytes > kRunBytes || ceil_div(num_channels(), count) < 4 * threads ||
             (count * run_bytes > kMinRunBytes && count * channel_bytes > kBlockBytes);
    };
    int64_t count = kMaxBlockChannels;
    while (count > 1 && too_large(count)) count /= 2;
    return count;
  }

  Geometry geometry_;
  bool serial_ = true;
  bool channel_by_channel_ = false;
  bool stream_ = false;
  bool planes_in_order_ = false;
  int64_t channels_per_block_ = 1;
  int64_t chunk_ = 1;
  int64_t num_chunks_ = 0;
  int64_t fold_ = 1;
};

// A view as the geometry that Partition::for_each_part hands on sees it.
inline View fold_view(View view, int64_t fold) {
  view.stride[2] *= fold;
  return view;
}

// Numbers, not set yet, which begin where vectors are loaded in one piece. A thread keeps the memory for its next
// array: fresh from the system, the pages of 25 partial sums of 2048 channels cost as much as a pass over the tensor.
class AlignedArray {
 public:
  explicit AlignedArray(int64_t count) {
    if (!spare().empty()) {
      storage_ = std::move(spare().back());
      spare().pop_back();
    }
    const size_t wanted = count + kAlignment / sizeof(double);
    if (storage_.size() < wanted) storage_.resize(wanted);
  }
  ~AlignedArray() {
    if (storage_.capacity() <= kMostKept) spare().push_back(std::move(storage_));
  }
  AlignedArray(const AlignedArray&) = delete;
  AlignedArray& operator=(const AlignedArray&) = delete;

  double* data() {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return reinterpret_cast<double*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr uintptr_t kAlignment = 64;
  static constexpr size_t kMostKept = size_t{4} << 20 >> 3;  // numbers in 4 MB

  // The last freed comes first: arrays of equal calls find their own memory again.
  static std::vector<std::vector<double>>& spare() {
    thread_local std::vector<std::vector<double>> kept;
    return kept;
  }

  std::vector<double> storage_;
};

// kNumSums float64 sums per channel: totals, and partial sums as kernels leave them, of each chunk of positions or, for
// reduce_channels, of one chunk at a time.
template <int kNumSums>
class ChannelSums {
 public:
  ChannelSums(const Partition& partition, int64_t split, int64_t num_partials)
      : partition_(partition),
        split_(split),
        width_(partition.array_width()),
        totals_(kNumSums * partition.num_channels()),
        partials_(kNumSums * width_ * num_partials) {}

  double total(int k, int64_t c) const { return totals_[k * partition_.num_channels() + c]; }

  // Sets the partial sums of one block. kernel(geometry, block, fold, sums, width) adds to sums, of which the kth begin
  // at sums + k * width.
  template <typename Kernel>
  void reduce_block(const Block& block, int64_t chunk, Kernel kernel) {
    const bool last = block.channel_end == partition_.num_channels();  // has all up to the end of the array
    for (int k = 0; k < kNumSums; ++k) {
      std::fill(partial(chunk, k) + block.channel_begin, partial(chunk, k) + (last ? width_ : block.channel_end), 0.0);
    }
    partition_.for_each_part(block, [&](const Geometry& g, const Block& part, int64_t fold) {
      kernel(g, part, fold, partial(chunk, 0), width_);
    });
  }

  // All chunks of one block of channels, on this thread. Rows are not reduced like this: each channel has its own
  // place.
  template <typename Kernel>
  void reduce_channels(int64_t channel_block, Kernel kernel) {
    for (int64_t chunk = 0; chunk < partition_.num_chunks(); ++chunk) {
      const Block block = partition_.block(channel_block, chunk);
      reduce_block(block, 0, kernel);
      for (int k = 0; k < kNumSums; ++k) {
        double *total = totals_.data() + k * partition_.num_channels(), *sum = partial(0, k);
        for (int64_t c = block.channel_begin; c < block.channel_end; ++c)
          total[c] = (chunk == 0 ? 0 : total[c]) + sum[c];
      }
    }
  }

  // Every block on any thread, then the blocks' sums in order.
  template <typename Kernel>
  void reduce_all(Kernel kernel) {
    partition_.for_each_block(false, [&](const Block& block, int64_t chunk) { reduce_block(block, chunk, kernel); });
    merge();
  }

  void merge() {
    auto add_chunks = [&](int64_t begin, int64_t end) {
      for (int k = 0; k < kNumSums; ++k) {
        double* sum = partial(0, k);
        for (int64_t chunk = 1; chunk < partition_.num_chunks(); ++chunk) {
          const double* other = partial(chunk, k);
          for (int64_t i = begin; i < end; ++i) sum[i] += other[i];
        }
      }
    };
    if (width_ * partition_.num_chunks() >= kSerialElements) {
      partition_.parallel(width_, add_chunks);
    } else {
      add_chunks(0, width_);
    }
    const int64_t channels = partition_.num_channels(), wide = partition_.wide_channels();
    for (int k = 0; k < kNumSums; ++k) {
      double *total = totals_.data() + k * channels, *sum = partial(0, k);
      for (int64_t c = 0; c < channels; ++c) {
        total[c] = 0;
        for (int64_t i = c; i < wide; i += channels) total[c] += sum[slot(i, split_)];
      }
    }
  }

 private:
  double* partial(int64_t chunk, int k) { return partials_.data() + (chunk * kNumSums + k) * width_; }

  const Partition& partition_;
  int64_t split_, width_;
  std::vector<double> totals_;
  AlignedArray partials_;
};

}  // namespace bnext::cpu
