// From what the threads of a block have summed up to the totals of its channels, the same way for all families.
//
//   threads ── shuffles ──► parts, in shared memory ── barrier ──► groups of lanes, one for each channel ──► totals
//
// A part is a warp, or a row of threads where warps cut through rows. All of it has a fixed order: the same bits on
// every run. Little of this code runs more than once in a block, and a GPU has to fetch it: that is why it is loops
// over lanes and columns, and not unrolled.
#pragma once

#include "../device/reduce.cuh"
#include "elementwise.cuh"

namespace bnext::cuda {

// A channel's sums, of some of its positions. Statistics: count, mean, sum of squares around it. Backward: sum_dy,
// sum_dy_xmu, sum_xmu.
struct ChannelTotals {
  double value[kNumSums];
};

// Merges statistics of parts as Chan does: each part's squares are moved to a common point, which is the mean of one of
// the parts, and the sum of them from there to the mean of all. All in float64: that last step takes off at most
// (number of parts) times what stays, and there are digits to spare for it.
struct Moments {
  double point = 0, count = 0, sum = 0, squares = 0;  // the last two around `point`

  // A part of n elements: sums of x - pivot and of its square.
  __device__ void add(double n, double pivot, double s1, double s2) {
    const double distance = pivot - point;
    count += n;
    sum += n * distance + s1;
    squares += s2 + distance * (2 * s1 + n * distance);
  }
  __device__ ChannelTotals totals(double inverse_count) const {
    const double distance = sum * inverse_count;
    return {{count, point + distance, squares - distance * sum}};
  }
};

// Sums of x - pivot and of its square lose as many digits as the pivot's distance from the mean, squared, is times the
// variance. The first element will do for most data, but not where it is far from all others, as in the black border of
// an image. Where a share s of a part lies behind its pivot, that ratio is (1 - s) / s at most, whatever the data. So a
// part begins with the mean of its first batch, and takes the mean again after kPivotItems items of each thread: what
// comes before is at most eight batches, and what comes after at most eight times as much.
constexpr int kPivotItems = 16;

// From a thread's sums of `count` positions to the means of its part.
template <bool kRows, int kElements, typename Acc>
__device__ inline void take_part_means(const KernelArgs& args, Acc (&sum)[kElements], int count) {
  if (!kRows || args.parts_are_warps) {
#pragma unroll 1
    for (int distance = kRows ? args.block_packs : 1; distance < kWarpSize; distance *= 2) {
#pragma unroll
      for (int v = 0; v < kElements; ++v) sum[v] += __shfl_xor_sync(kFullWarp, sum[v], distance);
      count += __shfl_xor_sync(kFullWarp, count, distance);
    }
  }
  const Acc inverse = Acc(1) / static_cast<Acc>(count > 0 ? count : 1);
#pragma unroll
  for (int v = 0; v < kElements; ++v) sum[v] *= inverse;
}

template <bool kRows, typename T, int kVec, bool kWhole, int kItems, int kViews, typename Acc>
__device__ inline void find_pivots(const KernelArgs& args, const Pack<T, kVec> (&x)[kItems],
                                   const Item<T, kVec, kWhole, kViews> (&items)[kItems], Acc (&pivot)[kVec]) {
  constexpr int kElements = kRows ? kVec : 1;
  Acc mean[kElements] = {};
#pragma unroll
  for (int u = 0; u < kItems; ++u) {
    Acc wide[kVec];
    widen_pack(wide, x[u]);
#pragma unroll
    for (int v = 0; v < kVec; ++v) mean[v % kElements] += items[u].has(v) ? wide[v] : Acc(0);
  }
  take_part_means<kRows>(args, mean, count_positions<kRows>(items));
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    pivot[v] =
        is_finite(mean[v % kElements]) ? mean[v % kElements] : Acc(0);  // NaN and Inf reach the result through the sums
  }
}

