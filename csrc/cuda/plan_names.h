// What people may say of a plan by name: kinds of device, families, and the family that BNEXT_CUDA_FAMILY forces.
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

// What BNEXT_CUDA_FAMILY names, read at every call; kAuto where it is not set. For tests and measurements.
// Throws std::runtime_error when no family has that name.
Family forced_family();
// The same for any text; `source` is what the error calls it.
Family family_named(const std::string& name, const std::string& source);

}  // namespace bnext::cuda
