// How the threads of a block step through their items, for both walks, and how they load and store them.
// Knows nothing of batch norm.
#pragma once

#include <type_traits>

#include "../device/pack.cuh"
#include "kernel_args.h"

namespace bnext::cuda {

// The part of the work that a block has: a channel or a slab of packs, and a range of items.
struct Tile {
  int slab;  // of planes, one channel
  int split;
};

// Apply kernels go backwards: what the reduce pass read last is still in L2.
template <bool kRows>
__device__ inline Tile make_tile(const KernelArgs& args, bool backwards) {
  const unsigned block = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int outer = static_cast<int>(args.by_tile.divide(block));
  const int inner = static_cast<int>(block - static_cast<unsigned>(outer) * args.by_tile.divisor);
  // Blocks that run together read neighbouring memory: slabs of the same rows, or parts of the same planes.
  return kRows ? Tile{inner, outer} : Tile{outer, inner};
}

// kWhole: every pack belongs to one row or plane entirely and is aligned in every view.
template <typename T, int kVec, bool kWhole, int kViews>
struct Item {
  T* at[kViews];  // element 0, whether or not it belongs to the item
  // Whether there is a pack. Of packs that planes share, one bit for each element that belongs to the item: all, or
  // fewer at the ends of a plane, or none.
  std::conditional_t<kWhole, bool, unsigned> elements;

  static constexpr unsigned kAll = kWhole ? 1 : (1u << kVec) - 1;
  __device__ bool has(int element) const { return kWhole ? elements : elements >> element & 1; }
  __device__ bool empty() const { return elements == 0; }
  __device__ bool full() const { return elements == kAll; }
  __device__ int count() const { return kWhole ? (elements ? kVec : 0) : popcount(elements); }
};

// A thread's items, from one of its steps on, in either direction. Where an item is follows from its number alone, by
// no, one or two divisions, which take a few instructions each; to carry digits from item to item would take more of
// them, and registers. Offsets are counted modulo 2^32 in packs where all packs are whole: then all of it is one word
// each.
template <typename T, int kVec, bool kRows, bool kWhole, int kViews>
class Cursor {
 public:
  using Found = Item<T, kVec, kWhole, kViews>;
  // Of items: plans take single elements where a channel has more packs than an int can count.
  using Index = std::conditional_t<(kVec > 1), int, int64_t>;

  // Begins at the first step of each thread, or at a later one.
  __device__ Cursor(const KernelArgs& args, const Tile& tile, Index step = 0) : args_(&args) {
    const int thread = threadIdx.x;
    int row = 0, pack = 0;
    if (kRows) {
      row = static_cast<int>(args.by_packs.divide(thread));
      pack = thread - row * args.block_packs;
    }
    begin(tile, int64_t{step} * args.step + (kRows ? row : thread), pack, kRows && row >= args.block_rows);
  }

  // At one of the block's packs, as if they all lay one after the other.
  __device__ static Cursor at_pack(const KernelArgs& args, const Tile& tile, int number) {
    Cursor cursor(args);
    const int row = kRows ? static_cast<int>(args.by_packs.divide(number)) : number;
    cursor.begin(tile, row, kRows ? number - row * args.block_packs : 0, false);
    return cursor;
  }

  __device__ Found next() {
    const Found item = here();
    item_ += static_cast<Index>(args_->step);
    return item;
  }

  // The other way round.
  __device__ Found previous() {
    const Found item = here();
    item_ -= static_cast<Index>(args_->step);
    return item;
  }

 private:
  static constexpr bool kPacks = kWhole && kVec > 1;  // what offsets count, else elements
  using Offset = std::conditional_t<kPacks, unsigned, int64_t>;
  using Number = std::make_unsigned_t<Index>;

  __device__ explicit Cursor(const KernelArgs& args) : args_(&args) {}

  // At one of the block's items, and of rows, one of the packs that the block has of them. idle: there are none.
  __device__ void begin(const Tile& tile, int64_t item, int pack, bool idle) {
    static_assert(kWhole || (!kRows && kVec > 1), "only packs of planes can be shared by two planes");
    int64_t offset_c = tile.slab;
    if (kRows) {
      offset_c = int64_t{tile.slab} * args_->block_packs + pack;
      idle = idle || offset_c * kVec >= args_->wide_channels;
    }
    const int64_t block_item = tile.split * args_->chunk, block_end = block_item + args_->chunk;
    end_ = static_cast<Index>(idle ? 0 : block_end < args_->num_items ? block_end : args_->num_items);
    item_ = static_cast<Index>(block_item + item);
    if constexpr (kVec > 1) keep_in_register(end_);
#pragma unroll
    for (int k = 0; k < kViews; ++k) {
      channel_[k] = static_cast<Offset>(offset_c) * static_cast<Offset>(args_->view[k].stride_c);
    }
  }

  // kRare: else compilers would do this each time, and then drop it where nobody needs it.
  template <bool kRare>
  __device__ static Number quotient(Number n, const Divider& by, const LongDivider& by_long) {
    if constexpr (kVec > 1) {
      Number result = by.divide(n);
      if (kRare) keep_in_register(result);
      return result;
    } else {
      return by_long.divide(n);
    }
  }
  __device__ void add(Offset (&offset)[kViews], Number n, int dimension) const {
#pragma unroll
    for (int k = 0; k < kViews; ++k)
      offset[k] += static_cast<Offset>(n) * static_cast<Offset>(args_->move[k][dimension]);
  }