// To the mean of what the part has seen, with the sums of this thread, which has had `count` positions.
template <bool kRows, int kVec, int kElements, typename Acc>
__device__ inline void move_pivots(const KernelArgs& args, Acc (&pivot)[kVec], Acc (&s1)[kElements],
                                   Acc (&s2)[kElements], int count) {
  constexpr int kMoved = kRows ? kVec : 1;
  // Planes: how many positions each of a thread's running sums has does not matter, as long as they add up.
  if constexpr (!kRows) {
    s1[0] = add_elements(s1);
#pragma unroll
    for (int v = 1; v < kElements; ++v) s1[v] = 0;
  }
  Acc distance[kMoved];
#pragma unroll
  for (int v = 0; v < kMoved; ++v) distance[v] = s1[v];
  take_part_means<kRows>(args, distance, count);
#pragma unroll
  for (int v = 0; v < kMoved; ++v) {
    const Acc mean = pivot[v] + distance[v], moved = mean - pivot[v], before = s1[v];
    if (!is_finite(moved)) continue;
    pivot[v] = mean;
    s1[v] = before - static_cast<Acc>(count) * moved;
    s2[v] -= moved * (before + s1[v]);
  }
#pragma unroll
  for (int v = kMoved; v < kVec; ++v) pivot[v] = pivot[0];
}

template <typename Value>
__device__ inline Value* shared_at(int64_t offset) {
  return reinterpret_cast<Value*>(shared_memory() + offset);
}

// Leaves the sums of a part for add_parts: for each column kNumSums sums, or pivot, sum of x - pivot and of its square,
// where all threads of a part have the same pivot, and `count` positions of each thread. In planes a part is a warp,
// with one column.
template <bool kMoments, typename Acc>
__device__ inline void leave_warp(const KernelArgs& args, Acc (&value)[kNumSums], int count = 0) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = kMoments ? 1 : 0; k < kNumSums; ++k) value[k] += __shfl_xor_sync(kFullWarp, value[k], distance);
    if (kMoments) count += __shfl_xor_sync(kFullWarp, count, distance);
  }
  if (threadIdx.x % kWarpSize > 0) return;
  const int part = threadIdx.x / kWarpSize;
#pragma unroll
  for (int k = 0; k < kNumSums; ++k) shared_at<Acc>(args.layout.parts)[k * args.num_parts + part] = value[k];
  if (kMoments) shared_at<int>(args.layout.counts)[part] = count;
}

// A pack of a run: sums of its columns to those of its sides, the first of which has `near` columns. Statistics go to
// the mean of a side's pivots first: as far from a column's as its data are from all others.
template <bool kMoments, int kElements, typename Acc>
__device__ inline void add_sides(int near, const Acc (&value)[kNumSums][kElements], int count,
                                 Acc (&sum)[kNumSums][kSides]) {
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    auto has = [&](int v) { return (v < near) == (side == 0); };
    if (kMoments) {
      const int columns = side == 0 ? near : kElements - near;
      const Acc inverse = Acc(1) / static_cast<Acc>(columns > 0 ? columns : 1);
      sum[0][side] = 0;
#pragma unroll
      for (int v = 0; v < kElements; ++v) sum[0][side] += has(v) ? value[0][v] * inverse : Acc(0);
    }
#pragma unroll
    for (int k = kMoments ? 1 : 0; k < kNumSums; ++k) sum[k][side] = 0;
#pragma unroll
    for (int v = 0; v < kElements; ++v) {
      if (!has(v)) continue;
      if (kMoments) {
        const Acc distance = value[0][v] - sum[0][side], moved = static_cast<Acc>(count) * distance;
        sum[1][side] += value[1][v] + moved;
        sum[2][side] += value[2][v] + distance * (2 * value[1][v] + moved);
      } else {
#pragma unroll
        for (int k = 0; k < kNumSums; ++k) sum[k][side] += value[k][v];
      }
    }
  }
}

