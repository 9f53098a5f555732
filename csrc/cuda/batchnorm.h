// Batch norm on CUDA devices: both passes, training and eval, on the current stream of the device.
#pragma once

#include <c10/core/Device.h>

#include "../problem.h"
#include "plan.h"

namespace bnext::cuda {

void forward(const ForwardProblem& problem, at::Device device);
void backward(const BackwardProblem& problem, at::Device device);

// What plans depend on, of a device that is there.
const DeviceInfo& device_info(at::Device device);

}  // namespace bnext::cuda
