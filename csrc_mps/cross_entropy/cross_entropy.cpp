// Cross entropy of rows of logits, and their gradient in their place: schema, checks and the CPU kernel.

// Fused multiply-adds where the machine has them: half the work of exp's polynomial.
#pragma GCC optimize("fp-contract=fast")
#pragma STDC FP_CONTRACT ON

#include "cross_entropy.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/convert.h"
#include "../common/exp.h"
#include "../common/half_runs.h"
#include "../common/lazy_views.h"
#include "../common/memory.h"
#include "../common/registration.h"
#include "../common/row_loops.h"
#include "../common/row_max.h"
#include "../common/row_sums.h"
#include "../common/torch_functions.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def(
      "cross_entropy_(Tensor(a!) logits, Tensor target, Tensor? scale=None, *, int ignore_index=-100, "
      "float label_smoothing=0.0, float z_loss=0.0) -> Tensor");
}

namespace torch_fused {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ---------------------------------------------------------------------------------------------------------

void check_options(const char* op, const CrossEntropyOptions& options) {
  TORCH_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, op,
              ": label_smoothing must be from 0 to 1, got ", options.label_smoothing);
  TORCH_CHECK(std::abs(options.z_loss) <= std::numeric_limits<float>::max(), op, ": z_loss must be finite, got ",
              options.z_loss);
}

void check_target(const char* op, const Tensor& target, at::IntArrayRef sizes, const char* like_argument,
                  const Tensor& like) {
  TORCH_CHECK(target.scalar_type() == at::kLong, op, ": target must be int64, got ", target.scalar_type());
  TORCH_CHECK(target.sizes() == sizes, op, ": target must have a class for each row of ", like_argument, ", shape ",
              sizes, ", got ", target.sizes());
  TORCH_CHECK(target.device() == like.device(), op, ": target must be on ", like_argument, "'s device ", like.device(),
              ", got ", target.device());
}

void check_classes(const char* op, const Tensor& target, int64_t classes, int64_t ignore_index) {
  const Tensor dense = target.contiguous();
  const auto* values = elements<const int64_t>(dense);
  for (int64_t i = 0; i < dense.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] == ignore_index || (values[i] >= 0 && values[i] < classes), op,
                      ": target must be from 0 to ", classes - 1, " or ignore_index, ", ignore_index, ", got ",
                      values[i]);
  }
}

void check_cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& scale,
                         const CrossEntropyOptions& options) {
  const char* op = "cross_entropy_";
  check_dtype(op, "logits", logits);
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, op,
              ": logits must have the shape (rows, classes), with a class at least, got ", logits.sizes());
  check_target(op, target, logits.sizes().slice(0, 1), "logits", logits);
  check_options(op, options);
  MemoryCheck memory(op);
  memory.writes("logits", logits);
  memory.reads("target", target);
  if (scale) {
    TORCH_CHECK(scale->scalar_type() == loss_dtype(logits), op, ": scale must be ", loss_dtype(logits), ", got ",
                scale->scalar_type());
    TORCH_CHECK(scale->dim() == 0 || scale->sizes() == target.sizes(), op,
                ": scale must be a scalar or have a number for each row of logits, ", target.sizes(), ", got ",
                scale->sizes());
    TORCH_CHECK(scale->device() == logits.device(), op, ": scale must be on logits' device ", logits.device(), ", got ",
                scale->device());
    memory.reads("scale", *scale);
  }
  memory.run();
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

template <class T>
struct CrossEntropy {
  T* logits;
  const int64_t* target;
  const wide_t<T>* scale;  // null if the logits stay
  wide_t<T>* losses;
  int64_t stride, cols, scale_step;
  int64_t ignore_index;
  wide_t<T> smoothing, z_loss;
};

// What one reading of a row gives: sum = the sum of exp(x - largest), total = that of x.
template <class W>
struct RowSums {
  W largest, sum, total;
};

template <class T>
TORCH_FUSED_INLINE RowSums<wide_t<T>> read_row(const T* x, int64_t n) {
  using W = wide_t<T>;
  constexpr W kNone = -std::numeric_limits<W>::infinity();
  RowSums<W> row{kNone, 0, 0};
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    const T* block = x + begin;
    const int64_t length = std::min(n - begin, kRowBlock);
    const W largest = std::max(row.largest, row_max(block, length));
    const W shift = largest == kNone ? 0 : largest;  // a block that is masked throughout adds nothing
    const auto [sum, total] = block_sums<2, W>(length, [=](int64_t i, int64_t j, W(*sums)[kRowStreams]) {
      sums[0][j] += exp_nonpositive(widen(block[i]) - shift);
      sums[1][j] += widen(block[i]);
    });
    row.sum = row.sum * exp_nonpositive(row.largest - shift) + sum;
    row.total += total;
    row.largest = largest;
  }
  return row;
}

