// Teams of blocks that share a channel or a slab: which tiles are a block's, which begin late, and where a grid's teams
// meet.
#pragma once

#include <type_traits>

#include "../device/delay.cuh"
#include "../device/meeting.cuh"
#include "walk.cuh"

namespace bnext::cuda {

// Blocks with one tile; persistent ones, with one tile after the other; persistent ones that are alone on an SM, whose
// threads keep packs in registers; and those of a grid: the same, and their teams meet.
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
  // The upper bit after this turn, of a word at which the team meets in each: see meeting.cuh.
  __device__ unsigned next_bit() const { return (static_cast<unsigned>(number) + 1) & 1; }
};

// Half of the blocks that run at once begin late, and are out of step with the others ever after: one half moves data
// while the other one adds up.
__device__ inline void begin_late(const KernelArgs& args) {
  if (blockIdx.x - args.late_from < args.num_late) wait_clocks(args.late_clocks);
}

// Where the teams of a grid meet.
class Meetings {
 public:
  // Clears the team's words. Nobody looks at them before grid_wait.
  __device__ Meetings(const KernelArgs& args, const Turn& turn) {
    if (threadIdx.x == 0 && turn.tile.split == 0) {
      for (int kind : {kSums, kCoefficients}) *word(args, kind, turn.team) = 0;
    }
    grid_arrive(cleared_);
  }

  // Until all blocks of the team have left their sums of this turn.
  __device__ void exchange_sums(const KernelArgs& args, const Turn& turn) const {
    if (turn.number == 0) grid_wait(cleared_);
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* sums = word(args, kSums, turn.team);
      arrive_at(sums, static_cast<int>(args.num_splits), turn.tile.split == 0);
      await(sums, turn.next_bit());
    }
    __syncthreads();
  }

  // The thread has left the coefficients of the block's channel i.
  __device__ void leave_coefficients(const KernelArgs& args, const Turn& turn, int i) const {
    arrive_at(word(args, kCoefficients, turn.team), args.slab_channels, i == 0);
  }
  // Until all are there.
  __device__ void await_coefficients(const KernelArgs& args, const Turn& turn) const {
    if (threadIdx.x == 0) await(word(args, kCoefficients, turn.team), turn.next_bit());
    __syncthreads();
  }

 private:
  enum Kind : int { kSums, kCoefficients };

  __device__ static unsigned* word(const KernelArgs& args, int kind, int team) {
    return args.meeting_words + kind * args.num_teams + team;
  }

  GridToken cleared_;
};

// Other families have none.
struct NoMeetings {
  __device__ NoMeetings(const KernelArgs&, const Turn&) {}
};
template <Blocks kBlocks>
using TeamMeetings = std::conditional_t<kBlocks == Blocks::kGrid, Meetings, NoMeetings>;

}  // namespace bnext::cuda
