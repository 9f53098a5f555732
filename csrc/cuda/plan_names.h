// What people may say of a plan by name: kinds of device, families, and what environment variables ask for.
// Plain C++, in every build: a machine without a GPU can show what another one would run.
#pragma once

#include <map>
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

// The constants of the model by which plans are compared, by name, and other values for some of them. Throws
// std::runtime_error where there is none of that name.
std::map<std::string, double> cost_fields(const Costs& costs);
void set_costs(const std::map<std::string, double>& fields, Costs& costs);

// Every family that can be forced, in the order of plan.h: not kAuto.
std::vector<Family> all_families();

// Throws std::runtime_error when no family has that name; `source` is what the error calls it.
Family family_named(const std::string& name, const std::string& source);

// What the environment says: read by the first call, and again by read_environment(). Not by every call: it would take
// its time, and Python's threads may be changing the environment meanwhile. BNEXT_CUDA_FAMILY: the family that all
// take, for tests and measurements. BNEXT_CUDA_GRID, 0 or 1: whether kAuto may choose grid. BNEXT_CUDA_PERSISTENT, 0, 1
// or always: whether blocks are persistent, in every family. Without them: yes, unless WORLD_SIZE says that there are
// several processes. BNEXT_CUDA_REGISTERS, 0, 1 or always: as Limits says. BNEXT_CUDA_OVERLAP, 0 or 1: whether kernels
// of a pass may overlap. BNEXT_CUDA_LATE, 0 or 1: whether blocks may begin late. BNEXT_CUDA_EARLY, 0 or 1: whether
// they may ask L2 for a later slab. BNEXT_CUDA_TEAM, BNEXT_CUDA_THREADS and BNEXT_CUDA_ROW_BYTES: numbers, as
// Limits says. Throws std::runtime_error when they say anything else.
Limits limits_of_environment();
void read_environment();

}  // namespace bnext::cuda
