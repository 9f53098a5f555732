// What people may say of a plan by name: kinds of device, families, and what environment variables ask for.
// Plain C++, in every build: a machine without a GPU can show what another one would run.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "plan.h"

namespace bnext::cuda {

struct NamedDevice {
  const char* name;
  DeviceInfo info;
};

// The kinds of device that plans are shown for and tested on. Figures are the vendor's; a real device is asked itself.
const std::vector<NamedDevice>& named_devices();

// What plans depend on, of a device, by name: for people and for measurements.
std::vector<std::pair<std::string, double>> device_fields(const DeviceInfo& info);

// Every family that can be forced, in the order of plan.h: not kAuto.
std::vector<Family> all_families();

// Throws std::runtime_error when no family has that name; `source` is what the error calls it.
Family family_named(const std::string& name, const std::string& source);

// What the environment says: read by the first call, and again by read_environment(). Not by every call: it would take its
// time, and Python's threads may be changing the environment meanwhile. BNEXT_CUDA_FAMILY names the family that all take, for
// tests and measurements. BNEXT_CUDA_GRID, 0 or 1, says whether kAuto may choose grid; without it, it may where WORLD_SIZE
// does not say that there are several processes; and BNEXT_CUDA_LOOPS the same of blocks and clusters that go on to further
// slabs, whichever family is asked for ("always": also where others would be faster). BNEXT_CUDA_LATE=0: no block begins late, for measurements.
// Throws std::runtime_error when they say anything else.
Limits limits_of_environment();
void read_environment();

}  // namespace bnext::cuda
