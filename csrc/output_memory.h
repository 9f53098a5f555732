// Memory for large outputs on a CPU: in 2 MB pages as far as they fill some, and kept for the next output.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>

namespace bnext {

// Outputs of at least so many bytes are worth it: one 2 MB page.
constexpr int64_t kLargeOutputBytes = int64_t{2} << 20;

// A new output comes from the system as untouched pages: a fault for each 4 KB of it, and zeros that nobody reads, cost
// more than computing it. This allocator asks for 2 MB pages, and keeps the memory of outputs that were freed, as
// torch's allocator for CUDA does: up to 1 GiB, or a sixteenth of the machine's memory, or BNEXT_CPU_CACHE_MB. What
// nobody has used for a second when the next output is freed, the system may take back whenever it is short
// (MADV_FREE). May be called from any thread.
c10::Allocator* output_allocator();

// What is kept at the moment, and giving all of it back.
int64_t cached_output_bytes();
void empty_output_cache();

}  // namespace bnext
