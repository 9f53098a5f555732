// Plans that this thread has made before: one takes some ten microseconds, and a network asks for the same ones again
// and again.
#pragma once

#include <cstddef>

#include "plan.h"

namespace bnext::cuda {

// make_plan(request, info, limits). `info` is of the device with this number, and always the same. The plan stays where
// it is until the thread asks for another one.
const Plan& cached_plan(const Request& request, int device, const DeviceInfo& info, const Limits& limits);

// How many of them the thread has.
size_t count_cached_plans();

}  // namespace bnext::cuda
