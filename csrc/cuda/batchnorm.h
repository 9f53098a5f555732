// Batch norm on CUDA devices: both passes, training and eval, on the current stream of the device.
#pragma once

#include <c10/core/Device.h>

#include <string>

#include "../problem.h"

namespace bnext::cuda {

void forward(const ForwardProblem& problem, at::Device device);
void backward(const BackwardProblem& problem, at::Device device);

// Which kernels a training step of this geometry gets, in words.
std::string explain(const Geometry& geometry, at::Device device);

}  // namespace bnext::cuda
