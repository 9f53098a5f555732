// What batch norm should give, by plain float64 loops, each number with a bar: how far off an implementation may be
// that sums in float64 (16-bit elements: groups of eight in float32) and does elementwise work in float32 or, for
// float64, float64.
#pragma once

#include <algorithm>
#include <cfloat>

#include "tensor.h"

namespace sanitize {

struct Expected {
  std::vector<double> value, bar;

  void add(double v, double b) {
    value.push_back(v);
    bar.push_back(b);
  }
  // The first index at which `got` is not within the bar, or -1.
  int64_t mismatch(const std::vector<double>& got) const {
    for (size_t i = 0; i < value.size(); ++i) {
      if (!(std::abs(got[i] - value[i]) <= bar[i])) return static_cast<int64_t>(i);
    }
    return -1;
  }
};

// Half a unit in the last place of a dtype relative to a number in it, and its smallest number.
inline double rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return DBL_EPSILON / 2;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kBFloat16:
      return 0x1p-8;
    default:
      return 0x1p-11;
  }
}
inline double smallest(DType dtype) {
  return dtype == DType::kFloat64 ? 0x1p-1074 : dtype == DType::kFloat16 ? 0x1p-24 : 0x1p-133;
}
inline double rounded_bar(DType dtype, double value) { return rounding(dtype) * std::abs(value) + smallest(dtype); }

// Everything a channel's results follow from. Absent weight, bias: 1 and 0.
struct Channel {
  double weight = 1, bias = 0;
  double mean = 0, var = 1, invstd = 1;
  double mean_bar = 0, var_bar = 0;
};

class Oracle {
 public:
  Oracle(const Size& size, DType dtype, std::vector<double> x) : size_(size), dtype_(dtype), x_(std::move(x)) {}

  int64_t num_values() const { return size_[0] * size_[2] * size_[3]; }

  // Mean and variance of the batch.
  void find_statistics(int64_t c, Channel& channel) const {
    const double m = static_cast<double>(num_values()), pivot = x_[index(c, 0)];
    double sum = 0, sum_abs = 0, sum_far = 0, sum_squares = 0;
    for (int64_t i = 0; i < num_values(); ++i) {
      const double d = x_[index(c, i)] - pivot;
      sum += d;
      sum_abs += std::abs(d);
      sum_far += d * d;
    }
    channel.mean = pivot + sum / m;
    for (int64_t i = 0; i < num_values(); ++i) sum_squares += std::pow(x_[index(c, i)] - channel.mean, 2);
    channel.var = sum_squares / m;
    channel.mean_bar = sum_rounding() * sum_abs / m + 2 * rounded_bar(DType::kFloat64, channel.mean);
    channel.var_bar = 4 * sum_rounding() * sum_far / m;
  }

  Expected forward(const std::vector<Channel>& channels, double eps) const {
    Expected y;
    for (int64_t k = 0; k < static_cast<int64_t>(x_.size()); ++k) {
      const Channel& c = channels[channel_of(k)];
      const double scale = c.weight * c.invstd, xmu = x_[k] - c.mean, value = xmu * scale + c.bias;
      const double from_statistics = std::abs(scale) * (c.mean_bar + std::abs(xmu) * c.var_bar / (c.var + eps));
      // A mean within one deviation of 0 may be part of the constant term instead.
      const double near_zero = std::abs(c.weight) * std::min(std::abs(c.mean) * c.invstd, 1.0);
      const double terms = std::abs(xmu * scale) + std::abs(c.bias) + near_zero;
      const double from_arithmetic = 6 * compute_rounding() * terms;
      y.add(value, from_statistics + from_arithmetic + rounded_bar(dtype_, value));
    }
    return y;
  }

  struct Backward {
    Expected dx, dweight, dbias, dmean, dvar;
  };

  Backward backward(const std::vector<Channel>& channels, const std::vector<double>& dy, DType parameter_dtype,
                    bool training) const {
    Backward out;
    const double m = static_cast<double>(num_values());
    std::vector<double> scale_x(channels.size()), shift(channels.size()), sums_bar(channels.size());
    std::vector<double> shift_bar(channels.size());
    for (int64_t c = 0; c < size_[1]; ++c) {
      const Channel& channel = channels[c];
      // The kernel's pivot may have 16 bits, as x: then x - pivot is larger than x - mean, but by no more than this.
      const double off = dtype_bytes(dtype_) == 2 ? rounded_bar(dtype_, channel.mean) : 0;
      double sum_dy = 0, sum_abs = 0, sum_dy_xmu = 0, sum_abs_xmu = 0;
      for (int64_t i = 0; i < num_values(); ++i) {
        const double d = dy[index(c, i)], xmu = x_[index(c, i)] - channel.mean;
        sum_dy += d;
        sum_abs += std::abs(d);
        sum_dy_xmu += d * xmu;
        sum_abs_xmu += std::abs(d) * (std::abs(xmu) + off);
      }
      const double dy_bar = sum_rounding() * sum_abs, dy_xmu_bar = sum_rounding() * sum_abs_xmu + off * dy_bar;
      const double scale = channel.weight * channel.invstd, cube = scale * channel.invstd * channel.invstd;
      auto add = [&](Expected& to, double value, double bar) {
        to.add(value, bar + rounded_bar(parameter_dtype, value) + 8 * rounded_bar(DType::kFloat64, value));
      };
      add(out.dbias, sum_dy, dy_bar);
      add(out.dweight, sum_dy_xmu * channel.invstd, dy_xmu_bar * channel.invstd);
      add(out.dmean, -scale * sum_dy, std::abs(scale) * dy_bar);
      add(out.dvar, -0.5 * cube * sum_dy_xmu, 0.5 * std::abs(cube) * dy_xmu_bar);
      if (!training) continue;
      scale_x[c] = -cube * sum_dy_xmu / m;
      shift[c] = -scale * sum_dy / m;
      sums_bar[c] = std::abs(cube) * dy_xmu_bar / m;
      shift_bar[c] = std::abs(scale) * dy_bar / m;
    }
    for (int64_t k = 0; k < static_cast<int64_t>(x_.size()); ++k) {
      const int64_t c = channel_of(k);
      const double from_dy = channels[c].weight * channels[c].invstd * dy[k], xmu = x_[k] - channels[c].mean;
      const double value = from_dy + scale_x[c] * xmu + shift[c];
      const double terms = std::abs(from_dy) + std::abs(scale_x[c] * xmu) + std::abs(shift[c]);
      const double from_sums = sums_bar[c] * std::abs(xmu) + shift_bar[c];
      out.dx.add(value, from_sums + 8 * compute_rounding() * terms + rounded_bar(dtype_, value));
    }
    return out;
  }

 private:
  int64_t plane() const { return size_[2] * size_[3]; }
  int64_t index(int64_t c, int64_t i) const { return (i / plane() * size_[1] + c) * plane() + i % plane(); }
  int64_t channel_of(int64_t k) const { return k / plane() % size_[1]; }

  // The kernel's sum and this one, of as many terms, relative to the sum of their absolute values.
  double sum_rounding() const {
    const double in_groups = dtype_bytes(dtype_) == 2 ? 16 * 0x1p-24 : 0;
    return 2 * (static_cast<double>(num_values()) + 16) * rounding(DType::kFloat64) + in_groups;
  }
  double compute_rounding() const { return dtype_ == DType::kFloat64 ? rounding(dtype_) : 0x1p-24; }

  Size size_;
  DType dtype_;
  std::vector<double> x_;
};

}  // namespace sanitize
