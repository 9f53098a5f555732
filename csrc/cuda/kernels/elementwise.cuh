// What is done to a batch of packs, by every family: sums over it, and the linear map from x and dy to y or dx.
#pragma once

#include "walk.cuh"

namespace bnext::cuda {

// Rows: each element of a pack is of a channel of its own. Planes: they share a channel, and a few running sums are
// enough to keep the sums short; one for each of eight halves would cost registers that spill.
template <bool kRows, int kVec>
constexpr int kSumElements = kRows || kVec < 4 ? kVec : 4;

template <typename Acc, int kElements>
__device__ inline Acc add_elements(const Acc (&value)[kElements]) {
  Acc sum = value[0];
#pragma unroll
  for (int v = 1; v < kElements; ++v) sum += value[v];
  return sum;
}

// Items whose elements are taken apart, and added up, at once: short sums, for less rounding, but only so many
// registers.
template <int kItems, int kVec>
constexpr int kAtOnce = kItems * kVec <= 16 ? kItems : 16 / kVec;

// The elements of some of the items, from `first` on. Those without data get a value that adds nothing to any sum;
// nearly always all have data, and then nothing is done.
template <int kSome, typename T, int kVec, bool kWhole, int kItems, int kViews, typename Acc>
__device__ inline void take_apart(Acc (&wide)[kSome][kVec], const Pack<T, kVec> (&packs)[kItems],
                                  const Item<T, kVec, kWhole, kViews> (&items)[kItems], int first,
                                  const Acc (&neutral)[kVec]) {
  bool full = true;
#pragma unroll
  for (int u = 0; u < kSome; ++u) {
    widen_pack(wide[u], packs[first + u]);
    full = full && items[first + u].full();
  }
  if (full) return;
#pragma unroll
  for (int u = 0; u < kSome; ++u) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) wide[u][v] = items[first + u].has(v) ? wide[u][v] : neutral[v];
  }
}

// Sums of x - pivot and of its square.
template <typename T, int kVec, bool kWhole, int kItems, int kViews, typename Acc, int kElements>
__device__ inline void add_moments(const Pack<T, kVec> (&x)[kItems],
                                   const Item<T, kVec, kWhole, kViews> (&items)[kItems], const Acc (&pivot)[kVec],
                                   Acc (&s1)[kElements], Acc (&s2)[kElements]) {
  constexpr int kSome = kAtOnce<kItems, kVec>;
#pragma unroll
  for (int first = 0; first < kItems; first += kSome) {
    Acc wide[kSome][kVec];
    take_apart(wide, x, items, first, pivot);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const Acc first_d = wide[0][v] - pivot[v];
      Acc b1 = first_d, b2 = first_d * first_d;
#pragma unroll
      for (int u = 1; u < kSome; ++u) {
        const Acc d = wide[u][v] - pivot[v];
        b1 += d;
        b2 += d * d;
      }
      s1[v % kElements] += b1;
      s2[v % kElements] += b2;
    }
  }
}

// Sums of dy, dy * (x - mean) and x - mean.
template <typename T, int kVec, bool kWhole, int kItems, int kViews, typename Acc, int kElements>
__device__ inline void add_gradients(const Pack<T, kVec> (&x)[kItems], const Pack<T, kVec> (&dy)[kItems],
                                     const Item<T, kVec, kWhole, kViews> (&items)[kItems], const Acc (&mean)[kVec],
                                     Acc (&sum)[kNumSums][kElements]) {
  constexpr int kSome = kAtOnce<kItems, kVec>;
  const Acc zero[kVec] = {};
#pragma unroll
  for (int first = 0; first < kItems; first += kSome) {
    Acc wide_x[kSome][kVec], wide_dy[kSome][kVec];
    take_apart(wide_x, x, items, first, mean);
    take_apart(wide_dy, dy, items, first, zero);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const Acc first_xmu = wide_x[0][v] - mean[v];
      Acc b0 = wide_dy[0][v], b1 = wide_dy[0][v] * first_xmu, b2 = first_xmu;
#pragma unroll
      for (int u = 1; u < kSome; ++u) {
        const Acc xmu = wide_x[u][v] - mean[v];
        b0 += wide_dy[u][v];
        b1 += wide_dy[u][v] * xmu;
        b2 += xmu;
      }
      sum[0][v % kElements] += b0;
      sum[1][v % kElements] += b1;
      sum[2][v % kElements] += b2;
    }
  }
}

// Positions of a batch that a thread has seen: of its channel (planes), or of each of its channels (rows).
template <bool kRows, typename T, int kVec, bool kWhole, int kItems, int kViews>
__device__ inline int count_positions(const Item<T, kVec, kWhole, kViews> (&items)[kItems]) {
  int count = 0;
#pragma unroll
  for (int u = 0; u < kItems; ++u) count += kRows ? !items[u].empty() : items[u].count();
  return count;
}

// scale_x * (x - centre) + shift, and, where there is a dy, scale_dy * dy + that.
template <typename T, int kVec, typename Acc>
__device__ inline void map_wide(Acc (&out)[kVec], const Coefficients<Acc> (&k)[kVec], const Pack<T, kVec>& x) {
  widen_pack(out, x);
#pragma unroll
  for (int v = 0; v < kVec; ++v) out[v] = k[v].scale_x * (out[v] - k[v].centre) + k[v].shift;
}
template <typename T, int kVec, typename Acc>
__device__ inline Pack<T, kVec> map_pack(const Coefficients<Acc> (&k)[kVec], const Pack<T, kVec>& x) {
  Acc out[kVec];
  map_wide(out, k, x);
  return narrow_pack<T>(out);
}
template <typename T, int kVec, typename Acc>
__device__ inline Pack<T, kVec> map_pack(const Coefficients<Acc> (&k)[kVec], const Pack<T, kVec>& x,
                                         const Pack<T, kVec>& dy) {
  Acc out[kVec], wide_dy[kVec];
  map_wide(out, k, x);
  widen_pack(wide_dy, dy);
#pragma unroll
  for (int v = 0; v < kVec; ++v) out[v] = k[v].scale_dy * wide_dy[v] + out[v];
  return narrow_pack<T>(out);
}

}  // namespace bnext::cuda
