// The two passes of batch norm: sums, the few numbers per channel that follow from them, and the elementwise half.
#include "batchnorm.h"

#include <algorithm>
#include <cmath>

#include "half.h"
#include "partition.h"

namespace bnext::cpu {
namespace {

double load_channel(const ChannelVector& v, int64_t c, double otherwise) {
  if (v.data == nullptr) return otherwise;
  switch (v.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(v.data)[c * v.stride];
    case DType::kFloat32:
      return static_cast<const float*>(v.data)[c * v.stride];
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(v.data)[c * v.stride]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(v.data)[c * v.stride]);
  }
  return otherwise;
}

void store_channel(const ChannelVector& v, int64_t c, double value) {
  if (v.data == nullptr) return;
  switch (v.dtype) {
    case DType::kFloat64:
      static_cast<double*>(v.data)[c * v.stride] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(v.data)[c * v.stride] = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(v.data)[c * v.stride] = to_bfloat16(static_cast<float>(value));
      break;
    case DType::kFloat16:
      static_cast<Float16*>(v.data)[c * v.stride] = to_float16(static_cast<float>(value));
      break;
  }
}

// Where backward sums are centred: the mean, or what 16 bits have next to it; see KernelTable. A running mean may be
// beyond all that a float16 can be.
double backward_pivot(DType dtype, double mean) {
  constexpr double kMaxFloat16 = 65504;
  if (dtype == DType::kBFloat16) return to_float(to_bfloat16(static_cast<float>(mean)));
  if (dtype != DType::kFloat16) return mean;
  return to_float(to_float16(static_cast<float>(std::clamp(mean, -kMaxFloat16, kMaxFloat16))));
}

// Where shifted sums begin: any element of the channel is near enough to the mean for float64 sums. For float32 sums,
// of 16-bit elements, it must not be an outlier, so it is the median of the first, the middle and the last one.
class ForwardPivots {
 public:
  ForwardPivots(const Geometry& g, const View& x) : x_(x), dtype_(g.dtype) {
    const int64_t m = g.num_positions(), position[3] = {0, m / 2, m - 1};
    for (int k = 0; k < (is_half() ? 3 : 1); ++k) {
      const int64_t i2 = position[k] % g.size[2], row = position[k] / g.size[2];
      offset_[k] = row / g.size[1] * x.stride[0] + row % g.size[1] * x.stride[1] + i2 * x.stride[2];
    }
  }
  double operator()(int64_t c) const {
    const double first = element(c, 0);
    if (!is_half()) return first;
    const double middle = element(c, 1), last = element(c, 2);
    return std::max(std::min(first, middle), std::min(std::max(first, middle), last));
  }

 private:
  bool is_half() const { return dtype_bytes(dtype_) == 2; }
  double element(int64_t c, int k) const {
    const int64_t offset = (c * x_.stride_c + offset_[k]) * dtype_bytes(dtype_);
    const double value = load_channel({static_cast<char*>(x_.data) + offset, 1, dtype_}, 0, 0);
    return std::isfinite(value) ? value : 0.0;
  }

  const View& x_;
  DType dtype_;
  int64_t offset_[3] = {0, 0, 0};
};

// Numbers of channels, as a table's kernels want them: repeated for folded rows.
class ChannelNumbers {
 protected:
  ChannelNumbers(const Partition& p, const KernelTable& table, int count)
      : table_(table),
        channels_(p.num_channels()),
        wide_(p.wide_channels()),
        width_(p.array_width()),
        array_(count * width_) {
    std::fill_n(array_.data(), count * width_, 0.0);
  }

  // Calls f(slot) for every place that channel c has.
  template <typename F>
  void for_each_slot(int64_t c, F f) {
    for (int64_t i = c; i < wide_; i += channels_) f(slot(i, table_.split));
  }

