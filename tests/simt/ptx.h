// Kernels as nvcc has compiled them: reads PTX and runs it on the shim, thread by thread, in place of what the C++
// compiler makes of the same sources. So what the shim cannot see in those is executed too: inline assembly, the
// branches for each architecture, conversions in pairs, the grid barrier of CUDA's headers.
//
// It reports, beside what simt.h says: an access outside the memory of the call; shared memory that two threads touch,
// one of them to write, without a barrier between them; a relaxed arrival at the cluster's barrier that leaves stores
// unfenced; a load through L1 of what kernels leave for each other. What a block stores there others see when it has
// been released. Of other orders that the memory model allows, and of time, it knows nothing: a clock is what a thread
// slept.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

// Reads a file and returns its number, from 1 on. Throws std::runtime_error.
int load_ptx(const std::string& path);
void forget_ptx(int number);
// From now on launches run the kernels of this file; 0: what was compiled with the shim.
void use_ptx(int number);

// Of the file in use, if there is one:
bool has_ptx();
// The architecture that it was compiled for: 90 for sm_90.
int ptx_arch();
// Kernels that have run since then, by name, each with a space behind it.
std::string ptx_kernels_run();
// How often their threads have executed each instruction: lines of its name and a number.
std::string ptx_operations_run();
// From now on, or no longer, notes what warps do with shared memory, and forgets what there was. Its 32 banks hold 4
// bytes each: of what the lanes of a warp ask for at once (of 8 and 16 bytes in two and four turns), the bank that has
// most different words takes a cycle for each.
void watch_banks(bool on);
struct BankUse {
  int64_t cycles, least;  // of all warps; and if every turn took one
};
BankUse bank_use();
struct BankAccess {  // of a lane
  int lane;
  uint64_t at;
  int bytes;
};
BankUse bank_use(const std::vector<BankAccess>& lanes);
// Runs the kernel of this function, as one thread of the shim.
void run_ptx(const void* function, const void* args, size_t bytes);

}  // namespace simt
