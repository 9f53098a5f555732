// From a problem and its plan to kernels on a stream. Plain pointers: no torch. Never waits for the device.
#pragma once

#include "device/portability.cuh"
#include "plan.h"

namespace bnext::cuda {

// `workspace` holds plan.workspace_bytes, 16-byte aligned, until the stream has passed this point.
cudaError_t launch(const ForwardProblem& problem, const Plan& plan, void* workspace, cudaStream_t stream);
cudaError_t launch(const BackwardProblem& problem, const Plan& plan, void* workspace, cudaStream_t stream);

// How many clusters of on-chip blocks with so much shared memory can run at once on the current device. 0 where they
// cannot run, for whatever reason: a size that the device does not have is no error.
int ask_active_clusters(int cluster, int64_t shared_bytes);
// How many blocks an SM of it has room for that have one of `blocks` parts of an on-chip block's threads, and this
// memory.
int ask_active_blocks(int blocks, int64_t shared_bytes);
// Whether kernels may overlap on the current device.
bool can_overlap();

}  // namespace bnext::cuda
