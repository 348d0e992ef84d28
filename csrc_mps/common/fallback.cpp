#include <c10/util/Exception.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "registration.h"

namespace torch_fused {
namespace {

std::mutex mutex;
std::map<std::string, std::string> fallbacks;  // op -> why it runs torch

}  // namespace

void note_fallback(const char* op, const char* reason) {
  const char* strict = std::getenv("TORCH_FUSED_STRICT");
  TORCH_CHECK(
      !(strict && std::string(strict) == "1"), "torch_fused::", op,
      ": its GPU kernels cannot be built here, and TORCH_FUSED_STRICT=1 forbids the fallback to torch: ", reason);
  std::lock_guard<std::mutex> lock(mutex);
  if (fallbacks.emplace(op, reason).second) {
    TORCH_WARN("torch_fused::", op, " falls back to torch: its GPU kernels cannot be built here: ", reason);
  }
}

}  // namespace torch_fused

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  // (op, reason) of every op that has fallen back to torch so far in this process.
  m.def("_fallbacks() -> (str[], str[])", []() {
    std::lock_guard<std::mutex> lock(torch_fused::mutex);
    std::vector<std::string> ops, reasons;
    for (const auto& [op, reason] : torch_fused::fallbacks) {
      ops.push_back(op);
      reasons.push_back(reason);
    }
    return std::make_tuple(ops, reasons);
  });
}
