// How the threads of a block step through their items, for both walks, and how they load and store them.
// Knows nothing of batch norm.
#pragma once

#include "../device/pack.cuh"
#include "streaming_args.h"

namespace bnext::cuda {

// 64-bit division is a subroutine of a hundred instructions; most numbers here are small.
__device__ inline void divide(int64_t a, int64_t b, int64_t& quotient, int64_t& remainder) {
  if ((static_cast<uint64_t>(a | b) >> 32) == 0) {
    quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    remainder = static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
  } else {
    quotient = a / b;
    remainder = a % b;
  }
}

// The part of the work that a block has: a channel or a slab of packs, and a range of items.
struct Tile {
  int64_t column;  // channel, or slab
  int64_t split;
};

// Apply kernels go backwards: what the reduce pass read last is still in L2.
template <bool kRows>
__device__ inline Tile make_tile(const StreamingArgs& args, bool backwards) {
  const int64_t block = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  Tile tile;
  // Blocks that run together read neighbouring memory: slabs of the same rows, or parts of the same planes.
  if (kRows) {
    divide(block, args.num_slabs, tile.split, tile.column);
  } else {
    divide(block, args.num_splits, tile.column, tile.split);
  }
  return tile;
}

template <typename T, int kViews>
struct Item {
  T* at[kViews];   // lane 0, whether or not it belongs to the item
  unsigned lanes;  // one bit for each lane that does: all, or fewer at the ends of a plane, or none

  __device__ bool has(int lane) const { return lanes >> lane & 1; }
  __device__ bool empty() const { return lanes == 0; }
};

template <typename T, int kVec, bool kRows, int kViews>
class Cursor {
 public:
  // Begins at the first step of each thread, or at a later one.
  __device__ Cursor(const StreamingArgs& args, const Tile& tile, int64_t step = 0) : args_(args) {
    const int thread = threadIdx.x;
    int64_t start = thread, offset_c = tile.column;
    num_threads_ = blockDim.x;
    if (kRows) {
      const int row = thread / args.block_packs;
      offset_c = (tile.column * args.block_packs + thread % args.block_packs) * kVec;
      start = row;
      num_threads_ = args.block_rows;
      idle_ = row >= args.block_rows || offset_c >= args.wide_channels;
    }
    int64_t unused;
    first_channel_ = offset_c;
    if (kRows && args.wide_channels > args.num_channels) {
      divide(offset_c, args.num_channels, unused, first_channel_);
    }
#pragma unroll
    for (int k = 0; k < kViews; ++k) {
      base_[k] = static_cast<T*>(args.view[k].data);
      if (base_[k] != nullptr) base_[k] += offset_c * args.view[k].stride_c;
    }
    block_item_ = tile.split * args.chunk;
    end_ = block_item_ + args.chunk < args.num_items ? block_item_ + args.chunk : args.num_items;
    block_item_ += step * num_threads_;
    item_ = block_item_ + start;
    divide(item_, args.size[2], digit_[1], digit_[2]);
    digit_[0] = 0;
    if (args.size[0] > 1) divide(digit_[1], args.size[1], digit_[0], digit_[1]);
  }

  // The same answer for all threads of the block.
  __device__ bool more() const { return block_item_ < end_; }

  // Channel of a lane.
  __device__ int64_t channel(int lane) const {
    int64_t c = first_channel_ + (kRows ? lane : 0);
    if (kRows && idle_) return 0;
    while (c >= args_.num_channels) c -= args_.num_channels;
    return c;
  }

  // True for threads that the shape of the block has no use for.
  __device__ bool idle() const { return idle_; }

  __device__ Item<T, kViews> next() {
    const Item<T, kViews> item = here();
    advance();
    return item;
  }

  // The other way round.
  __device__ Item<T, kViews> previous() {
    const Item<T, kViews> item = here();
    retreat();
    return item;
  }