  const KernelTable& table_;
  int64_t channels_, wide_, width_;
  AlignedArray array_;
};

class Pivots : public ChannelNumbers {
 public:
  Pivots(const Partition& p, const KernelTable& table) : ChannelNumbers(p, table, 1), values_(p.num_channels()) {}
  void set(int64_t c, double value) {
    values_[c] = value;
    for_each_slot(c, [&](int64_t i) { table_.set_pivot(array_.data(), i, value); });
  }
  double operator[](int64_t c) const { return values_[c]; }
  const void* data() { return array_.data(); }

 private:
  std::vector<double> values_;
};

class AllCoefficients : public ChannelNumbers {
 public:
  AllCoefficients(const Partition& p, const KernelTable& table) : ChannelNumbers(p, table, CoefficientArrays::kCount) {}
  void set(int64_t c, const Coefficients& value) {
    for_each_slot(c, [&](int64_t i) { table_.set_coefficients(array_.data(), width_, i, value); });
  }
  CoefficientArrays arrays() { return {array_.data(), width_}; }
};

// Reduce, finish each channel, apply: with all of a few channels on one thread where that fills the cores, which keeps
// them in cache. What is applied first is what the sums have read last.
template <int kNumSums, typename Reduce, typename Finish, typename Apply>
void reduce_then_apply(const Partition& p, ChannelSums<kNumSums>& sums, int num_passes, Reduce reduce, Finish finish,
                       const Apply* apply) {
  if (p.channel_by_channel()) {
    p.parallel(p.num_channel_blocks(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Block channels = p.block(i, 0);
        for (int pass = 0; pass < num_passes; ++pass) {
          sums.reduce_channels(i, reduce);
          for (int64_t c = channels.channel_begin; c < channels.channel_end; ++c) finish(c, pass);
        }
        if (apply == nullptr) continue;
        ElementwiseOptions options;
        if (i + 1 < end) {
          const Block next = p.block(i + 1, 0);
          options.next_begin = next.channel_begin, options.next_end = next.channel_end;
        }
        for (int64_t k = 0; k < p.num_chunks(); ++k) {
          p.for_each_part(p.block(i, p.num_chunks() - 1 - k), [&](const Geometry& g, const Block& block, int64_t fold) {
            (*apply)(g, block, fold, options);
          });
        }
      }
    });
    return;
  }
  for (int pass = 0; pass < num_passes; ++pass) {
    sums.reduce_all(reduce);
    p.for_each_channel([&](int64_t c) { finish(c, pass); });
  }
  if (apply != nullptr) {
    p.for_each_block(true, [&](const Block& block, int64_t) { p.for_each_part(block, *apply); });
  }
}

}  // namespace