// The first kHeld columns of a thread, whose first place this is. A pack's columns lie apart: that two lanes store to
// one bank is all that happens.
template <int kHeld, int kElements, typename Acc>
__device__ inline void leave_held(const KernelArgs& args, const Acc (&value)[kNumSums][kElements], Acc* to) {
#pragma unroll
  for (int k = 0; k < kNumSums; ++k) {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) to[v * args.block_packs] = value[k][v];
    to += args.num_parts * args.part_places;
  }
}

// Adds up the columns of lanes that lie packs, 2 * packs, ... apart in a warp, and leaves them. As long as a lane has
// several columns, it gives half of them to the lane at this distance and takes the other half's sums, so half as much
// goes round each time. (Pivots are the same for all.) Lanes that are down to one column add it up with their partners.
template <bool kMoments, int kHeld, int kElements, typename Acc>
__device__ inline void leave_halves(const KernelArgs& args, Acc (&value)[kNumSums][kElements], Acc* to, int distance) {
  const int packs = args.block_packs;
  if constexpr (kHeld > 1) {
    if (distance >= packs) {
      constexpr int kHalf = kHeld / 2;
      const bool upper = (threadIdx.x & distance) != 0;
#pragma unroll
      for (int k = 0; k < kNumSums; ++k) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
          const Acc kept = upper ? value[k][i + kHalf] : value[k][i];
          const Acc given = upper ? value[k][i] : value[k][i + kHalf];
          value[k][i] = kMoments && k == 0 ? kept : kept + __shfl_xor_sync(kFullWarp, given, distance);
        }
      }
      return leave_halves<kMoments, kHalf>(args, value, to + (upper ? kHalf * packs : 0), distance / 2);
    }
  } else {
#pragma unroll 1
    for (; distance >= packs; distance /= 2) {
#pragma unroll
      for (int k = kMoments ? 1 : 0; k < kNumSums; ++k)
        value[k][0] += __shfl_xor_sync(kFullWarp, value[k][0], distance);
    }
  }
  leave_held<kHeld>(args, value, to);
}

// In rows a thread has numbers for each of its columns.
template <bool kMoments, int kElements, typename Acc>
__device__ inline void leave_columns(const KernelArgs& args, Acc (&value)[kNumSums][kElements], int count = 0) {
  Acc* parts = shared_at<Acc>(args.layout.parts);
  const int thread = threadIdx.x, packs = args.block_packs;
  const int row = static_cast<int>(args.by_packs.divide(thread)), pack = thread - row * packs;
  if (args.two_sided) {  // and parts are rows: see has_two_sides
    const int left = args.run_length - static_cast<int>(args.by_run.remainder(pack * kElements));
    Acc sum[kNumSums][kSides];
    add_sides<kMoments>(left < kElements ? left : kElements, value, count, sum);
    if (row >= args.num_parts) return;
    Acc* to = parts + row * args.part_places + pack;
#pragma unroll
    for (int k = 0; k < kNumSums; ++k) {
#pragma unroll
      for (int side = 0; side < kSides; ++side) to[k * args.num_parts * args.part_places + side * packs] = sum[k][side];
    }
    if (kMoments && pack == 0) shared_at<int>(args.layout.counts)[row] = count;
    return;
  }
  const bool warps = args.parts_are_warps;
  const int part = warps ? thread / kWarpSize : row, place = warps ? thread & (packs - 1) : pack;
  const bool there = part < args.num_parts;
  Acc* to = parts + part * args.part_places + place;
  if (warps) {
    leave_halves<kMoments, kElements>(args, value, to, kWarpSize / 2);
  } else if (there) {
    leave_held<kElements>(args, value, to);
  }
  if (!kMoments) return;
  if (warps) {
#pragma unroll 1
    for (int distance = packs; distance < kWarpSize; distance *= 2) {
      count += __shfl_xor_sync(kFullWarp, count, distance);
    }
  }
  if (there && (warps ? thread % kWarpSize : place) == 0) shared_at<int>(args.layout.counts)[part] = count;
}

