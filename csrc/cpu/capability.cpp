#include "capability.h"

#include <atomic>
#include <cstring>
#include <vector>

namespace vlmo_fast {
namespace {

// Best first; the last one runs everywhere.
const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> all = {
#if defined(__x86_64__) || defined(_M_X64)
      {"avx512", &similarity::kAvx512, &attention::kAvx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")},
      {"avx2", &similarity::kAvx2, &attention::kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"baseline", &similarity::kBaseline, &attention::kBaseline, true},
  };
  return all;
}

std::atomic<const Capability*>& chosen() {
  static std::atomic<const Capability*> choice = [] {
    for (const Capability& capability : capabilities()) {
      if (capability.supported) return &capability;
    }
    return &capabilities().back();
  }();
  return choice;
}

}  // namespace

const Capability& capability() { return *chosen().load(); }

}  // namespace vlmo_fast

// For `vlmo_fast.extensions`, which holds the choice back to torch's own, and for the tests.
#define VLMO_FAST_EXPORT extern "C" __attribute__((visibility("default")))

VLMO_FAST_EXPORT const char* vlmo_fast_cpu_capability() { return vlmo_fast::capability().name; }

VLMO_FAST_EXPORT bool vlmo_fast_cpu_use(const char* name) {
  for (const auto& capability : vlmo_fast::capabilities()) {
    if (capability.supported && std::strcmp(capability.name, name) == 0) {
      vlmo_fast::chosen() = &capability;
      return true;
    }
  }
  return false;
}