void forward(const ForwardProblem& problem) {
  const Geometry g = choose_walk(problem.geometry, {&problem.x, &problem.y});
  const Partition p(g, {&problem.x, &problem.y}, problem.training);
  const KernelTable& table = kernel_table(current_isa(), g);
  const double m = static_cast<double>(g.num_positions());

  AllCoefficients coefficients(p, table);
  auto set_coefficients = [&](int64_t c, double mean, double var) {
    const double invstd = 1 / std::sqrt(var + problem.eps);
    store_channel(problem.stats_mean, c, mean);
    store_channel(problem.stats_var, c, var);
    store_channel(problem.mean, c, mean);
    store_channel(problem.invstd, c, invstd);
    const double scale = load_channel(problem.weight, c, 1) * invstd;
    // Around the mean nothing cancels. Near 0 there is little to cancel, and x - 0 is not rounded.
    const double centre = std::abs(mean) * invstd < 1 ? 0 : mean;
    coefficients.set(c, {centre, scale, load_channel(problem.bias, c, 0) - (mean - centre) * scale});
  };
  auto apply = [&](const Geometry& part, const Block& block, int64_t fold, ElementwiseOptions options = {}) {
    options.stream = p.stream(), options.in_order = p.planes_in_order();
    table.normalize(part, fold_view(problem.x, fold), fold_view(problem.y, fold), block, coefficients.arrays(),
                    options);
  };
  const bool has_output = problem.y.data != nullptr;

  if (!problem.training) {
    p.for_each_channel([&](int64_t c) {
      set_coefficients(c, load_channel(problem.running_mean, c, 0), load_channel(problem.running_var, c, 1));
    });
    if (has_output) p.for_each_block(false, [&](const Block& block, int64_t) { p.for_each_part(block, apply); });
    return;
  }

  // Shifted sums, never E[x^2] - E[x]^2. For float64 a second pass shifts by the mean itself, which the corrected
  // two-pass algorithm asks for; for the others float64 sums have bits to spare.
  const int num_passes = g.dtype == DType::kFloat64 ? 2 : 1;
  Pivots pivot(p, table);
  const ForwardPivots first_pivot(g, problem.x);
  p.for_each_channel([&](int64_t c) { pivot.set(c, first_pivot(c)); });
  ChannelSums<2> sums(p, table.split, p.channel_by_channel() ? 1 : p.num_chunks());

  // From here on nothing fails: what belongs to the caller may be written.
  double momentum = problem.momentum;
  if (problem.num_batches_tracked != nullptr) {
    const int64_t count = ++*problem.num_batches_tracked;
    if (problem.cumulative) momentum = 1.0 / static_cast<double>(count);
  }
  auto reduce = [&](const Geometry& part, const Block& block, int64_t fold, double* out, int64_t width) {
    table.moments(part, fold_view(problem.x, fold), block, pivot.data(), out, out + width);
  };
  auto finish = [&](int64_t c, int pass) {
    const double shift = sums.total(0, c) / m;
    const double mean = pivot[c] + shift;
    if (pass + 1 < num_passes) {
      pivot.set(c, std::isfinite(mean) ? mean : 0);
      return;
    }
    const double sum_squares = sums.total(1, c) - sums.total(0, c) * shift;
    const double var = sum_squares < 0 ? 0 : sum_squares / m;
    set_coefficients(c, mean, var);
    if (problem.running_mean.data == nullptr) return;
    auto updated = [&](const ChannelVector& running, double value) {
      return momentum * value + (1 - momentum) * load_channel(running, c, 0);
    };
    const double new_mean = updated(problem.running_mean, mean);
    const double new_var = updated(problem.running_var, var * (m / (m - 1)));
    const double limit = problem.running_limit;
    if (limit > 0 && !(std::abs(new_mean) <= limit && std::abs(new_var) <= limit)) return;
    store_channel(problem.running_mean, c, new_mean);
    store_channel(problem.running_var, c, new_var);
  };
  reduce_then_apply(p, sums, num_passes, reduce, finish, has_output ? &apply : nullptr);
}

