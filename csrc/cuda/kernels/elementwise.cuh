// What is done to a batch of packs, by every family: sums over it, and the linear map from x and dy to y or dx.
#pragma once

#include <type_traits>

#include "walk.cuh"

namespace bnext::cuda {

// Rows: each lane is a channel of its own. Planes: lanes share a channel, and a few running sums are enough to keep the
// sums short; one for each lane of a half would cost registers that spill.
template <bool kRows, int kVec>
constexpr int kSumLanes = kRows || kVec < 4 ? kVec : 4;

template <typename Acc, int kLanes>
__device__ inline Acc add_lanes(const Acc (&value)[kLanes]) {
  Acc sum = value[0];
#pragma unroll
  for (int v = 1; v < kLanes; ++v) sum += value[v];
  return sum;
}

// Calls f(std::true_type) when all lanes of all items hold data, as nearly always, and f(std::false_type) otherwise: it
// need not ask for each lane, then, which would take as many instructions as the sums.
template <int kVec, typename T, int kItems, int kViews, typename F>
__device__ inline void with_fullness(const Item<T, kViews> (&items)[kItems], F f) {
  bool full = true;
#pragma unroll
  for (int u = 0; u < kItems; ++u) full = full && items[u].lanes == (1u << kVec) - 1;
  if (full) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

// Sums of x - pivot and of its square. The batch is added up first: short sums, for less rounding.
template <typename T, int kVec, int kItems, int kViews, typename Acc, int kLanes>
__device__ inline void add_moments(const Pack<T, kVec> (&x)[kItems], const Item<T, kViews> (&items)[kItems],
                                   const Acc (&pivot)[kVec], Acc (&s1)[kLanes], Acc (&s2)[kLanes]) {
  with_fullness<kVec>(items, [&](auto full) {
    Acc wide[kItems][kVec];
#pragma unroll
    for (int u = 0; u < kItems; ++u) widen_pack(wide[u], x[u]);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      Acc b1 = 0, b2 = 0;
#pragma unroll
      for (int u = 0; u < kItems; ++u) {
        const Acc d = decltype(full)::value || items[u].has(v) ? wide[u][v] - pivot[v] : Acc(0);
        b1 += d;
        b2 += d * d;
      }
      s1[v % kLanes] += b1;
      s2[v % kLanes] += b2;
    }
  });
}

// Sums of dy, dy * (x - mean) and x - mean.
template <typename T, int kVec, int kItems, int kViews, typename Acc, int kLanes>
__device__ inline void add_gradients(const Pack<T, kVec> (&x)[kItems], const Pack<T, kVec> (&dy)[kItems],
                                     const Item<T, kViews> (&items)[kItems], const Acc (&mean)[kVec],
                                     Acc (&sum)[kNumSums][kLanes]) {
  with_fullness<kVec>(items, [&](auto full) {
    Acc wide_x[kItems][kVec], wide_dy[kItems][kVec];
#pragma unroll
    for (int u = 0; u < kItems; ++u) {
      widen_pack(wide_x[u], x[u]);
      widen_pack(wide_dy[u], dy[u]);
    }
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      Acc b0 = 0, b1 = 0, b2 = 0;
#pragma unroll
      for (int u = 0; u < kItems; ++u) {
        const bool has = decltype(full)::value || items[u].has(v);
        const Acc d = has ? wide_dy[u][v] : Acc(0), xmu = has ? wide_x[u][v] - mean[v] : Acc(0);
        b0 += d;
        b1 += d * xmu;
        b2 += xmu;
      }
      sum[0][v % kLanes] += b0;
      sum[1][v % kLanes] += b1;
      sum[2][v % kLanes] += b2;
    }
  });
}

// Positions of a batch that a thread has seen: of its channel (planes), or of each of its channels (rows).
template <bool kRows, typename T, int kItems, int kViews>
__device__ inline int count_positions(const Item<T, kViews> (&items)[kItems]) {
  int count = 0;
#pragma unroll
  for (int u = 0; u < kItems; ++u) count += kRows ? !items[u].empty() : popcount(items[u].lanes);
  return count;
}

// scale_dy * dy + (scale_x * (x - centre) + shift), without the part whose tensor is missing.
template <typename T, int kVec, typename Acc>
__device__ inline Pack<T, kVec> map_pack(const Coefficients<Acc> (&k)[kVec], const Pack<T, kVec>& x,
                                         const Pack<T, kVec>& dy, bool has_x, bool has_dy) {
  Acc wide_x[kVec], wide_dy[kVec], out[kVec];
  widen_pack(wide_x, x);
  widen_pack(wide_dy, dy);
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    out[v] = 0;
    if (has_x) out[v] = k[v].scale_x * (wide_x[v] - k[v].centre) + k[v].shift;
    if (has_dy) out[v] = k[v].scale_dy * wide_dy[v] + out[v];
  }
  return narrow_pack<T>(out);
}

}  // namespace bnext::cuda
