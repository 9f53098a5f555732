#include "cache.h"

#include <unistd.h>

#include <cstdio>

namespace bnext::cpu {
namespace {

constexpr int64_t kUnknown = int64_t{32} << 20;

int64_t find_last_cache() {
  // Linux knows which cores share a cache. glibc's sysconf takes the caches of a whole socket for one on some
  // processors: 384 MB where a core reaches 32.
  int64_t bytes = 0;
  for (int index = 2; index < 8; ++index) {
    char path[64];
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    std::FILE* file = std::fopen(path, "r");
    if (file == nullptr) break;
    long kilobytes = 0;
    if (std::fscanf(file, "%ldK", &kilobytes) == 1) bytes = int64_t{kilobytes} << 10;
    std::fclose(file);
  }
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (bytes <= 0) bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes : kUnknown;
}

}  // namespace

int64_t last_cache_bytes() {
  static const int64_t bytes = find_last_cache();
  return bytes;
}

}  // namespace bnext::cpu
