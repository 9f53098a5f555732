#include "output_memory.h"

#include <c10/core/CPUAllocator.h>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace bnext {

#if defined(__linux__)

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// A kept block serves an output that fills so much of it.
constexpr double kFilled = 0.8;

// Marking a page costs a few microseconds, and a training loop will have used the block again by then.
constexpr std::chrono::seconds kMarkAfter{1};

using Clock = std::chrono::steady_clock;

struct Block {
  void* data;
  size_t bytes;
  Clock::time_point freed{};
  bool marked = false;  // the system may take it
};

size_t cache_limit() {
  const char* text = std::getenv("BNEXT_CPU_CACHE_MB");
  if (text != nullptr && *text != '\0') {
    char* end = nullptr;
    const long megabytes = std::strtol(text, &end, 10);
    TORCH_CHECK(end != text && *end == '\0' && megabytes >= 0,
                "BNEXT_CPU_CACHE_MB should be a number of megabytes, not ", text);
    return static_cast<size_t>(megabytes) << 20;
  }
  const size_t memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return std::min(memory / 16, size_t{1} << 30);
}

// Such that blocks fit other outputs of about that size, at the price of an eighth of a large one's memory at most.
size_t round_up(size_t bytes) {
  constexpr size_t kLargestPage = size_t{64} << 10;
  size_t step = kHugePage;
  while (step > bytes / 8 && step > kLargestPage) step /= 2;
  return (bytes + step - 1) / step * step;
}

// Only advice: where it is refused, pages are small.
void advise_huge_pages(void* data, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage,
                  end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Aligned to 2 MB, or null.
void* map(size_t bytes) {
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  const size_t skip = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (skip > 0) munmap(begin, skip);
  munmap(begin + skip + bytes, kHugePage - skip);
  advise_huge_pages(begin + skip, bytes);
  return begin + skip;
}

// Those in use by their address, those that are kept in the order in which they were freed.
class Cache {
 public:
  // Null where the system has no memory left.
  void* take(size_t bytes) {
    const size_t rounded = round_up(bytes);
    Block block = take_kept(rounded);
    if (block.data == nullptr) block = Block{map(rounded), rounded};
    if (block.data == nullptr) {
      empty();
      block.data = map(rounded);
    }
    if (block.data == nullptr) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    used_[block.data] = block.bytes;
    return block.data;
  }

  void give(void* data) {
    std::vector<Block> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto it = used_.find(data);
      const Block block{data, it->second, Clock::now()};
      used_.erase(it);
      if (block.bytes <= limit_) {
        kept_.push_back(block);
        kept_bytes_ += block.bytes;
        dropped = shrink(limit_);
        mark(block.freed - kMarkAfter);
      } else {
        dropped.push_back(block);
      }
    }
    unmap(dropped);
  }

  bool keeps() const { return limit_ > 0; }

  size_t kept_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_bytes_;
  }

  void empty() {
    std::vector<Block> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      dropped = shrink(0);
    }
    unmap(dropped);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Of the blocks that would do the smallest, and of those the latest, which may still be in a cache of the processor.
  Block take_kept(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->bytes >= bytes && static_cast<double>(bytes) >= kFilled * static_cast<double>(it->bytes);
      if (fits && (best == kept_.end() || it->bytes <= best->bytes)) best = it;
    }
    if (best == kept_.end()) return Block{nullptr, 0};
    const Block block = *best;
    kept_.erase(best);
    kept_bytes_ -= block.bytes;
    return block;
  }

  void mark(Clock::time_point before) {
    for (Block& block : kept_) {
      if (block.freed > before) return;
      if (!block.marked) madvise(block.data, block.bytes, MADV_FREE);
      block.marked = true;
    }
  }

  // The longest unused go first.
  std::vector<Block> shrink(size_t limit) {
    size_t count = 0;
    for (; kept_bytes_ > limit; ++count) kept_bytes_ -= kept_[count].bytes;
    const auto end = kept_.begin() + static_cast<int64_t>(count);
    std::vector<Block> dropped(kept_.begin(), end);
    kept_.erase(kept_.begin(), end);
    return dropped;
  }

  static void unmap(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) munmap(block.data, block.bytes);
  }

  std::mutex mutex_;
  const size_t limit_ = cache_limit();
  size_t kept_bytes_ = 0;
  std::unordered_map<void*, size_t> used_;
  std::vector<Block> kept_;
};

// Never destroyed: tensors may be freed later than static objects.
Cache& cache() {
  static Cache* const cache = [] {
    auto* made = new Cache;
    // A child of fork has one thread, and no other one there would ever unlock what it finds locked.
    static std::mutex& mutex = made->mutex();
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
    return made;
  }();
  return *cache;
}

void free_output(void* data) {
  if (data == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  cache().give(data);
}

class OutputAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (!cache().keeps()) {
      c10::DataPtr plain = c10::GetCPUAllocator()->allocate(bytes);
      advise_huge_pages(plain.get(), bytes);
      return plain;
    }
    void* data = bytes == 0 ? nullptr : cache().take(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr || bytes == 0, "bnext: no memory for an output of ", bytes,
                     " bytes");
    if (data != nullptr) c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &free_output, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return cache().keeps() ? &free_output : c10::GetCPUAllocator()->raw_deleter();
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

c10::Allocator* output_allocator() {
  static OutputAllocator allocator;
  return &allocator;
}

int64_t cached_output_bytes() { return static_cast<int64_t>(cache().kept_bytes()); }

void empty_output_cache() { cache().empty(); }

#else

c10::Allocator* output_allocator() { return c10::GetCPUAllocator(); }
int64_t cached_output_bytes() { return 0; }
void empty_output_cache() {}

#endif

}  // namespace bnext
