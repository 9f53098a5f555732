// What kernels are told, by value: plain data, filled in by launch.cu from a problem and its plan.
// Also the sizes that host and kernels must agree on. No CUDA, no torch.
#pragma once

#include <cstdint>

#include "../../problem.h"

#ifdef __CUDACC__
#define BNEXT_HOST_DEVICE __host__ __device__
#else
#define BNEXT_HOST_DEVICE
#endif

namespace bnext::cuda {

// Sums per channel and block. Statistics: count, mean, sum of (x-mean)^2. Backward: sum_dy, sum_dy_xmu, sum_xmu.
constexpr int kNumSums = 3;
// A pack: what a thread moves at once, where it does not move single elements.
constexpr int kPackBytes = 16;
// Packs of each of two tensors that a thread has in flight, and of one: 4 x 16 bytes x 2 tensors x 512 threads is 64
// KiB for an SM, above the 48 KiB or so that hide the latency of an H200's memory.
constexpr int kUnroll = 4, kUnrollOne = 2 * kUnroll;
// On chip: packs of each tensor that a thread takes from shared memory at once. That is near, and more would cost
// registers, which decide how many blocks an SM has room for.
constexpr int kOnChipBatch = 2;
BNEXT_HOST_DEVICE constexpr int on_chip_batches(int steps) { return (steps + kOnChipBatch - 1) / kOnChipBatch; }
// Groups of copies that a thread leaves in flight at most, one for each batch.
constexpr int kMostGroups = 6;
constexpr int kMaxThreads = 256;
// Streaming: blocks of kMaxThreads that an SM has registers for. So many run at once, and more would be another wave.
constexpr int kStreamingBlocksPerSm = 2;
constexpr int64_t kStreamingSharedBytes = 28 << 10;  // of such a block, at most: what it adds up in
constexpr int64_t kReservedSharedBytes = 1 << 10;    // of each block, by the driver
// On chip, where a block may have an SM for itself.
constexpr int kMaxOnChipThreads = 512;
// Batches of which a thread can keep the packs in registers, in 48 of the 128 that it has in such a block, where ptxas
// does not spill for it. Rows of halves need those for their sums, rows of float64 some of them, and a grid's rows
// before sm_90 more than there are; planes that share packs have masks as well.
BNEXT_HOST_DEVICE constexpr int most_kept_batches(int element_bytes, bool rows, bool whole_packs, int tensors,
                                                  int arch) {
  if (!whole_packs || (rows && (element_bytes == 2 || arch < 90))) return 0;
  return (rows && element_bytes == 8 ? 3 : 6) / tensors;
}
// Threads that an SM should have registers for: 1024, two blocks of so many, which take turns at moving data and at
// adding up, with 64 registers for each thread, or 768 with 80, wherever ptxas does not spill for it. (Left alone it
// takes up to half as many again, and gains next to nothing.) alone: blocks of a grid, and such as keep packs in
// registers.
BNEXT_HOST_DEVICE constexpr int count_on_chip_threads(bool backward, int element_bytes, bool rows, bool whole_packs,
                                                      bool persistent, bool alone, int arch) {
  const bool halves = element_bytes == 2, doubles = element_bytes == 8;
  if (alone) return kMaxOnChipThreads;
  // Of persistent kernels of float64, one or another is spilled on one or another architecture.
  if (doubles && persistent) return backward && !whole_packs ? kMaxOnChipThreads : 768;
  if (rows && halves) return backward ? kMaxOnChipThreads : 768;
  if (rows && doubles && !backward && arch < 80) return 768;
  if (!whole_packs && backward) return halves && arch < 90 ? kMaxOnChipThreads : 768;
  if (!rows && halves && backward && persistent && (arch < 90 || arch >= 100)) return 768;
  return 1024;
}
// Of each partial sum, how many blocks' a thread of streaming asks for at once: each is a trip to L2.
constexpr int kPartialsAtOnce = 4;
// Letters, by which blocks of a grid tell each other what they have found: words of 16 bytes, each with so many parts
// of 4 bytes and a stamp. Two turns have letters of their own. See letter.cuh and teams.cuh.
constexpr int kPartsOfWord = 3, kTurnsOfLetters = 2;
constexpr int kLettersAtOnce = 2;  // that a thread asks for: more would be spilled where packs stay in registers
constexpr int64_t letter_bytes(int64_t value_bytes) {
  constexpr int64_t kOfWord = 4 * kPartsOfWord;
  return (value_bytes + kOfWord - 1) / kOfWord * 16;
}
constexpr int kWarpSize = 32;
// Vectors that a pass has a number from for each channel, and for each channel a number to: by role, see finish.cuh.
constexpr int kMostInputs = 5, kMostOutputs = 6;

// Where the apply kernel has the numbers of its channels from.
enum class Source : uint8_t {
  kConstants,  // eval: from the vectors themselves
  kPartials,   // it finishes the reduction itself, each block for its own channels
  kFinished    // the finish kernel has left them in the workspace
};

// Where a block keeps what in its shared memory, as offsets in bytes. On chip, slots for packs come first.
struct SharedLayout {
  int64_t parts = 0;   // sums of the block's parts, [kNumSums][num_parts][part_places]; see block_sums.cuh
  int64_t counts = 0;  // [num_parts], of statistics
  // On chip: the block's totals of each channel, [slices][kNumSums][slab_channels], for other threads, and blocks of a
  // cluster, to read; and those of all blocks, [kNumSums][slab_channels], in the same place where there are no others.
  int64_t totals = 0, results = 0;
  int64_t inputs = 0;        // what vectors have, [kMostInputs][slab_channels], twice where blocks are persistent
  int64_t coefficients = 0;  // [slab_channels], or by element and pack
  int64_t bytes = 0;
};

// Division of 0 <= n < 2^31 by a number that the host knows, without dividing: a multiplication and a shift, where a
// division takes some twenty instructions. (Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication".)
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  BNEXT_HOST_DEVICE uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>((uint64_t{n} * multiplier) >> 32) + n) >> shift;
  }
  BNEXT_HOST_DEVICE uint32_t remainder(uint32_t n) const { return n - divide(n) * divisor; }
};

