// How the work of one pass is cut into blocks and spread over torch's threads. How a channel's positions are cut depends
// on the shape alone, never on the number of threads, and partial sums are added in their order: the same bits every
// time. How many channels a block has changes nothing about the sums of each.
#pragma once

#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace bnext::cpu {

// Elements below which waking other threads costs more than it gains.
constexpr int64_t kSerialElements = 32768;
// Elements in a block: 32 KB of float32, small enough to balance and to be in cache for a second visit.
constexpr int64_t kBlockElements = 8192;
// Rows in a block of NHWC. Each block lays out the numbers of its channels, which costs about as much as 32 rows; and it
// leaves 2 float64 sums for each channel. More than the first, up to the second where enough blocks remain to share.
constexpr int64_t kMinRows = 64, kManyRows = 256, kEnoughChunks = 16;
// Channels in a block of NHWC.
constexpr int64_t kRowChannels = 512;
// Vectors need a multiple of this many channels (floats in 64 bytes), and want a few vectors in a row.
constexpr int64_t kLaneChannels = 16, kWideRow = 64, kMaxWideRow = 2048;

// Planes: contiguous bytes that a block of channels should have at each step of the outer dimensions, so that memory is
// read in runs that are worth it; and what a block may take of the processor's own cache, where its second visit should
// find it.
constexpr int64_t kRunBytes = int64_t{8} << 10, kMinRunBytes = int64_t{2} << 10;
constexpr int64_t kBlockBytes = int64_t{512} << 10;

// What the tensors of a pass may take together before its stores go around the caches: nobody will find such an output
// in a cache, and a plain store reads the line that it is about to overwrite.
inline int64_t cache_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const int64_t last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (last_level > 0) return last_level;
#endif
    return int64_t{32} << 20;
  }();
  return bytes;
}

class Partition {
 public:
  Partition(const Geometry& geometry, std::initializer_list<const View*> views) : geometry_(geometry) {
    const int64_t channels = geometry.num_channels, positions = geometry.num_positions();
    int64_t num_tensors = 0;
    for (const View* view : views) num_tensors += view->data != nullptr;
    const int64_t tensor_bytes = channels * positions * dtype_bytes(geometry.dtype);
    stream_ = num_tensors * tensor_bytes > cache_bytes();
    serial_ = channels * positions < kSerialElements || at::in_parallel_region() || at::get_num_threads() == 1 ||
              pool_is_lost();
    const bool rows = geometry.walk == Walk::kRows;
    const int64_t inner = geometry.size[2];
    if (rows) {
      chunk_ = std::max({kMinRows, kBlockElements / channels, std::min(kManyRows, positions / kEnoughChunks)});
    } else {
      chunk_ = inner < kBlockElements ? kBlockElements / inner * inner : kBlockElements;  // whole runs
    }
    // Dense rows that do not fill vectors: `fold` of them make one row of channels * fold.
    bool dense = rows && geometry.unit_stride && geometry.size[0] == 1 && geometry.size[1] == 1;
    for (const View* view : views) dense = dense && (view->data == nullptr || view->stride[2] == channels);
    if (dense && channels % kLaneChannels != 0) {
      const int64_t step = kLaneChannels / std::gcd(kLaneChannels, channels);
      const int64_t fold = step * ceil_div(kWideRow, step * channels);
      if (fold * channels <= kMaxWideRow) fold_ = fold;
    }
    chunk_ = ceil_div(chunk_, fold_) * fold_;
    num_chunks_ = ceil_div(positions, chunk_);
    // A few channels at a time keeps them in cache between their two visits; with few channels the cores would idle.
    const int64_t threads = serial_ ? 1 : at::get_num_threads();
    channel_by_channel_ = !rows && (channels >= 4 * threads || channels % threads == 0);
    channels_per_block_ =
        rows ? (fold_ > 1 ? channels : std::min(channels, kRowChannels)) : choose_block_channels(threads, num_tensors);
  }