template <class T>
TORCH_FUSED_INLINE void run_row(const CrossEntropy<T>& a, int64_t row, wide_t<T>* room) {
  using W = wide_t<T>;
  T* logits = a.logits + row * a.stride;
  const int64_t n = a.cols, target = a.target[row];
  if (target == a.ignore_index) {
    a.losses[row] = 0;
    if (a.scale) std::fill(logits, logits + n, T(0));
    return;
  }
  const auto* x = readable(logits, n, room);
  const RowSums<W> sums = read_row(x, n);
  const W of_target = widen(x[target]), log_sum = std::log(sums.sum), lse = sums.largest + log_sum;
  W loss = log_sum + (1 - a.smoothing) * (sums.largest - of_target);
  if (a.smoothing > 0) loss += a.smoothing * (sums.largest - sums.total / static_cast<W>(n));
  if (a.z_loss != 0) loss += a.z_loss * lse * lse;
  a.losses[row] = loss;
  if (!a.scale) return;
  const W scale = a.scale[row * a.scale_step];
  const W factor = scale * (1 + (a.z_loss != 0 ? 2 * a.z_loss * lse : 0)) / sums.sum;
  const W uniform = scale * a.smoothing / static_cast<W>(n);
  write_run(logits, n, room, [=](int64_t i) { return exp_nonpositive(widen(x[i]) - sums.largest) * factor - uniform; });
  logits[target] = narrow<T>(exp_nonpositive(of_target - sums.largest) * factor - uniform - scale * (1 - a.smoothing));
}

template <class T>
TORCH_FUSED_INLINE void run_rows(const CrossEntropy<T>& a, int64_t begin, int64_t end) {
  wide_t<T>* const room = row_room<T>(a.cols);
  for (int64_t row = begin; row < end; ++row) run_row(a, row, room);
}

TORCH_FUSED_LOOPS(CrossEntropy, run_rows)

}  // namespace

Tensor cross_entropy_cpu(const Tensor& logits, const Tensor& target, const OptionalTensor& scale, int64_t ignore_index,
                         double label_smoothing, double z_loss) {
  const CrossEntropyOptions options{ignore_index, label_smoothing, z_loss};
  check_cross_entropy(logits, target, scale, options);
  check_classes("cross_entropy_", target, logits.size(1), ignore_index);
  const int64_t rows = logits.size(0), cols = logits.size(1);
  const Tensor losses = empty(target.sizes(), logits.options().dtype(loss_dtype(logits)));
  if (rows == 0) return losses;
  const Rows x = as_rows(logits, rows, cols);
  const Tensor targets = target.contiguous(), scales = scale ? scale->contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "cross_entropy_", [&] {
    using W = wide_t<scalar_t>;
    const CrossEntropy<scalar_t> args{elements<scalar_t>(x.tensor),
                                      elements<const int64_t>(targets),
                                      scale ? elements<const W>(scales) : nullptr,
                                      elements<W>(losses),
                                      x.stride,
                                      cols,
                                      scale ? scale->dim() : 0,
                                      ignore_index,
                                      static_cast<W>(label_smoothing),
                                      static_cast<W>(z_loss)};
    run_parallel(args, rows, cols);
  });
  if (scale && !x.tensor.is_same(logits)) logits.copy_(x.tensor);
  return losses;
}

// ---- autograd -------------------------------------------------------------------------------------------------------

namespace {

// Not differentiable, but autograd must know that the logits have changed.
Tensor cross_entropy_autograd(const Tensor& logits, const Tensor& target, const OptionalTensor& scale,
                              int64_t ignore_index, double label_smoothing, double z_loss) {
  check_not_differentiated("cross_entropy_", "logits", logits);
  if (scale) check_not_differentiated("cross_entropy_", "scale", *scale);
  static const auto op = find_op<decltype(cross_entropy_cpu)>("torch_fused::cross_entropy_");
  return change({logits}, [&] { return op.call(logits, target, scale, ignore_index, label_smoothing, z_loss); });
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("cross_entropy_", torch_fused::cross_entropy_autograd);
}
TORCH_FUSED_WRITES(cross_entropy_)
TORCH_FUSED_KERNELS_NAMED(cross_entropy_, cross_entropy)
