// Stands in for torch's header of this name in sanitizer builds: the same functions with the same cut into ranges, on
// std::thread, which the sanitizers follow. torch's own run on an OpenMP library that they cannot see into.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

namespace shim {
inline std::atomic<int> num_threads{1};
inline thread_local bool in_region = false;
}  // namespace shim

inline void set_num_threads(int count) { shim::num_threads = count; }
inline int get_num_threads() { return shim::in_region ? 1 : shim::num_threads.load(); }
inline bool in_parallel_region() { return shim::in_region; }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  if (begin >= end) return;
  const int64_t most = (end - begin + grain_size - 1) / grain_size;
  const int64_t threads = std::min<int64_t>(get_num_threads(), most);
  const int64_t length = (end - begin + threads - 1) / threads;
  auto run = [&](int64_t first) {
    shim::in_region = true;
    f(first, std::min(first + length, end));
    shim::in_region = false;
  };
  if (threads == 1) return f(begin, end);
  std::vector<std::thread> others;
  for (int64_t first = begin + length; first < end; first += length) others.emplace_back(run, first);
  run(begin);
  for (std::thread& other : others) other.join();
}

}  // namespace at
