// One case: sizes, layouts, offsets, options and data, all drawn from its number.
#pragma once

#include <cinttypes>
#include <string>

#include "tensor.h"

namespace sanitize {

// Small, and the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x1234567) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  int64_t below(int64_t count) { return static_cast<int64_t>((next() >> 11) % static_cast<uint64_t>(count)); }
  bool one_in(int64_t count) { return below(count) == 0; }
  // In [-1, 1], and in the shape of a hill.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-52 - 1; }
  double hill() { return uniform() + uniform() + uniform(); }

 private:
  uint64_t state_;
};

enum class Layout {
  kNchw,
  kNhwc,
  kCropped,
  kCroppedNhwc,
  kEveryOtherColumn,
  kEveryOtherChannel,
  kTransposedNc,
  kChwn,
  kExpanded,  // inputs only: all images are the same one
  kCount
};
constexpr const char* kLayoutNames[] = {"nchw",          "nhwc",          "cropped", "cropped_nhwc", "sliced_w",
                                        "sliced_c_nhwc", "transposed_nc", "chwn",    "expanded"};
constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};

Size strides(Layout layout, const Size& size) {
  const int64_t n = size[0], c = size[1], h = size[2], w = size[3];
  switch (layout) {
    case Layout::kNhwc:
      return {h * w * c, 1, w * c, c};
    case Layout::kCropped:
      return {(c + 1) * (h + 2) * (w + 2), (h + 2) * (w + 2), w + 2, 1};
    case Layout::kCroppedNhwc:
      return {(h + 2) * (w + 2) * (c + 1), 1, (w + 2) * (c + 1), c + 1};
    case Layout::kEveryOtherColumn:
      return {c * h * (2 * w + 1), h * (2 * w + 1), 2 * w + 1, 2};
    case Layout::kEveryOtherChannel:
      return {h * w * 2 * c, 2, w * 2 * c, 2 * c};
    case Layout::kTransposedNc:
      return {h * w, n * h * w, w, 1};
    case Layout::kChwn:
      return {1, h * w * n, w * n, n};
    case Layout::kExpanded:
      return {0, h * w, w, 1};
    default:
      return {c * h * w, h * w, w, 1};
  }
}

using MaybeTensor = std::shared_ptr<Tensor>;

// What one case is given. Nothing of it changes, so several threads may run the same case.
struct Case {
  Size size;
  DType dtype, parameter_dtype;
  bool training, cumulative, in_place;
  double momentum = 0.1, eps = 1e-5;
  int64_t missing = 0;  // see Tensor
  Where where_x, where_dy, where_y, where_dx;
  bool wants_y, wants_dx, wants_parameters[4];
  int64_t parameter_stride;
  MaybeTensor x, dy, weight, bias, running_mean, running_var;
  std::string label;

  Tensor parameter(DType dtype_of_it) const {
    return {{1, size[1], 1, 1}, dtype_of_it, {{0, parameter_stride, 0, 0}, 0, Place::kHeap}};
  }
};

class CaseMaker {
 public:
  explicit CaseMaker(int64_t number) : number_(number), random_(number + 1) {}

  Case make(const Size& size, DType dtype, Layout layout, bool training, Place place) {
    Case made;
    made.size = size;
    made.dtype = dtype;
    made.training = training;
    made.cumulative = random_.one_in(4);
    const bool same = dtype == DType::kFloat64 || random_.one_in(2);
    made.parameter_dtype = same ? dtype : DType::kFloat32;
    made.parameter_stride = random_.one_in(3) ? 2 : 1;
    // Mostly all tensors have one layout; else the kernels take them one element at a time.
    auto other = [&](int64_t last) { return random_.one_in(4) ? static_cast<Layout>(random_.below(last)) : layout; };
    auto output = [&] {
      const Layout wanted = other(static_cast<int64_t>(Layout::kExpanded));
      return wanted == Layout::kExpanded ? Layout::kNchw : wanted;
    };
    made.where_x = where(layout, size, place);
    const Layout layout_dy = other(static_cast<int64_t>(Layout::kCount));
    made.where_dy = where(layout_dy, size, place);
    made.where_y = where(output(), size, place);
    made.where_dx = where(output(), size, place);
    made.in_place = layout_dy != Layout::kExpanded && random_.one_in(3);
    made.wants_y = !random_.one_in(8);
    made.wants_dx = !random_.one_in(6);
    for (bool& wanted : made.wants_parameters) wanted = !random_.one_in(3);

    std::vector<double> x, dy;
    std::vector<double> mean(size[1]), deviation(size[1]);
    for (int64_t c = 0; c < size[1]; ++c) mean[c] = 2 * random_.uniform(), deviation[c] = 1.25 + random_.uniform();
    for (int64_t i = 0; i < size[0] * size[1] * size[2] * size[3]; ++i) {
      const int64_t c = i / (size[2] * size[3]) % size[1];
      x.push_back(mean[c] + deviation[c] * random_.hill());
      dy.push_back(random_.hill() + 0.1);
    }
    made.x = tensor(size, dtype, made.where_x, x);
    made.dy = tensor(size, dtype, made.where_dy, dy);
    auto parameter = [&](bool wanted, double middle) {
      if (!wanted) return MaybeTensor();
      auto t = std::make_shared<Tensor>(made.parameter(made.parameter_dtype));
      std::vector<double> values(size[1]);
      for (double& v : values) v = middle + 0.5 * random_.uniform();
      t->fill(values);
      return t;
    };
    made.weight = parameter(!random_.one_in(4), 1);
    made.bias = parameter(!random_.one_in(4), 0);
    const bool running = !training || !random_.one_in(3);
    made.running_mean = parameter(running, 0);
    made.running_var = parameter(running, 1.5);

    char text[256];
    std::snprintf(text, sizeof text,
                  "--case %" PRId64 ": %" PRId64 "x%" PRId64 "x%" PRId64 "x%" PRId64 " %s %s, dy %s, offsets %" PRId64
                  " %" PRId64 " %" PRId64 " %" PRId64 ", place %d, %s%s",
                  number_, size[0], size[1], size[2], size[3], bnext::dtype_name(dtype),
                  kLayoutNames[static_cast<int>(layout)], kLayoutNames[static_cast<int>(layout_dy)],
                  made.where_x.offset, made.where_dy.offset, made.where_y.offset, made.where_dx.offset,
                  static_cast<int>(place), training ? "training" : "eval", made.in_place ? ", in place" : "");
    made.label = text;
    return made;
  }

 private:
  // Every distance from an aligned address, in elements: nearest to it as often as not.
  Where where(Layout layout, const Size& size, Place place) {
    return {strides(layout, size), random_.one_in(3) ? 0 : random_.below(16), place};
  }
  static MaybeTensor tensor(const Size& size, DType dtype, const Where& where, const std::vector<double>& values) {
    auto t = std::make_shared<Tensor>(size, dtype, where);
    t->fill(values);
    return t;
  }

  int64_t number_;
  Random random_;
};

}  // namespace sanitize
