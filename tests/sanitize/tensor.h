// Tensors whose memory ends where they end, so that whatever a kernel touches beside its elements is found: by the
// sanitizer's red zones on the heap, by pages without access for masked vector instructions, which GCC's sanitizers do
// not watch, and by the bits between the elements.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/half.h"
#include "layout.h"
#include "problem.h"

namespace sanitize {

using bnext::DType;
using Size = std::array<int64_t, 4>;  // N, C, H, W

// A NaN in all four dtypes: read by mistake it spoils a result, and written over it is missed.
constexpr unsigned char kFill = 0xff;

[[noreturn]] void fail(const std::string& what);

// On the heap, or with a page that nobody may touch right behind or right before.
enum class Place { kHeap, kBeforePage, kAfterPage };

class Memory {
 public:
  Memory(int64_t num_bytes, Place place) : bytes_(num_bytes) {
    if (place == Place::kHeap) {
      data_ = static_cast<unsigned char*>(std::malloc(bytes_));
    } else {
      const int64_t page = getpagesize(), room = (bytes_ + page - 1) / page * page;
      mapped_ = room + 2 * page;
      map_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      auto* inside = static_cast<unsigned char*>(map_) + page;
      if (map_ == MAP_FAILED || mprotect(inside, room, PROT_READ | PROT_WRITE) != 0) fail("mmap failed");
      data_ = place == Place::kBeforePage ? inside + room - bytes_ : inside;
    }
    std::memset(data_, kFill, bytes_);
  }
  ~Memory() { map_ == nullptr ? std::free(data_) : static_cast<void>(munmap(map_, mapped_)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  unsigned char* data() const { return data_; }
  int64_t num_bytes() const { return bytes_; }

 private:
  int64_t bytes_, mapped_ = 0;
  unsigned char* data_ = nullptr;
  void* map_ = nullptr;
};

inline double load(DType dtype, const void* p) {
  switch (dtype) {
    case DType::kFloat64:
      return bnext::load_one(static_cast<const double*>(p));
    case DType::kFloat32:
      return bnext::load_one(static_cast<const float*>(p));
    case DType::kBFloat16:
      return bnext::load_one(static_cast<const bnext::BFloat16*>(p));
    default:
      return bnext::load_one(static_cast<const bnext::Float16*>(p));
  }
}

inline void store(DType dtype, void* p, double value) {
  switch (dtype) {
    case DType::kFloat64:
      return bnext::store_one(static_cast<double*>(p), value);
    case DType::kFloat32:
      return bnext::store_one(static_cast<float*>(p), value);
    case DType::kBFloat16:
      return bnext::store_one(static_cast<bnext::BFloat16*>(p), value);
    default:
      return bnext::store_one(static_cast<bnext::Float16*>(p), value);
  }
}

// Where a tensor lies: strides, elements before its first one, and the kind of memory.
struct Where {
  Size stride;
  int64_t offset;
  Place place;
};

class Tensor {
 public:
  // `missing` elements at the end are not there: only to show that this is noticed.
  Tensor(const Size& size, DType dtype, const Where& where, int64_t missing = 0)
      : size_(size), dtype_(dtype), where_(where), element_bytes_(bnext::dtype_bytes(dtype)) {
    int64_t last = where.offset;
    for (int d = 0; d < 4; ++d) last += (size[d] - 1) * where.stride[d];
    memory_ = std::make_shared<Memory>((last + 1 - missing) * element_bytes_, where.place);
  }

  DType dtype() const { return dtype_; }
  const Where& where() const { return where_; }
  void* data() const { return memory_->data() + where_.offset * element_bytes_; }
  bnext::TensorLayout layout() const { return {data(), where_.stride}; }

  // Elements in the order of N, C, H, W, whatever the layout.
  std::vector<double> values() const {
    std::vector<double> all;
    for_each([&](unsigned char* p) { all.push_back(load(dtype_, p)); });
    return all;
  }
  void fill(const std::vector<double>& values) {
    auto next = values.begin();
    for_each([&](unsigned char* p) { store(dtype_, p, *next++); });
  }

  // All bytes that are no element of the tensor are as they were.
  bool surroundings_intact() const {
    std::vector<bool> inside(memory_->num_bytes());
    for_each([&](unsigned char* p) {
      for (int64_t i = 0; i < element_bytes_; ++i) inside[p - memory_->data() + i] = true;
    });
    for (int64_t i = 0; i < memory_->num_bytes(); ++i) {
      if (!inside[i] && memory_->data()[i] != kFill) return false;
    }
    return true;
  }
  std::vector<unsigned char> bytes() const { return {memory_->data(), memory_->data() + memory_->num_bytes()}; }

 private:
  template <typename F>
  void for_each(F f) const {
    auto* first = static_cast<unsigned char*>(data());
    for (int64_t n = 0; n < size_[0]; ++n) {
      for (int64_t c = 0; c < size_[1]; ++c) {
        for (int64_t h = 0; h < size_[2]; ++h) {
          for (int64_t w = 0; w < size_[3]; ++w) {
            f(first + element_bytes_ *
                          (n * where_.stride[0] + c * where_.stride[1] + h * where_.stride[2] + w * where_.stride[3]));
          }
        }
      }
    }
  }

  Size size_;
  DType dtype_;
  Where where_;
  int64_t element_bytes_;
  std::shared_ptr<Memory> memory_;
};

// One number per channel: a tensor of size 1, C, 1, 1. Without a tensor, a null ChannelVector.
inline bnext::ChannelVector channel_vector(const std::shared_ptr<Tensor>& t) {
  if (t == nullptr) return {};
  return {t->data(), t->where().stride[1], t->dtype()};
}

}  // namespace sanitize
