#include "plan_names.h"

#include <cstdlib>
#include <stdexcept>

namespace bnext::cuda {
namespace {

DeviceInfo device(int arch, int num_sms, int threads_per_sm, int64_t l2_bytes) {
  DeviceInfo info;
  info.arch = arch;
  info.num_sms = num_sms;
  info.threads_per_sm = threads_per_sm;
  info.l2_bytes = l2_bytes;
  return info;
}

}  // namespace

const std::vector<NamedDevice>& named_devices() {
  constexpr int64_t kMiB = 1 << 20;
  static const std::vector<NamedDevice> devices = {
      {"t4", device(75, 40, 1024, 4 * kMiB)},        {"a100", device(80, 108, 2048, 40 * kMiB)},
      {"rtx4090", device(89, 128, 1536, 72 * kMiB)}, {"h100", device(90, 132, 2048, 50 * kMiB)},
      {"h200", device(90, 132, 2048, 60 * kMiB)},    {"h200-mig-1g", device(90, 16, 2048, 6 * kMiB)},
      {"b200", device(100, 148, 2048, 126 * kMiB)},  {"rtx5090", device(120, 170, 1536, 96 * kMiB)},
  };
  return devices;
}

std::vector<std::pair<std::string, double>> device_fields(const DeviceInfo& info) {
  return {
      {"arch", info.arch},
      {"num_sms", info.num_sms},
      {"threads_per_sm", info.threads_per_sm},
      {"shared_bytes_per_block", info.shared_bytes_per_block},
      {"l2_bytes", info.l2_bytes},
  };
}

std::vector<Family> all_families() {
  std::vector<Family> families;
  for (int i = static_cast<int>(Family::kAuto) + 1;; ++i) {
    const Family family = static_cast<Family>(i);
    Family parsed;
    if (!parse_family(family_name(family), &parsed) || parsed != family) return families;
    families.push_back(family);
  }
}

Family family_named(const std::string& name, const std::string& source) {
  Family family;
  if (parse_family(name, &family)) return family;
  std::string known = family_name(Family::kAuto);
  const std::vector<Family> families = all_families();
  for (size_t i = 0; i < families.size(); ++i) {
    known += (i + 1 == families.size() ? " or " : ", ") + std::string(family_name(families[i]));
  }
  throw std::runtime_error(source + " should be " + known + ", not " + name);
}

Family forced_family() {
  const char* name = std::getenv("BNEXT_CUDA_FAMILY");
  return name == nullptr || *name == '\0' ? Family::kAuto : family_named(name, "BNEXT_CUDA_FAMILY");
}

}  // namespace bnext::cuda
