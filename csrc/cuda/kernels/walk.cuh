// How the threads of a block step through their items, for both walks, and how they load and store them.
// Knows nothing of batch norm.
#pragma once

#include <type_traits>

#include "../device/pack.cuh"
#include "kernel_args.h"

namespace bnext::cuda {

// The part of the work that a block has: a channel or a slab of packs, and a range of items.
struct Tile {
  int64_t slab;  // of planes, one channel
  int64_t split;
};

// Apply kernels go backwards: what the reduce pass read last is still in L2.
template <bool kRows>
__device__ inline Tile make_tile(const KernelArgs& args, bool backwards) {
  const unsigned block = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const unsigned outer = args.by_tile.divide(block), inner = block - outer * args.by_tile.divisor;
  // Blocks that run together read neighbouring memory: slabs of the same rows, or parts of the same planes.
  return kRows ? Tile{inner, outer} : Tile{outer, inner};
}

template <typename T, int kViews>
struct Item {
  T* at[kViews];      // element 0, whether or not it belongs to the item
  unsigned elements;  // one bit for each element that does: all, or fewer at the ends of a plane, or none

  __device__ bool has(int element) const { return elements >> element & 1; }
  __device__ bool empty() const { return elements == 0; }
};

// kWhole: every pack belongs to one row or plane entirely and is aligned in every view.
template <typename T, int kVec, bool kRows, bool kWhole, int kViews>
class Cursor {
 public:
  // Of items: plans take single elements where a channel has more packs than an int can count.
  using Index = std::conditional_t<(kVec > 1), int, int64_t>;

  // Begins at the first step of each thread, or at a later one.
  __device__ Cursor(const KernelArgs& args, const Tile& tile, Index step = 0) : args_(&args) {
    static_assert(kWhole || (!kRows && kVec > 1), "only packs of planes can be shared by two planes");
    const int thread = threadIdx.x;
    int64_t start = thread, offset_c = tile.slab;
    bool idle = false;
    num_threads_ = blockDim.x;
    if (kRows) {
      const int row = static_cast<int>(args.by_packs.divide(thread)), pack = thread - row * args.block_packs;
      offset_c = tile.slab * args.block_packs + pack;
      start = row;
      num_threads_ = args.block_rows;
      idle = row >= args.block_rows || offset_c * kVec >= args.wide_channels;
    }
    const int64_t block_item = tile.split * args.chunk, block_end = block_item + args.chunk;
    end_ = static_cast<Index>(idle ? 0 : block_end < args.num_items ? block_end : args.num_items);
    if constexpr (kVec > 1) keep_in_register(end_);
    const int64_t item = block_item + int64_t{step} * num_threads_ + start;
    item_ = static_cast<Index>(item);
    // Where there is one group of planes or rows, the second digit has no end: items beyond the last have places, too.
    Distance digit[3];
    if constexpr (kVec > 1) {
      const unsigned rows = args.by_packs_of_plane.divide(static_cast<unsigned>(item));
      const unsigned groups = args.grouped ? args.by_planes.divide(rows) : 0;
      digit[2] = static_cast<unsigned>(item) - rows * args.by_packs_of_plane.divisor;
      digit[1] = rows - groups * args.by_planes.divisor;
      digit[0] = groups;
    } else {
      const int64_t rows = item / args.size[2];
      digit[0] = args.grouped ? rows / args.size[1] : 0;
      digit[1] = rows - digit[0] * args.size[1];
      digit[2] = item - rows * args.size[2];
    }
    for (int d = 0; d < 3; ++d) digit_[d] = static_cast<Index>(digit[d]);
#pragma unroll
    for (int k = 0; k < kViews; ++k) {
      const View& view = args.view[k];
      const int64_t inner = kRows || kVec == 1 ? view.stride[2] : kPacks ? 1 : kVec;
      if constexpr (kPacks) {
        at_[k] = 0;
      } else {
        at_[k] = static_cast<T*>(view.data);
        if (at_[k] == nullptr) continue;
      }
      at_[k] += static_cast<Distance>(offset_c) * static_cast<Distance>(view.stride_c);
      at_[k] += digit[0] * static_cast<Distance>(view.stride[0]) + digit[1] * static_cast<Distance>(view.stride[1]) +
                digit[2] * static_cast<Distance>(inner);
    }
  }

  __device__ Item<T, kViews> next() {
    const Item<T, kViews> item = here();
    item_ += num_threads_;
    move(1);
    digit_[2] += static_cast<Index>(args_->step[2]);
    if (digit_[2] >= static_cast<Index>(args_->size[2])) carry(2, 1);
    if (args_->grouped) {
      digit_[1] += static_cast<Index>(args_->step[1]);
      if (digit_[1] >= static_cast<Index>(args_->size[1])) carry(1, 1);
    }
    return item;
  }