// The same for 0 <= n < 2^63.
struct LongDivider {
  uint64_t multiplier = 1;
  uint32_t shift = 0;

  BNEXT_HOST_DEVICE uint64_t divide(uint64_t n) const { return (upper_half(n, multiplier) + n) >> shift; }

 private:
  // Of the product's 128 bits.
  BNEXT_HOST_DEVICE static uint64_t upper_half(uint64_t a, uint64_t b) {
    const uint64_t a0 = static_cast<uint32_t>(a), a1 = a >> 32, b0 = static_cast<uint32_t>(b), b1 = b >> 32;
    const uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + static_cast<uint32_t>(middle);
    return a1 * b1 + (middle >> 32) + (other >> 32);
  }
};

inline Divider make_divider(int64_t divisor) {
  Divider by;
  by.divisor = static_cast<uint32_t>(divisor);
  while ((int64_t{1} << by.shift) < divisor) ++by.shift;
  const uint64_t excess = (uint64_t{1} << by.shift) - static_cast<uint64_t>(divisor);
  by.multiplier = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(divisor) + 1);
  return by;
}

inline LongDivider make_long_divider(int64_t divisor) {
  LongDivider by;
  const auto n = static_cast<uint64_t>(divisor);
  while ((uint64_t{1} << by.shift) < n) ++by.shift;
  uint64_t quotient = 0, rest = (uint64_t{1} << by.shift) - n;  // of (rest << 64) / n, bit by bit
  for (int bit = 0; bit < 64; ++bit) {
    rest *= 2;
    quotient = 2 * quotient + (rest >= n);
    if (rest >= n) rest -= n;
  }
  by.multiplier = quotient + 1;
  return by;
}

// An item is what one thread loads at once: of a channel's planes or strided positions (kPlanes), or of one row
// (kRows). Planes: item (i0, i1, j) is pack j of plane (i0, i1). Rows: item (i0, i1, i2) is a row, and a block has
// block_packs of its packs. A block has `chunk` consecutive items.
struct KernelArgs {
  // Reduce: x, or dy, x, dx; apply: out, x, dy. The first is never null. Strides are of packs where all packs are
  // whole.
  View view[3];
  int64_t size[3];  // of i0, i1 and j or i2
  int depth;        // 3, or 2 where size[0] is 1, or 1 where size[1] is 1, too
  int step;         // from an item of a thread to its next
  // How far a view goes on, as its strides: from item to item, and what comes on top of that at the end of a row or
  // plane, and of a group. By the dimension that goes on.
  int64_t move[3][3];
  int64_t num_items;   // size[0] * size[1] * size[2]
  int64_t chunk;       // items in a block
  int64_t num_splits;  // blocks that share a channel
  int64_t plane_size;  // positions in a plane
  int64_t num_channels;
  int64_t wide_channels;  // rows: channels of a folded row, a multiple of num_channels
  int block_packs, block_rows;
  Divider by_row, by_group;                // of packs, by size[2], and of what that gives by size[1]
  LongDivider by_long_row, by_long_group;  // the same of single elements
  Divider by_tile;                         // of blocks: by num_slabs (streaming, rows) or num_splits
  Divider by_packs;                        // of threads, and packs, by block_packs
  Divider by_step;                         // of a block's items
  Divider by_channels;                     // of wide channels, by num_channels
  SharedLayout layout;

  // A block has slab_channels channels: one (planes), or those of its columns.
  // Column e is of channel e / run_length % slab_channels: planes of run_length elements side by side, or one row of
  // slab_channels (or several, folded). In streaming each column of a folded row counts as a channel of its own.
  int slab_channels, run_length;
  int64_t tile_channels;  // of all blocks side by side: num_channels, or wide_channels in streaming
  Divider by_run, by_slab;
  // Sums are added up by parts, and then by groups of lanes, one group for each channel: see block_sums.cuh.
  bool parts_are_warps;
  // A part has places for what its threads leave of each sum, channel_places of them for each channel. Of a pack these
  // are as many as it has columns; or two_sided, see has_two_sides.
  bool two_sided;
  int part_places, channel_places;
  int num_parts, group_lanes, group_shift;
  int slices;  // groups that add up parts of the same channel, each some of them
  // How far a lane goes from a number that it adds up to its next, in parts and in places:
  // slices * group_lanes = lane_parts * channel_places + lane_places.
  int lane_parts, lane_places;
  Divider by_places;  // of lanes, by channel_places

