// What one batch-norm pass works on, as plain data: sizes, strides, dtypes and raw pointers.
// Owns no memory and knows nothing of torch, so that kernels (and their tests) need no torch headers.
#pragma once

#include <cstdint>

namespace bnext {

enum class DType : uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "?";
}

inline int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Which index runs innermost: positions of one channel (NCHW) or channels of one position (NHWC).
enum class Walk : uint8_t { kPlanes, kRows };

constexpr int kReduceDims = 3;

// Batch norm reduces over N, H and W, and does not care in which order. layout.h sorts those three by stride and
// merges neighbours, so kernels see C channels times size[0] x size[1] x size[2] positions, outermost first:
// NCHW is {1, N, H*W}, channels_last {1, 1, N*H*W}, a slice may need all three.
struct Geometry {
  int64_t num_channels = 0;
  int64_t size[kReduceDims] = {1, 1, 1};
  Walk walk = Walk::kPlanes;
  // Every tensor has stride 1 along the innermost index of the walk.
  bool unit_stride = true;
  DType dtype = DType::kFloat32;

  int64_t num_positions() const { return size[0] * size[1] * size[2]; }
};

// A tensor seen through a Geometry. Strides are in elements. data may be null: not given, or not asked for.
struct View {
  void* data = nullptr;
  int64_t stride_c = 0;
  int64_t stride[kReduceDims] = {0, 0, 0};
};

// One number per channel, of any supported dtype.
struct ChannelVector {
  void* data = nullptr;
  int64_t stride = 1;
  DType dtype = DType::kFloat32;
};

// x -> y, and the statistics it was done with. y.data null: statistics only.
struct ForwardProblem {
  Geometry geometry;
  View x, y;
  ChannelVector weight, bias;               // null: 1 and 0
  ChannelVector running_mean, running_var;  // null: not kept
  int64_t* num_batches_tracked = nullptr;   // incremented in training when given
  ChannelVector mean, invstd;               // outputs, always given
  ChannelVector stats_mean, stats_var;      // outputs: the mean and variance that were used, for the caller
  bool training = true;                     // statistics of x; otherwise running_mean and running_var
  bool cumulative = false;                  // momentum is 1 / num_batches_tracked
  double momentum = 0.1;
  double eps = 1e-5;
  // A channel whose running statistics would leave +-this keeps its old ones; NaN does, too. 0: whatever comes is
  // stored.
  double running_limit = 0;
};

// dy, x -> the five derivatives. A null output is not computed. dx may be dy itself, in place: kernels read an element
// of dy for the last time before they write that of dx, in the same thread.
struct BackwardProblem {
  Geometry geometry;
  View x, dy, dx;
  ChannelVector weight;               // null: 1
  ChannelVector mean, invstd;         // what the forward pass used
  ChannelVector grad_mean, grad_var;  // what reaches mean and var past y; null: 0
  ChannelVector dweight, dbias, dmean, dvar;
  bool training = true;  // mean and invstd depend on x; otherwise they are constants
};

}  // namespace bnext
