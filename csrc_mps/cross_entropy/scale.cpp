// A gradient times the number that comes in, in place. Torch rounds a number in a GPU's memory to the dtype of what it
// multiplies, or takes four times as long as reading and writing that does.
#include "../common/checks.h"
#include "../common/lazy_views.h"
#include "../common/registration.h"
#include "../common/rows.h"
#include "cross_entropy.h"
#include "scale_params.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def("_scale_(Tensor(a!) x, Tensor factor) -> ()");
}

namespace torch_fused {
namespace {

using at::Tensor;

void check_scale(const Tensor& x, const Tensor& factor) {
  check_dtype("_scale_", "x", x);
  TORCH_CHECK(x.is_contiguous(), "_scale_: x must be contiguous, got strides ", x.strides());
  TORCH_CHECK(factor.numel() == 1 && factor.scalar_type() == loss_dtype(x) && factor.device() == x.device(),
              "_scale_: factor must be one number of ", loss_dtype(x), " on ", x.device(), ", got ", factor.sizes(),
              " of ", factor.scalar_type(), " on ", factor.device());
}

}  // namespace

void scale_cpu(const Tensor& x, const Tensor& factor) {
  check_scale(x, factor);
  x.mul_(factor);
}

void scale_gpu(const Tensor& x, const Tensor& factor) {
  check_scale(x, factor);
  const int64_t chunk = SCALE_THREADS * SCALE_PACKS * 16 / x.element_size();
  static KernelSet kernels("scale", "scale");
  launch(kernels(x), (x.numel() + chunk - 1) / chunk, SCALE_THREADS, {x, factor},
         ScaleParams{x.numel(), rows_aligned(x, 0), 0});
}

}  // namespace torch_fused

TORCH_FUSED_WRITES(_scale_)
TORCH_FUSED_KERNELS_NAMED(_scale_, scale)
