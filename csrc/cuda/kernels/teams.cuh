// Teams of blocks that share a channel or a slab: which tiles are a block's, which begin late, and how those of a grid
// tell each other what they have found.
#pragma once

#include <type_traits>

#include "../device/delay.cuh"
#include "../device/grid.cuh"
#include "../device/letter.cuh"
#include "block_sums.cuh"

namespace bnext::cuda {

// Blocks with one tile; persistent ones, with one tile after the other; persistent ones that are alone on an SM, whose
// threads keep packs in registers; and those of a grid: the same, and their teams write letters.
enum class Blocks { kOneTile, kPersistent, kKeeping, kGrid };

// What a block has to do now: its part of the slab that its team has now.
struct Turn {
  Tile tile;
  int team, number = 0;

  __device__ explicit Turn(const KernelArgs& args) {
    team = static_cast<int>(args.by_tile.divide(blockIdx.x));
    tile = {team, static_cast<int>(args.by_tile.remainder(blockIdx.x))};
  }
  // False after the last one.
  __device__ bool next(const KernelArgs& args) {
    tile.slab += args.num_teams;
    ++number;
    return tile.slab < args.num_slabs;
  }
  // After next().
  __device__ Turn before(const KernelArgs& args) const {
    Turn result = *this;
    result.tile.slab -= args.num_teams;
    --result.number;
    return result;
  }
  // Of letters: none is 0.
  __device__ uint32_t stamp() const { return static_cast<uint32_t>(number) + 1; }
};

// The letters of a grid: from each block of a team to all of them, its sums of each channel of the slab; and from one
// of them to all, a channel's coefficients, where channels are shared out, block i % num_splits for channel i. Two
// turns have letters of their own. So a letter is overwritten by a block that has had those of the turn between, from
// blocks that were done with those before: sums from all; or coefficients, from all who read sums. No fence says so:
// the new letter is stored behind a loop that ends with what was read, so each reader has to wait for what it reads.
template <typename Acc>
class TeamLetters {
 public:
  using Sums = Letter<ChannelTotals>;
  using Finished = Letter<Coefficients<Acc>>;

  // All threads come here, and once is enough: clears the letters that the block will write, and arrives.
  __device__ void begin(const KernelArgs& args, const Turn& turn) {
    if (begun_) return;
    begun_ = true;
    for (int n = threadIdx.x; n < kTurnsOfLetters * args.slab_channels; n += blockDim.x) {
      const int of_turn = n < args.slab_channels ? 0 : 1, i = n - of_turn * args.slab_channels;
      clear_letter(sums(args, turn.team, of_turn, i) + turn.tile.split);
      if (args.shares_out && has_share(args, turn, i)) clear_letter(finished(args, turn.team, of_turn, i));
    }
    grid_arrive(cleared_);
  }
  // Before it looks for letters: until all blocks have begun.
  __device__ void await_others(const Turn& turn) const {
    if (turn.number == 0) grid_wait(cleared_);
  }

  // Where channels are shared out.
  __device__ static bool has_share(const KernelArgs& args, const Turn& turn, int i) {
    return args.by_tile.remainder(i) == static_cast<unsigned>(turn.tile.split);
  }

  // Of the slab's channel i, the first block's; those of the team's other blocks follow.
  __device__ static Sums* sums(const KernelArgs& args, const Turn& turn, int i) {
    return sums(args, turn.team, turn.number % kTurnsOfLetters, i);
  }
  __device__ static Finished* finished(const KernelArgs& args, const Turn& turn, int i) {
    return finished(args, turn.team, turn.number % kTurnsOfLetters, i);
  }

 private:
  static_assert(kTurnsOfLetters == 2, "of_turn is 0 or 1");
  static_assert(sizeof(ChannelTotals) == kNumSums * sizeof(double), "as plans have it");
  __device__ static int64_t letter(const KernelArgs& args, int team, int of_turn, int i) {
    return int64_t{team * kTurnsOfLetters + of_turn} * args.slab_channels + i;
  }
  __device__ static Sums* sums(const KernelArgs& args, int team, int of_turn, int i) {
    return static_cast<Sums*>(args.sum_letters) + letter(args, team, of_turn, i) * args.num_splits;
  }
  __device__ static Finished* finished(const KernelArgs& args, int team, int of_turn, int i) {
    return static_cast<Finished*>(args.coefficient_letters) + letter(args, team, of_turn, i);
  }

  bool begun_ = false;
  GridToken cleared_;
};

// Other families write none.
struct NoLetters {
  __device__ void begin(const KernelArgs&, const Turn&) {}
};
template <Blocks kBlocks, typename Acc>
using Letters = std::conditional_t<kBlocks == Blocks::kGrid, TeamLetters<Acc>, NoLetters>;

// Half of the blocks that run at once begin late, and are out of step with the others ever after: one half moves data
// while the other one adds up. Nobody should have to wait for their letters to begin.
template <typename SomeLetters>
__device__ inline void begin_late(const KernelArgs& args, const Turn& turn, SomeLetters& letters) {
  if (blockIdx.x - args.late_from >= args.num_late) return;
  letters.begin(args, turn);
  wait_clocks(args.late_clocks);
}

}  // namespace bnext::cuda