  // The other way round.
  __device__ Item<T, kViews> previous() {
    const Item<T, kViews> item = here();
    item_ -= num_threads_;
    move(-1);
    digit_[2] -= static_cast<Index>(args_->step[2]);
    if (digit_[2] < 0) carry(2, -1);
    if (args_->grouped) {
      digit_[1] -= static_cast<Index>(args_->step[1]);
      if (digit_[1] < 0) carry(1, -1);
    }
    return item;
  }

 private:
  // Where all packs are whole, places are packs, counted from the view's first one modulo 2^32: to go on is an addition
  // for each view. Else they are addresses, and distances are of elements.
  static constexpr bool kPacks = kWhole && kVec > 1;
  using Place = std::conditional_t<kPacks, unsigned, T*>;
  using Distance = std::conditional_t<kPacks, unsigned, int64_t>;

  __device__ Item<T, kViews> here() const {
    Item<T, kViews> item;
    constexpr unsigned kAllElements = (1u << kVec) - 1;
    item.elements = item_ < end_ ? kAllElements : 0;
    if constexpr (kPacks) {
      for (int k = 0; k < kViews; ++k) item.at[k] = static_cast<T*>(args_->view[k].data) + size_t{at_[k]} * kVec;
    } else if constexpr (kWhole) {
      for (int k = 0; k < kViews; ++k) item.at[k] = at_[k];
    } else {
      // The plane begins inside a pack, and element 0 of its first pack before it.
      const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(at_[0]) % kPackBytes / sizeof(T));
      for (int k = 0; k < kViews; ++k) item.at[k] = at_[k] - skew;
      if (digit_[2] == 0) item.elements &= kAllElements << skew;
      const int64_t left = args_->plane_size + skew - int64_t{digit_[2]} * kVec;
      if (left < kVec) item.elements &= left > 0 ? (1u << static_cast<int>(left)) - 1 : 0;
    }
    return item;
  }

  // One step of all threads in every view. Where a digit overflows, carry moves on to the next row, plane or group.
  __device__ void move(int direction) {
#pragma unroll
    for (int k = 0; k < kViews; ++k) go(k, direction, args_->move[k][0]);
  }
  __device__ void carry(int d, int direction) {
    digit_[d] -= direction * static_cast<Index>(args_->size[d]);
    digit_[d - 1] += direction;
#pragma unroll
    for (int k = 0; k < kViews; ++k) go(k, direction, args_->move[k][3 - d]);
  }
  __device__ void go(int k, int direction, int64_t distance) {
    if (direction > 0) {
      at_[k] += static_cast<Distance>(distance);
    } else {
      at_[k] -= static_cast<Distance>(distance);
    }
  }

  const KernelArgs* args_;
  Place at_[kViews];  // of element 0 if planes began at packs
  Index item_, end_, digit_[3];
  int num_threads_;
};

// How often each thread of a block takes kUnroll items: as often as the one that has most. The same for all threads.
__device__ inline int num_batches(const KernelArgs& args, const Tile& tile) {
  const int64_t left = args.num_items - tile.split * args.chunk, items = left < args.chunk ? left : args.chunk;
  return static_cast<int>(args.by_batch.divide(static_cast<unsigned>(items) + args.by_batch.divisor - 1));
}

// Of this thread's elements, their channels among those of the block. Rows have as many columns as their packs have
// elements.
template <bool kRows, int kVec>
__device__ inline void find_slab_channels(const KernelArgs& args, int (&channel)[kVec]) {
  const int column = kRows ? static_cast<int>(args.by_packs.remainder(threadIdx.x)) * kVec : 0;
  if (!kRows || args.slab_channels == args.block_packs * kVec) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) channel[v] = kRows ? column + v : 0;
    return;
  }
  const int run = static_cast<int>(args.by_run.divide(column));
  int next = static_cast<int>(args.by_slab.remainder(run)), left = (run + 1) * args.run_length - column;
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    channel[v] = next;
    if (--left > 0) continue;
    left = args.run_length;
    if (++next == args.slab_channels) next = 0;
  }
}

// View k of a batch of items. An aligned pack is read whole also where only some of its elements are in the item: they
// share 16 aligned bytes with one that is, so they are memory of the same allocation. Elements outside the item hold
// anything.
template <Cache kCache, bool kWhole, int kVec, int kItems, typename T, int kViews>
__device__ inline void load_batch(Pack<T, kVec> (&packs)[kItems], const Item<T, kViews> (&items)[kItems], int k) {
  bool aligned = true;
  if (!kWhole && k > 0) {
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

template <bool kWhole, int kVec, typename T, int kViews>
__device__ inline void store_item(const Pack<T, kVec>& pack, const Item<T, kViews>& item, int k) {
  if (item.elements == (1u << kVec) - 1 && (kWhole || k == 0 || is_aligned(item.at[k]))) {
    store_pack(item.at[k], pack);
    return;
  }
  if constexpr (!kWhole) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      if (item.has(v)) store_pack(item.at[k] + v, Pack<T, 1>{{pack.value[v]}});
    }
  }
}

}  // namespace bnext::cuda