// The same from running sums: kSumElements of each, and for statistics with a pivot for each of them.
template <bool kRows, int kElements, typename Acc>
__device__ inline void leave_sums(const KernelArgs& args, Acc (&sum)[kNumSums][kElements]) {
  if constexpr (kRows) {
    leave_columns<false>(args, sum);
  } else {
    Acc value[kNumSums] = {add_elements(sum[0]), add_elements(sum[1]), add_elements(sum[2])};
    leave_warp<false>(args, value);
  }
}

template <bool kRows, int kVec, int kElements, typename Acc>
__device__ inline void leave_moments(const KernelArgs& args, const Acc (&pivot)[kVec], const Acc (&s1)[kElements],
                                     const Acc (&s2)[kElements], int count) {
  if constexpr (kRows) {
    Acc value[kNumSums][kVec];
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      value[0][v] = pivot[v];
      value[1][v] = s1[v];
      value[2][v] = s2[v];
    }
    leave_columns<true>(args, value, count);
  } else {
    Acc value[kNumSums] = {pivot[0], add_elements(s1), add_elements(s2)};
    leave_warp<true>(args, value, count);
  }
}

// Which of the channels of all blocks side by side, args.tile_channels, is the block's channel i. Of the last slab, not
// all may be there.
__device__ inline int64_t tile_channel(const KernelArgs& args, const Tile& tile, int i) {
  return int64_t{tile.slab} * args.slab_channels + i;
}

// Calls f(channel of the block, lane of its group, whether there is such a channel) in groups of neighbouring lanes.
// All threads of a warp come along, also those whose group has nothing to do: they may meet in shuffles. Planes have
// one channel, and a warp for it.
template <bool kRows, typename F>
__device__ inline void for_each_group(const KernelArgs& args, int channels, F f) {
  const int thread = threadIdx.x;
  if (!kRows) {
    if (thread < kWarpSize) f(0, thread, true);
    return;
  }
  const int of_warp = (thread & ~(kWarpSize - 1)) >> args.group_shift;
  const int groups = static_cast<int>(blockDim.x) >> args.group_shift, last = channels - 1;
#pragma unroll 1
  for (int first = 0; first + of_warp <= last; first += groups) {
    const int channel = first + (thread >> args.group_shift);
    f(channel <= last ? channel : last, thread & (args.group_lanes - 1), channel <= last);
  }
}

// Calls f(channel of the block), one thread for each, and each time the same.
template <bool kRows, typename F>
__device__ inline void for_each_channel(const KernelArgs& args, F f) {
  if constexpr (kRows) {
#pragma unroll 1
    for (int i = threadIdx.x; i < args.slab_channels; i += blockDim.x) f(i);
  } else {
    if (threadIdx.x == 0) f(0);
  }
}

// All of so many neighbouring lanes get the sums.
template <int kNumbers>
__device__ inline void group_sum(int lanes, double (&value)[kNumbers]) {
#pragma unroll 1
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kNumbers; ++k) value[k] += __shfl_xor_sync(kFullWarp, value[k], distance);
  }
}

// Parts of planes are no more than these. Both halves of the channel's warp add them up, so that all lanes have the
// sums one shuffle sooner.
constexpr int kFewLanes = 16;
static_assert(kMaxOnChipThreads / kWarpSize <= kFewLanes && kMaxThreads / kWarpSize <= kFewLanes,
              "a lane for each part");

__device__ inline ChannelTotals merged_totals(const KernelArgs& args, const Moments& merged) {
  const double count = merged.count > 0 ? merged.count : 1;
  return merged.totals(count == args.num_positions ? args.inverse_positions : 1 / count);
}