 private:
  __device__ Item<T, kViews> here() const {
    Item<T, kViews> item;
    constexpr unsigned kAllLanes = (1u << kVec) - 1;
    item.lanes = item_ < end_ && !idle_ ? kAllLanes : 0;
    int64_t first = 0;  // position of lane 0 in the plane: negative where the plane begins inside a pack
#pragma unroll
    for (int k = 0; k < kViews; ++k) {
      const View& view = args_.view[k];
      int64_t offset = digit_[1] * view.stride[1];
      if (args_.size[0] > 1) offset += digit_[0] * view.stride[0];
      if (kRows || kVec == 1) {
        offset += digit_[2] * view.stride[2];
      } else {
        if (k == 0) {
          const int64_t skew = reinterpret_cast<uintptr_t>(base_[0] + offset) % kPackBytes / sizeof(T);
          first = digit_[2] * kVec - skew;
        }
        offset += first;
      }
      item.at[k] = base_[k] + offset;
    }
    if (!kRows && kVec > 1) {
      if (first < 0) item.lanes &= kAllLanes << static_cast<int>(-first);
      const int64_t left = args_.plane_size - first;
      if (left < kVec) item.lanes &= left > 0 ? (1u << static_cast<int>(left)) - 1 : 0;
    }
    return item;
  }

  // item_ += num_threads_, in digits: without a division.
  __device__ void advance() {
    block_item_ += num_threads_;
    item_ += num_threads_;
    digit_[2] += args_.step[2];
    digit_[1] += args_.step[1];
    if (digit_[2] >= args_.size[2]) {
      digit_[2] -= args_.size[2];
      digit_[1] += 1;
    }
    if (digit_[1] >= args_.size[1]) {
      digit_[1] -= args_.size[1];
      digit_[0] += 1;
    }
    digit_[0] += args_.step[0];
  }

  __device__ void retreat() {
    block_item_ -= num_threads_;
    item_ -= num_threads_;
    digit_[2] -= args_.step[2];
    digit_[1] -= args_.step[1];
    if (digit_[2] < 0) {
      digit_[2] += args_.size[2];
      digit_[1] -= 1;
    }
    if (digit_[1] < 0) {
      digit_[1] += args_.size[1];
      digit_[0] -= 1;
    }
    digit_[0] -= args_.step[0];
  }

  const StreamingArgs& args_;
  T* base_[kViews];
  int64_t first_channel_, block_item_, item_, end_;
  int64_t digit_[3];
  int num_threads_;
  bool idle_ = false;
};

// View k of a batch of items. An aligned pack is read whole also where only some of its lanes are in the item: they share
// 16 aligned bytes with one that is, so they are memory of the same allocation. Lanes outside the item hold anything.
template <Cache kCache, bool kRows, int kVec, int kItems, typename T, int kViews>
__device__ inline void load_batch(Pack<T, kVec> (&packs)[kItems], const Item<T, kViews> (&items)[kItems], int k) {
  bool aligned = true;
  if (!kRows && kVec > 1 && k > 0) {
#pragma unroll
    for (int u = 0; u < kItems; ++u) aligned = aligned && (items[u].empty() || is_aligned(items[u].at[k]));
  }
#pragma unroll
  for (int u = 0; u < kItems; ++u) packs[u] = {};
  if (aligned) {
#pragma unroll
    for (int u = 0; u < kItems; ++u) {
      if (!items[u].empty()) load_pack<kCache>(packs[u], items[u].at[k]);
    }
    return;
  }
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      if (!items[u].has(v)) continue;
      Pack<T, 1> one;
      load_pack<kCache>(one, items[u].at[k] + v);
      packs[u].value[v] = one.value[0];
    }
  }
}

template <bool kRows, int kVec, typename T, int kViews>
__device__ inline void store_item(const Pack<T, kVec>& pack, const Item<T, kViews>& item, int k) {
  if (item.lanes == (1u << kVec) - 1 && (kRows || kVec == 1 || k == 0 || is_aligned(item.at[k]))) {
    store_pack(item.at[k], pack);
    return;
  }
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    if (item.has(v)) store_pack(item.at[k] + v, Pack<T, 1>{{pack.value[v]}});
  }
}

}  // namespace bnext::cuda
