// What the processor's caches hold.
#pragma once

#include <cstdint>

namespace bnext::cpu {

// Bytes of the last cache that a core can reach. What the tensors of a pass may take together before its stores go
// around the caches: nobody will find such an output in a cache, and a plain store reads the line that it is about to
// overwrite.
int64_t last_cache_bytes();

}  // namespace bnext::cpu