  int64_t num_channels() const { return geometry_.num_channels; }
  // Whether stores go around the caches.
  bool stream() const { return stream_; }
  int64_t num_chunks() const { return num_chunks_; }
  bool channel_by_channel() const { return channel_by_channel_; }

  int64_t num_channel_blocks() const { return ceil_div(num_channels(), channels_per_block_); }

  // Length that per-channel arrays need when kernels may see folded rows.
  int64_t wide_channels() const { return num_channels() * fold_; }

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

  // Calls f(block, chunk) for every block, last first when asked.
  template <typename F>
  void for_each_block(bool reverse, F f) const {
    parallel(num_channel_blocks() * num_chunks_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t task = reverse ? begin + end - 1 - i : i;
        f(block(task / num_chunks_, task % num_chunks_), task % num_chunks_);
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
  // Sums of a channel do not depend on the channels beside it, so this may depend on the number of threads.
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

// kNumSums float64 sums per channel, indexed [sum * num_channels + channel]: totals, and the partial sums of each chunk
// of positions or, for reduce_channels, of one chunk at a time.
template <int kNumSums>
class ChannelSums {
 public:
  ChannelSums(const Partition& partition, int64_t num_partials)
      : partition_(partition),
        totals_(kNumSums * partition.num_channels()),
        partials_(kNumSums * partition.num_channels() * num_partials) {}

  double* total(int k) { return totals_.data() + k * partition_.num_channels(); }

  // Adds the sums of one block. kernel(geometry, block, fold, sums, stride): sum k of channel c is sums[k*stride + c].
  template <typename Kernel>
  void add_block(const Block& block, double* sums, Kernel kernel) const {
    const int64_t channels = partition_.num_channels();
    partition_.for_each_part(block, [&](const Geometry& g, const Block& part, int64_t fold) {
      if (fold == 1) return kernel(g, part, fold, sums, channels);
      std::vector<double> wide(kNumSums * g.num_channels);
      kernel(g, part, fold, wide.data(), g.num_channels);
      for (int k = 0; k < kNumSums; ++k) {
        for (int64_t i = 0; i < g.num_channels; ++i) sums[k * channels + i % channels] += wide[k * g.num_channels + i];
      }
    });
  }

  // All chunks of one block of channels, on this thread.
  template <typename Kernel>
  void reduce_channels(int64_t channel_block, Kernel kernel) {
    for (int64_t chunk = 0; chunk < partition_.num_chunks(); ++chunk) {
      const Block block = partition_.block(channel_block, chunk);
      for_each(block, [&](int64_t i) { partials_[i] = 0; });
      add_block(block, partials_.data(), kernel);
      for_each(block, [&](int64_t i) { totals_[i] = (chunk == 0 ? 0 : totals_[i]) + partials_[i]; });
    }
  }

  double* partial(int64_t chunk) { return partials_.data() + chunk * kNumSums * partition_.num_channels(); }

  // Every block on any thread, then the blocks' sums in order.
  template <typename Kernel>
  void reduce_all(Kernel kernel) {
    std::fill(partials_.begin(), partials_.end(), 0.0);
    partition_.for_each_block(false,
                              [&](const Block& block, int64_t chunk) { add_block(block, partial(chunk), kernel); });
    merge();
  }

  void merge() {
    const int64_t length = static_cast<int64_t>(totals_.size());
    std::fill(totals_.begin(), totals_.end(), 0.0);
    for (int64_t chunk = 0; chunk < partition_.num_chunks(); ++chunk) {
      const double* from = partial(chunk);
      for (int64_t i = 0; i < length; ++i) totals_[i] += from[i];
    }
  }

 private:
  // Calls f(index) for all sums of a block's channels.
  template <typename F>
  void for_each(const Block& block, F f) const {
    for (int k = 0; k < kNumSums; ++k) {
      for (int64_t c = block.channel_begin; c < block.channel_end; ++c) f(k * partition_.num_channels() + c);
    }
  }

  const Partition& partition_;
  std::vector<double> totals_, partials_;
};

}  // namespace bnext::cpu
