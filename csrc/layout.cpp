#include "layout.h"

#include <algorithm>

namespace bnext {
namespace {

struct ReduceDim {
  int64_t size;
  std::array<int64_t, 3> stride;  // one per tensor; batch norm never has more than x, dy, dx
  int64_t weight;                 // sum of strides over the tensors: the larger, the further out
};

}  // namespace

Geometry make_geometry(const std::array<int64_t, 4>& size, DType dtype, std::initializer_list<TensorLayout> tensors,
                       std::initializer_list<View*> views) {
  const int num_tensors = static_cast<int>(tensors.size());
  const TensorLayout* tensor = tensors.begin();

  // Dimensions of size 1 have no order; the rest go by stride.
  std::array<ReduceDim, kReduceDims> dims;
  int num_dims = 0;
  for (int d : {0, 2, 3}) {
    if (size[d] == 1) continue;
    ReduceDim dim{size[d], {0, 0, 0}, 0};
    for (int t = 0; t < num_tensors; ++t) {
      dim.stride[t] = tensor[t].stride[d];
      dim.weight += tensor[t].stride[d];
    }
    dims[num_dims++] = dim;
  }
  std::stable_sort(dims.begin(), dims.begin() + num_dims,
                   [](const ReduceDim& a, const ReduceDim& b) { return a.weight > b.weight; });

  // Merge an outer dimension into the next inner one where every tensor steps over it evenly.
  int num_merged = 0;
  for (int d = 0; d < num_dims; ++d) {
    bool merge = num_merged > 0;
    for (int t = 0; merge && t < num_tensors; ++t) {
      merge = dims[num_merged - 1].stride[t] == dims[d].stride[t] * dims[d].size;
    }
    if (merge) {
      dims[d].size *= dims[num_merged - 1].size;
      dims[num_merged - 1] = dims[d];
    } else {
      dims[num_merged++] = dims[d];
    }
  }

  Geometry geometry;
  geometry.num_channels = size[1];
  geometry.dtype = dtype;
  const int first = kReduceDims - num_merged;
  for (int d = 0; d < num_merged; ++d) geometry.size[first + d] = dims[d].size;

  int64_t inner_stride = 0, channel_stride = 0;
  bool unit_planes = true, unit_rows = size[1] > 1;  // a row of one channel is none
  for (int t = 0; t < num_tensors; ++t) {
    View& view = *views.begin()[t];
    view.data = tensor[t].data;
    view.stride_c = tensor[t].stride[1];
    for (int d = 0; d < kReduceDims; ++d) view.stride[d] = d < first ? 0 : dims[d - first].stride[t];
    const int64_t inner = geometry.size[kReduceDims - 1] == 1 ? 1 : view.stride[kReduceDims - 1];
    inner_stride += inner;
    channel_stride += view.stride_c;
    unit_planes = unit_planes && inner == 1;
    unit_rows = unit_rows && view.stride_c == 1;
  }
  // A single position per channel would make "planes" of one element: rows, if channels are adjacent.
  const bool prefer_rows = unit_rows && geometry.size[kReduceDims - 1] == 1;
  if (unit_planes && !prefer_rows) {
    geometry.walk = Walk::kPlanes;
  } else if (unit_rows) {
    geometry.walk = Walk::kRows;
  } else {
    geometry.unit_stride = false;
    geometry.walk = channel_stride < inner_stride && size[1] > 1 ? Walk::kRows : Walk::kPlanes;
  }
  return geometry;
}

}  // namespace bnext