  // On chip only. The blocks of a team share a channel or a slab; num_splits is their number. Where there are fewer
  // teams than slabs, a team has one after the other, those that are num_teams apart.
  int cluster_size;
  int num_teams, num_slabs;
  bool shares_out;               // a grid's blocks finish a slab's channels between them, and not each of them all
  int num_steps, held_steps;     // items of a thread, and how many of them have slots
  int batches_ahead;             // that a thread has asked for ahead of the one that it works on
  unsigned late_from, num_late;  // blocks that begin late
  int late_clocks;               // of the SM
  int kept_batches;              // that a thread keeps in registers
  // Cache lines of each tensor that a block asks L2 for, of the slab that comes so many later, and packs from one to
  // the next.
  int early_lines, early_slabs, line_packs;

  double* partials;    // of streaming: [kNumSums][tile_channels][num_splits]
  void* coefficients;  // the same: [num_channels] of Coefficients<Acc>
  // Of a grid: letters of sums and, where it shares out channels, of coefficients. See teams.cuh.
  void *sum_letters, *coefficient_letters;
  Source source;
  bool backward, training, cumulative;
  bool batch_counted;                                 // where cumulative: num_batches_tracked has this batch already
  double num_positions, inverse_positions, unbiased;  // m, 1 / m, m / (m - 1)
  double momentum, eps, running_limit;

  // By role: see Input and Output in finish.cuh.
  ChannelVector input[kMostInputs], output[kMostOutputs];
  int64_t* num_batches_tracked;
};

// Per-channel numbers of the apply pass: out = scale_dy * dy + (scale_x * (x - centre) + shift).
template <typename Acc>
struct alignas(16) Coefficients {
  Acc scale_dy, scale_x, centre, shift;
};

// ---- how a block adds up ------------------------------------------------------------------------------------------

// A part is what meets before shared memory: a warp, where a column's threads divide it evenly, or a single row of
// threads. Planes have one column, and warps are their parts.
constexpr bool parts_are_warps(int block_packs) { return kWarpSize % block_packs == 0; }
constexpr int count_parts(int threads, int block_packs) {
  return threads / (parts_are_warps(block_packs) ? kWarpSize : block_packs);
}
// A pack of a run of channels that are no shorter has columns of one channel or of two neighbours: its sides. A thread
// adds up the columns of each before it leaves the sums. (Its parts are rows: in a run whose channels do not fill
// packs, the packs are a multiple of an odd number, and do not divide a warp.)
constexpr int kSides = 2;
constexpr bool has_two_sides(int vec, int run_length) { return run_length > 1 && run_length >= vec; }
// An odd number of places: lanes that look at the same place of several parts find them in different banks.
constexpr int count_part_places(int vec, int run_length, int block_packs) {
  return block_packs * (has_two_sides(vec, run_length) ? kSides : vec) | 1;
}
// Where it has two sides, a channel has one in each pack that it lies in: so many, wherever it begins.
constexpr int count_channel_places(int vec, int run_length, int block_packs, int slab_channels) {
  if (!has_two_sides(vec, run_length)) return block_packs * vec / slab_channels;
  int unit = vec;  // channels begin at multiples of it; a power of two
  while (run_length % unit != 0) unit /= 2;
  return (vec - unit + run_length - 1) / vec + 1;
}
// Lanes that add up a channel's numbers: as many as the block has within a warp, until none has more than so many of
// them. More lanes would save no time: they take shuffles, of which an SM does one in a clock for all its warps.
constexpr int kLaneNumbers = 2;
constexpr int count_group_lanes(int threads, int slab_channels, int64_t numbers) {
  int lanes = 1;
  while (lanes < kWarpSize && 2 * lanes * slab_channels <= threads && lanes * kLaneNumbers < numbers) lanes *= 2;
  return lanes;
}
// Whether rows have a channel of the block's in each column.
BNEXT_HOST_DEVICE constexpr bool one_channel_a_column(int slab_channels, int block_packs, int vec) {
  return slab_channels == block_packs * vec;
}
// Where they do, coefficients of a pack's element, of so many packs side by side: see place_of_channel in walk.cuh.
BNEXT_HOST_DEVICE constexpr int odd_packs(int block_packs) { return block_packs | 1; }
// What vectors have of so many channels, in shared memory.
BNEXT_HOST_DEVICE constexpr int64_t input_bytes(int64_t channels) { return kMostInputs * channels * 8; }
// The finish kernel: what vectors have of its channel, and three numbers for each warp.
constexpr int64_t finish_shared(int threads) { return (kMostInputs + kNumSums * (threads / kWarpSize)) * 8; }

}  // namespace bnext::cuda
