// Where a thread of an on-chip kernel keeps the packs that it has read: slots of its own in shared memory, in which no
// other thread looks, so no barrier guards them. The lanes of a warp have neighbouring packs: no bank conflicts.
#pragma once

#include "../device/async.cuh"
#include "walk.cuh"

namespace bnext::cuda {

template <typename T, int kVec, bool kRows, bool kWhole, int kTensors>
class Slots {
 public:
  static constexpr int kViews = 1 + kTensors;  // out, x, and dy if there are two tensors
  using Steps = Cursor<T, kVec, kRows, kWhole, kViews>;

  struct Batch {
    typename Steps::Found items[kOnChipBatch];
    Pack<T, kVec> pack[kTensors][kOnChipBatch];
  };

  // A batch's packs in registers for long: as words, since compilers would take halves apart.
  struct KeptPacks {
    Pack<uint32_t, 4> at[kTensors][kOnChipBatch];
  };

  __device__ Slots()
      : own_(shared_address(static_cast<int>(threadIdx.x) / kWarpSize * kTensors * kWarpBytes +
                            static_cast<int>(threadIdx.x) % kWarpSize * kPackBytes)),
        step_(static_cast<int>(blockDim.x) * kTensors * kPackBytes) {
    keep_in_register(own_);
    keep_in_register(step_);
  }

  // Asks for the next steps of a thread, or for those before them, as batch number `place` of its slots.
  template <bool kBackwards = false>
  __device__ void copy(Steps& steps, int place, Cache cache = Cache::kLastUse) const {
    const CachePolicy policy = cache_policy(cache);
    typename Steps::Found items[kOnChipBatch];
    take<kBackwards>(steps, items);
#pragma unroll
    for (int u = 0; u < kOnChipBatch; ++u) {
      const auto& item = items[u];
      if (item.empty()) continue;
#pragma unroll
      for (int t = 0; t < kTensors; ++t) {
        const SharedAddress to = slot(place * kOnChipBatch + u, t);
        if (kWhole || is_aligned(item.at[1 + t])) {
          copy_async(to, item.at[1 + t], policy);
        } else {
          const typename Steps::Found one[1] = {item};
          Pack<T, kVec> pack[1];
          // Rare: not worth a second copy of the loads, for L2 to keep what comes again.
          load_batch<Cache::kLastUse>(pack, one, 1 + t);
          store_slot(to, pack[0]);
        }
      }
    }
  }

  // The same steps from their slots. A step without an item reads one, too, the last slot where its own does not exist:
  // nobody uses what it finds.
  template <bool kBackwards = false>
  __device__ Batch held(Steps& steps, int place, int num_slots) const {
    Batch found;
    take<kBackwards>(steps, found.items);
#pragma unroll
    for (int u = 0; u < kOnChipBatch; ++u) {
      const int step = place * kOnChipBatch + u, last = num_slots - 1;
#pragma unroll
      for (int t = 0; t < kTensors; ++t) load_slot(found.pack[t][u], slot(step < last ? step : last, t));
    }
    return found;
  }

  __device__ void read(int place, KeptPacks& packs) const {
#pragma unroll
    for (int u = 0; u < kOnChipBatch; ++u) {
#pragma unroll
      for (int t = 0; t < kTensors; ++t) load_slot(packs.at[t][u], slot(place * kOnChipBatch + u, t));
    }
  }

  // The steps before, whose packs these are.
  __device__ static Batch kept(Steps& steps, const KeptPacks& packs) {
    Batch found;
    take<true>(steps, found.items);
    static_assert(sizeof packs == sizeof found.pack);
    memcpy(&found.pack, &packs, sizeof packs);
    return found;
  }

 private:
  template <bool kBackwards>
  __device__ static void take(Steps& steps, typename Steps::Found (&items)[kOnChipBatch]) {
#pragma unroll
    for (int i = 0; i < kOnChipBatch; ++i) {
      items[kBackwards ? kOnChipBatch - 1 - i : i] = kBackwards ? steps.previous() : steps.next();
    }
  }

  // A warp's packs of one step lie together, those of dy behind those of x: a distance that compilers know. One that
  // only the launch knows would be a uniform register for ptxas, of which async.cuh tells.
  static constexpr int kWarpBytes = kWarpSize * kPackBytes;
  __device__ SharedAddress slot(int step, int tensor) const { return own_ + step * step_ + tensor * kWarpBytes; }

  SharedAddress own_;  // the thread's first slot
  int step_;           // bytes of a step, of all threads
};

}  // namespace bnext::cuda
