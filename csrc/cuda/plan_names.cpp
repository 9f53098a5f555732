#include "plan_names.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <stdexcept>

namespace bnext::cuda {
namespace {

constexpr int64_t kKiB = 1 << 10, kMiB = 1 << 20;

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool flag(const char* name, bool otherwise, const char* known = "0 or 1") {
  const std::string value = variable(name);
  if (!value.empty() && value != "0" && value != "1")
    throw std::runtime_error(std::string(name) + " should be " + known + ", not " + value);
  return value.empty() ? otherwise : value == "1";
}

// A number, which is one of those that are known if any are named; 0 where the variable is not set.
int number(const char* name, const char* known, std::initializer_list<int> numbers = {}) {
  const std::string value = variable(name);
  if (value.empty()) return 0;
  int result = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
  const bool whole = error == std::errc() && end == value.data() + value.size() && result > 0;
  if (whole && (numbers.size() == 0 || std::find(numbers.begin(), numbers.end(), result) != numbers.end()))
    return result;
  throw std::runtime_error(std::string(name) + " should be " + known + ", not " + value);
}

// Shared memory by architecture (CUDA programming guide, "Compute capabilities"); the rest by product.
NamedDevice device(const char* name, int arch, int num_sms, int64_t l2_bytes, double memory_gb_per_s,
                   std::initializer_list<int> active_clusters = {0, 0, 0, 0}) {
  DeviceInfo info;
  info.arch = arch;
  info.num_sms = num_sms;
  info.threads_per_sm = arch == 75 ? 1024 : arch == 80 || arch == 90 || arch == 100 ? 2048 : 1536;
  const int64_t shared_kib = arch == 75 ? 64 : arch == 80 ? 164 : arch == 90 || arch == 100 ? 228 : 100;
  info.shared_bytes_per_sm = shared_kib * kKiB;
  info.shared_bytes_opt_in = (arch == 75 ? shared_kib : shared_kib - 1) * kKiB;  // a block's own KiB is the system's
  info.l2_bytes = l2_bytes;
  info.overlaps = arch >= 90;
  info.memory_gb_per_s = memory_gb_per_s;
  std::copy(active_clusters.begin(), active_clusters.end(), info.active_clusters);
  return {name, info};
}

}  // namespace

const std::vector<NamedDevice>& named_devices() {
  // How many clusters run at once is for a device to say; where none has said it, it is a guess.
  static const std::vector<NamedDevice> devices = {
      device("t4", 75, 40, 4 * kMiB, 320),
      device("a100", 80, 108, 40 * kMiB, 1555),
      device("a10", 86, 72, 6 * kMiB, 600),
      device("rtx4090", 89, 128, 72 * kMiB, 1008),
      device("h100", 90, 132, 50 * kMiB, 3350, {66, 30, 15, 7}),           // as asked
      device("h200", 90, 132, 60 * kMiB, 4814, {66, 30, 15, 7}),           // as asked
      device("h200-portable", 90, 132, 60 * kMiB, 4800, {66, 32, 16, 0}),  // no clusters of 16
      device("h200-mig-1g", 90, 16, 6 * kMiB, 600, {8, 4, 1, 0}),
      device("b200", 100, 148, 126 * kMiB, 8000, {74, 36, 16, 8}),
      device("rtx5090", 120, 170, 96 * kMiB, 1792, {85, 40, 20, 0}),
  };
  return devices;
}

std::vector<std::pair<std::string, double>> device_fields(const DeviceInfo& info) {
  std::vector<std::pair<std::string, double>> fields = {
      {"arch", info.arch},
      {"num_sms", info.num_sms},
      {"threads_per_sm", info.threads_per_sm},
      {"shared_bytes_per_block", info.shared_bytes_per_block},
      {"l2_bytes", info.l2_bytes},
      {"shared_bytes_opt_in", info.shared_bytes_opt_in},
      {"shared_bytes_per_sm", info.shared_bytes_per_sm},
      {"registers_per_sm", info.registers_per_sm},
      {"cooperative", info.cooperative},
      {"overlaps", info.overlaps},
      {"memory_gb_per_s", info.memory_gb_per_s},
  };
  for (int i = 0; i < kNumClusterSizes; ++i) {
    fields.emplace_back("active_clusters_" + std::to_string(kClusterSizes[i]), info.active_clusters[i]);
  }
  return fields;
}

namespace {

constexpr std::pair<const char*, double Costs::*> kCosts[] = {
    {"launch_us", &Costs::launch_us},
    {"memory_share", &Costs::memory_share},
    {"reduction_us", &Costs::reduction_us},
    {"runs_reduction_us", &Costs::runs_reduction_us},
    {"rows_reduction_us", &Costs::rows_reduction_us},
    {"halves", &Costs::halves},
    {"cluster_us", &Costs::cluster_us},
    {"large_cluster_us", &Costs::large_cluster_us},
    {"meeting_us", &Costs::meeting_us},
    {"trip_us", &Costs::trip_us},
    {"partial_us", &Costs::partial_us},
    {"slow_partial_us", &Costs::slow_partial_us},
    {"handover_us", &Costs::handover_us},
    {"rows_handover_us", &Costs::rows_handover_us},
    {"apply_us", &Costs::apply_us},
    {"l2_time", &Costs::l2_time},
    {"l2_share", &Costs::l2_share},
    {"narrow_rows", &Costs::narrow_rows},
    {"busy_threads", &Costs::busy_threads},
    {"busy_threads_backward", &Costs::busy_threads_backward},
    {"busy_threads_planes", &Costs::busy_threads_planes},
    {"busy_threads_planes_backward", &Costs::busy_threads_planes_backward},
};
static_assert(std::size(kCosts) * sizeof(double) == sizeof(Costs), "each has a name");

}  // namespace

std::map<std::string, double> cost_fields(const Costs& costs) {
  std::map<std::string, double> fields;
  for (const auto& [name, field] : kCosts) fields[name] = costs.*field;
  return fields;
}

void set_costs(const std::map<std::string, double>& fields, Costs& costs) {
  for (const auto& [wanted, value] : fields) {
    const auto* found = std::find_if(std::begin(kCosts), std::end(kCosts),
                                     [&name = wanted](const auto& cost) { return name == cost.first; });
    if (found == std::end(kCosts)) throw std::runtime_error("the model of plans has no cost " + wanted);
    costs.*(found->second) = value;
  }
}

std::vector<Family> all_families() {
  std::vector<Family> families;
  for (int i = static_cast<int>(Family::kStreaming); i <= static_cast<int>(kLastFamily); ++i) {
    families.push_back(static_cast<Family>(i));
  }
  return families;
}

Family family_named(const std::string& name, const std::string& source) {
  Family family;
  if (parse_family(name, &family)) return family;
  std::string known = family_name(Family::kAuto);
  for (Family each : all_families()) known += (each == kLastFamily ? " or " : ", ") + std::string(family_name(each));
  throw std::runtime_error(source + " should be " + known + ", not " + name);
}

namespace {

Choice choice(const char* name, bool otherwise) {
  if (variable(name) == "always") return Choice::kAlways;
  return flag(name, otherwise, "0, 1 or always") ? Choice::kWhereFaster : Choice::kNever;
}

struct Environment {
  Limits limits;
  std::string error;
};

// Loaded and stored atomically.
std::shared_ptr<const Environment>& environment() {
  static auto* const found =
      new std::shared_ptr<const Environment>;  // never destroyed: threads may outlive static objects
  return *found;
}

Limits parse_environment() {
  Limits limits;
  const std::string family = variable("BNEXT_CUDA_FAMILY");
  if (!family.empty()) limits.family = family_named(family, "BNEXT_CUDA_FAMILY");
  // One of several processes will have kernels beside its own, that send gradients.
  const bool alone = std::atoi(variable("WORLD_SIZE").c_str()) <= 1;
  limits.grid = flag("BNEXT_CUDA_GRID", alone);
  limits.persistent = choice("BNEXT_CUDA_PERSISTENT", alone);
  limits.registers = choice("BNEXT_CUDA_REGISTERS", true);
  limits.overlap = flag("BNEXT_CUDA_OVERLAP", true);
  limits.late = flag("BNEXT_CUDA_LATE", true);
  limits.early = flag("BNEXT_CUDA_EARLY", true);
  limits.team = number("BNEXT_CUDA_TEAM", "a number of blocks");
  limits.exact_threads = number("BNEXT_CUDA_THREADS", "64, 128, 256 or 512", {64, 128, 256, 512});
  limits.row_bytes = number("BNEXT_CUDA_ROW_BYTES", "64 or 128", {64, 128});
  return limits;
}

}  // namespace

void read_environment() {
  auto found = std::make_shared<Environment>();
  try {
    found->limits = parse_environment();
  } catch (const std::runtime_error& error) {
    found->error = error.what();
  }
  std::atomic_store(&environment(), std::shared_ptr<const Environment>(std::move(found)));
}

Limits limits_of_environment() {
  if (std::atomic_load(&environment()) == nullptr) read_environment();
  const auto found = std::atomic_load(&environment());
  if (!found->error.empty()) throw std::runtime_error(found->error);
  return found->limits;
}

}  // namespace bnext::cuda