template <bool kRows, bool kMoments>
__device__ inline ChannelTotals group_totals(const KernelArgs& args, const Moments& moments,
                                             const double (&sum)[kNumSums], int lanes) {
  double all[kNumSums] = {kMoments ? moments.count : sum[0], kMoments ? moments.sum : sum[1],
                          kMoments ? moments.squares : sum[2]};
  if constexpr (kRows) {
    group_sum(lanes, all);
  } else {
    sum_lanes<kFewLanes>(all);
  }
  if (!kMoments) return {{all[0], all[1], all[2]}};
  return merged_totals(args, {moments.point, all[0], all[1], all[2]});
}

// A channel's totals of the block, from its places of all parts. For a group of lanes, after a barrier; or for one of
// several groups, whose lanes go on counting where those before have stopped: then of a slice of them.
template <bool kRows, bool kMoments, int kVec, typename Acc>
__device__ inline ChannelTotals add_parts(const KernelArgs& args, int channel, int lane) {
  const Acc* parts = shared_at<const Acc>(args.layout.parts);
  const int* counts = shared_at<const int>(args.layout.counts);
  const int count = kRows ? args.channel_places : 1, stride = args.num_parts * args.part_places;
  Moments moments;
  double sum[kNumSums] = {};
  auto add = [&](int part, int place, int columns) {
    const Acc* at = parts + part * args.part_places + place;
    const double v0 = at[0], v1 = at[stride], v2 = at[2 * stride];
    if (kMoments) {
      moments.add(counts[part] * columns, v0, v1, v2);
    } else {
      sum[0] += v0;
      sum[1] += v1;
      sum[2] += v2;
    }
  };
  auto place_of_column = [&](int column) { return column % kVec * args.block_packs + column / kVec; };
  if constexpr (!kRows) {
    if (kMoments) moments.point = parts[0];
    if (lane % kFewLanes < args.num_parts) add(lane % kFewLanes, 0, 1);
  } else if (one_channel_a_column(args, kVec)) {  // a place in each part
    const int place = place_of_column(channel);
    if (kMoments) moments.point = parts[place];
    // Not lane_parts, which is the same here: compilers divide by the step, ahead of the branch, where that may be
    // zero.
    const int step = args.slices * args.group_lanes;
#pragma unroll 4
    for (int part = lane; part < args.num_parts; part += step) add(part, place, 1);
  } else {
    // Of a run the channel's columns are neighbours, else slab_channels apart.
    const int begin = channel * args.run_length, end = begin + args.run_length;
    const int step = args.run_length > 1 ? 1 : args.slab_channels;
    struct Place {
      int at, columns;  // none, if the channel has one place less than others
    };
    auto place_of = [&](int j) -> Place {
      if (args.two_sided) {
        const int pack = begin / kVec + j, from = pack * kVec, to = from + kVec;
        const int columns = (to < end ? to : end) - (from > begin ? from : begin);
        return {from < begin ? args.block_packs + pack : pack, columns};
      }
      const int column = begin + j * step;
      return {place_of_column(column), 1};
    };
    if (kMoments) moments.point = parts[place_of(0).at];
    int part = static_cast<int>(args.by_places.divide(lane)), j = lane - part * count;
#pragma unroll 2
    while (part < args.num_parts) {
      const Place place = place_of(j);
      if (place.columns > 0) add(part, place.at, place.columns);
      part += args.lane_parts;
      j += args.lane_places;
      if (j >= count) {
        j -= count;
        ++part;
      }
    }
  }
  return group_totals<kRows, kMoments>(args, moments, sum, args.group_lanes);
}

// Calls leave(channel of the block, which of all channels that is, the block's totals of it), one thread for each.
template <bool kRows, bool kMoments, int kVec, typename Acc, typename F>
__device__ inline void leave_block_totals(const KernelArgs& args, const Tile& tile, F leave) {
  for_each_group<kRows>(args, args.slab_channels, [&](int i, int lane, bool there) {
    const ChannelTotals totals = add_parts<kRows, kMoments, kVec, Acc>(args, i, lane);
    const int64_t channel = tile_channel(args, tile, i);
    if (there && lane == 0 && channel < args.tile_channels) leave(i, channel, totals);
  });
}

}  // namespace bnext::cuda
