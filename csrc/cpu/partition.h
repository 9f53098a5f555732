// How the work of one pass is cut into blocks and spread over torch's threads. The cut depends on the shape alone,
// never on the number of threads, and partial sums are added in the order of the blocks: the same bits every time.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace bnext::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements below which waking other threads costs more than it gains.
constexpr int64_t kSerialElements = 32768;
// Elements in a block: 32 KB of float32, small enough to balance and to be in cache for a second visit.
constexpr int64_t kBlockElements = 8192;
// Rows in a block of NHWC: a block leaves 2 float64 sums for each channel, which should stay small beside the data.
constexpr int64_t kMinRows = 64;
// Vectors need a multiple of this many channels (floats in 64 bytes), and want a few vectors in a row.
constexpr int64_t kLaneChannels = 16, kWideRow = 64, kMaxWideRow = 2048;

// Output size from which stores go around the caches. Nobody will find such an output in a cache anyway, and a plain
// store reads the line that it is about to overwrite.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

class Partition {
 public:
  Partition(const Geometry& geometry, std::initializer_list<const View*> views) : geometry_(geometry) {
    const int64_t channels = geometry.num_channels, positions = geometry.num_positions();
    serial_ = channels * positions < kSerialElements || at::in_parallel_region() || at::get_num_threads() == 1;
    const bool rows = geometry.walk == Walk::kRows;
    channels_per_block_ = rows ? channels : 1;
    chunk_ = rows ? std::max(kMinRows, kBlockElements / channels) : kBlockElements;
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
    // Channel by channel keeps a channel in cache between its two visits; with few channels the cores would idle.
    const int64_t threads = serial_ ? 1 : at::get_num_threads();
    channel_by_channel_ = !rows && (channels >= 4 * threads || channels % threads == 0);
  }

  int64_t num_channels() const { return geometry_.num_channels; }
  int64_t output_bytes() const { return num_channels() * geometry_.num_positions() * dtype_bytes(geometry_.dtype); }
  int64_t num_chunks() const { return num_chunks_; }
  bool channel_by_channel() const { return channel_by_channel_; }

  // Length that per-channel arrays need when kernels may see folded rows.
  int64_t wide_channels() const { return num_channels() * fold_; }

  // Calls f(begin, end) on ranges that together make [0, count).
  template <typename F>
  void parallel(int64_t count, F f) const {
    if (serial_) {
      f(int64_t{0}, count);
    } else {
      at::parallel_for(0, count, 1, f);
    }
  }

  // Calls f(block, chunk) for every block, last first when asked.
  template <typename F>
  void for_each_block(bool reverse, F f) const {
    const int64_t channel_blocks = num_channels() / channels_per_block_;
    parallel(channel_blocks * num_chunks_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t task = reverse ? begin + end - 1 - i : i;
        f(block(task / num_chunks_ * channels_per_block_, task % num_chunks_), task % num_chunks_);
      }
    });
  }

  Block block(int64_t channel, int64_t chunk) const {
    return {channel, channel + channels_per_block_, chunk * chunk_,
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
  Geometry geometry_;
  bool serial_ = true;
  bool channel_by_channel_ = false;
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
// of positions or, for reduce_channel, of one chunk at a time.
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

  // All blocks of one channel, on this thread.
  template <typename Kernel>
  void reduce_channel(int64_t c, Kernel kernel) {
    const int64_t channels = partition_.num_channels();
    for (int k = 0; k < kNumSums; ++k) total(k)[c] = 0;
    for (int64_t chunk = 0; chunk < partition_.num_chunks(); ++chunk) {
      for (int k = 0; k < kNumSums; ++k) partials_[k * channels + c] = 0;
      add_block(partition_.block(c, chunk), partials_.data(), kernel);
      for (int k = 0; k < kNumSums; ++k) total(k)[c] += partials_[k * channels + c];
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
  const Partition& partition_;
  std::vector<double> totals_, partials_;
};

}  // namespace bnext::cpu