  __device__ Found here() const {
    Found item;
    item.elements = item_ < end_ ? Found::kAll : 0;
    Offset offset[kViews];
#pragma unroll
    for (int k = 0; k < kViews; ++k) {
      offset[k] = channel_[k] + static_cast<Offset>(item_) * static_cast<Offset>(args_->move[k][2]);
    }
    // Items beyond the last are in the last row, plane or group here: nobody looks for them.
    Number row = 0;
    if (!kRows || args_->depth > 1) {  // planes are nearly always several, and rows hardly ever more than one way apart
      row = quotient<kRows>(static_cast<Number>(item_), args_->by_row, args_->by_long_row);
      add(offset, row, 1);
      if (args_->depth > 2) add(offset, quotient<true>(row, args_->by_group, args_->by_long_group), 0);
    }
#pragma unroll
    for (int k = 0; k < kViews; ++k) {
      item.at[k] = static_cast<T*>(args_->view[k].data);
      if (kPacks || item.at[k] != nullptr) item.at[k] += static_cast<size_t>(offset[k]) * (kPacks ? kVec : 1);
    }
    if constexpr (!kWhole) {
      // The plane begins inside a pack, and element 0 of its first pack before it.
      const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(item.at[0]) % kPackBytes / sizeof(T));
      const int pack = static_cast<int>(item_ - static_cast<Index>(row) * static_cast<Index>(args_->size[2]));
      for (int k = 0; k < kViews; ++k) item.at[k] -= skew;
      if (pack == 0) item.elements &= Found::kAll << skew;
      const int64_t left = args_->plane_size + skew - int64_t{pack} * kVec;
      if (left < kVec) item.elements &= left > 0 ? (1u << static_cast<int>(left)) - 1 : 0;
    }
    return item;
  }

  const KernelArgs* args_;
  Index item_, end_;
  Offset channel_[kViews];  // where the thread's channels begin
};

// Items that each thread of a block takes: as many as the one that has most. The same for all threads.
__device__ inline int num_steps(const KernelArgs& args, const Tile& tile) {
  const int64_t left = args.num_items - tile.split * args.chunk, items = left < args.chunk ? left : args.chunk;
  return static_cast<int>(args.by_step.divide(static_cast<unsigned>(items) + args.by_step.divisor - 1));
}

__device__ inline bool one_channel_a_column(const KernelArgs& args, int vec) {
  return one_channel_a_column(args.slab_channels, args.block_packs, vec);
}

// Of this thread's elements, their channels among those of the block. Rows have as many columns as their packs have
// elements.
template <bool kRows, int kVec>
__device__ inline void find_slab_channels(const KernelArgs& args, int (&channel)[kVec]) {
  const int column = kRows ? static_cast<int>(args.by_packs.remainder(threadIdx.x)) * kVec : 0;
  if (!kRows || one_channel_a_column(args, kVec)) {
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

// Where rows have a channel in each column, what a block leaves of them for all threads lies by element of a pack, and
// then by pack: the lanes of a warp look for neighbouring packs, and would all want the same banks of shared memory if
// channels lay one after the other. From element to element it is an odd number of places: so threads that leave
// neighbouring channels find different banks, too.
template <bool kRows, int kVec>
__device__ inline int place_of_channel(const KernelArgs& args, int channel) {
  if (!kRows || !one_channel_a_column(args, kVec)) return channel;
  return channel % kVec * odd_packs(args.block_packs) + channel / kVec;
}
// Of this thread's elements.
template <bool kRows, int kVec>
__device__ inline void find_places(const KernelArgs& args, int (&place)[kVec]) {
  if (!kRows || !one_channel_a_column(args, kVec)) return find_slab_channels<kRows>(args, place);
  const int pack = static_cast<int>(args.by_packs.remainder(threadIdx.x));
#pragma unroll
  for (int v = 0; v < kVec; ++v) place[v] = v * odd_packs(args.block_packs) + pack;
}

// View k of a batch of items. An aligned pack is read whole also where only some of its elements are in the item: they
// share 16 aligned bytes with one that is, so they are memory of the same allocation. Elements outside the item hold
// anything.
template <Cache kCache, typename T, int kVec, bool kWhole, int kItems, int kViews>
__device__ inline void load_batch(Pack<T, kVec> (&packs)[kItems], const Item<T, kVec, kWhole, kViews> (&items)[kItems],
                                  int k) {
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
      packs[u].set(v, one.get(0));
    }
  }
}

template <typename T, int kVec, bool kWhole, int kViews>
__device__ inline void store_item(const Pack<T, kVec>& pack, const Item<T, kVec, kWhole, kViews>& item, int k) {
  if (item.full() && (kWhole || k == 0 || is_aligned(item.at[k]))) {
    store_pack(item.at[k], pack);
    return;
  }
  if constexpr (!kWhole) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      if (item.has(v)) store_pack(item.at[k] + v, Pack<T, 1>{{pack.get(v)}});
    }
  }
}

}  // namespace bnext::cuda
