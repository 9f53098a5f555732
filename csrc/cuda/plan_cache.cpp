#include "plan_cache.h"

#include <unordered_map>

namespace bnext::cuda {
namespace {

constexpr size_t kMostPlans = 1024;  // less than a megabyte; then all are dropped

struct Key {
  Request request;
  int device;
  Limits limits;

  bool operator==(const Key& other) const {
    return device == other.device && request == other.request && limits == other.limits;
  }
};

struct Hash {
  size_t operator()(const Key& key) const {
    const Geometry& g = key.request.geometry;
    uint64_t hash = static_cast<uint64_t>(key.device);
    for (int64_t part : {g.num_channels, g.size[0], g.size[1], g.size[2], static_cast<int64_t>(g.dtype),
                         static_cast<int64_t>(key.request.pass)}) {
      hash = (hash ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u;  // spreads bits upwards: 2^64 / golden ratio
      hash ^= hash >> 32;
    }
    return hash;
  }
};

std::unordered_map<Key, Plan, Hash>& plans_of_thread() {
  thread_local std::unordered_map<Key, Plan, Hash> plans;
  return plans;
}

}  // namespace

const Plan& cached_plan(const Request& request, int device, const DeviceInfo& info, const Limits& limits) {
  auto& plans = plans_of_thread();
  const Key key{request, device, limits};
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMostPlans) plans.clear();
  return plans.emplace(key, make_plan(request, info, limits)).first->second;
}

size_t count_cached_plans() { return plans_of_thread().size(); }

}  // namespace bnext::cuda