void backward(const BackwardProblem& problem) {
  const Geometry g = choose_walk(problem.geometry, {&problem.x, &problem.dy, &problem.dx});
  const KernelTable& table = kernel_table(current_isa(), g);
  const double inverse_m = 1 / static_cast<double>(g.num_positions());
  const bool has_dx = problem.dx.data != nullptr;
  const bool needs_sum_dy_xmu =
      (has_dx && problem.training) || problem.dweight.data != nullptr || problem.dvar.data != nullptr;
  const bool needs_sums = needs_sum_dy_xmu || problem.dbias.data != nullptr || problem.dmean.data != nullptr;
  if (!has_dx && !needs_sums) return;
  const Partition p(g, {&problem.x, &problem.dy, &problem.dx}, needs_sums);

  Pivots pivot(p, table);
  AllCoefficients coefficients(p, table);
  p.for_each_channel([&](int64_t c) {
    pivot.set(c, needs_sum_dy_xmu ? backward_pivot(g.dtype, load_channel(problem.mean, c, 0)) : 0);
    if (problem.training) return;
    // Mean and var are constants: dx = weight * invstd * dy.
    coefficients.set(c, {0, load_channel(problem.weight, c, 1) * load_channel(problem.invstd, c, 1), 0});
  });

  // Eval goes block by block whatever the shape, so it keeps the sums of every block, if it has any.
  const int64_t num_partials = !needs_sums ? 0 : p.channel_by_channel() && problem.training ? 1 : p.num_chunks();
  ChannelSums<2> sums(p, table.split, num_partials);
  auto reduce = [&](const Geometry& part, const Block& block, int64_t fold, double* out, int64_t width) {
    const View dy = fold_view(problem.dy, fold);
    if (needs_sum_dy_xmu) {
      table.backward_sums(part, fold_view(problem.x, fold), dy, block, pivot.data(), out, out + width);
    } else {  // only sum(dy): x is not read
      table.moments(part, dy, block, pivot.data(), out, out + width);
    }
  };
  auto finish = [&](int64_t c, int) {
    const double weight = load_channel(problem.weight, c, 1), invstd = load_channel(problem.invstd, c, 1);
    const double sum_dy = sums.total(0, c);
    const double mean = load_channel(problem.mean, c, 0);
    const double sum_dy_xmu = sums.total(1, c) + (pivot[c] - mean) * sum_dy;
    const double dweight = sum_dy_xmu * invstd;
    store_channel(problem.dbias, c, sum_dy);
    store_channel(problem.dweight, c, dweight);
    const double scale_dy = weight * invstd, grad_var = load_channel(problem.grad_var, c, 0);
    const double dvar = grad_var - 0.5 * scale_dy * invstd * invstd * sum_dy_xmu;
    // 2 * dvar without invstd * invstd * invstd, which is out of range long before this is.
    const double scale_x = 2 * grad_var - (scale_dy * invstd) * dweight;
    // The term of the paper with sum(x - mean) is zero: mean is the batch mean, or a constant.
    const double dmean = load_channel(problem.grad_mean, c, 0) - scale_dy * sum_dy;
    store_channel(problem.dvar, c, dvar);
    store_channel(problem.dmean, c, dmean);
    if (problem.training) coefficients.set(c, {mean, scale_x * inverse_m, dmean * inverse_m, scale_dy});
  };

  if (problem.training) {
    auto apply = [&](const Geometry& part, const Block& block, int64_t fold, ElementwiseOptions options = {}) {
      options.stream = p.stream();
      table.backward_apply(part, fold_view(problem.x, fold), fold_view(problem.dy, fold), fold_view(problem.dx, fold),
                           block, coefficients.arrays(), options);
    };
    reduce_then_apply(p, sums, 1, reduce, finish, has_dx ? &apply : nullptr);
    return;
  }

  // Eval: dx does not wait for the sums, so each block is read once for both.
  auto apply = [&](const Geometry& part, const Block& block, int64_t fold) {
    table.normalize(part, fold_view(problem.dy, fold), fold_view(problem.dx, fold), block, coefficients.arrays(),
                    {p.stream(), p.planes_in_order()});
  };
  p.for_each_block(false, [&](const Block& block, int64_t chunk) {
    if (needs_sums) sums.reduce_block(block, chunk, reduce);
    if (has_dx) p.for_each_part(block, apply);
  });
  if (!needs_sums) return;
  sums.merge();
  p.for_each_channel([&](int64_t c) { finish(c, 0); });
}

std::string explain(const Geometry& geometry, const View& x, const View& y) {
  const Geometry g = choose_walk(geometry, {&x, &y});
  std::string text = g.walk == Walk::kPlanes ? "planes" : "rows";
  if (g.walk == Walk::kPlanes) {
    text += g.unit_stride ? " (positions of a channel are adjacent, as in NCHW)" : " (strided positions)";
  } else {
    text += g.unit_stride ? " (channels of a position are adjacent, as in channels_last)" : " (strided channels)";
  }
  text += g.unit_stride ? std::string(", ") + isa_name(current_isa()) : ", one element at a time";
  return text;
}

}  // namespace bnext::cpu
