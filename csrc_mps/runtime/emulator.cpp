#include "launch.h"
namespace torch_fused {
void launch_emulated(const Launch&) {}
bool emulating() {
  return false;
}
}  // namespace torch_fused
