// What cross_entropy.cpp (CPU), cross_entropy_launch.cpp (GPU) and linear_cross_entropy.cpp share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace torch_fused {

// What a loss is, beside its logits and targets.
struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss;
};

// float64 for float64, else float32: the dtype of losses and scales.
inline at::ScalarType loss_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Throws unless the options are ones that a loss can have; the message names the op and the argument.
void check_options(const char* op, const CrossEntropyOptions& options);
// `target` must have one int64 for each row, on the device of `like`.
void check_target(const char* op, const at::Tensor& target, at::IntArrayRef sizes, const char* like_argument,
                  const at::Tensor& like);
// Throws if a target on the CPU is no class.
void check_classes(const char* op, const at::Tensor& target, int64_t classes, int64_t ignore_index);

// The losses of rows of logits (n, classes). With a scale, of one element or of n, the logits become the gradient of
// their row's loss times it; without one they stay.
using CrossEntropySignature = at::Tensor(const at::Tensor& logits, const at::Tensor& target,
                                         const std::optional<at::Tensor>& scale, int64_t ignore_index,
                                         double label_smoothing, double z_loss);
CrossEntropySignature cross_entropy_cpu, cross_entropy_gpu;
// Checks the operands of both.
void check_cross_entropy(const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& scale,
                         const CrossEntropyOptions& options);

// x *= factor, one number, in the dtype of the losses; rounded once.
using ScaleSignature = void(const at::Tensor& x, const at::Tensor& factor);
ScaleSignature scale_cpu, scale_gpu;

// A chunk of the classes: from `begin` to `end` of all of them.
struct ClassChunk {
  int64_t begin, end, classes;
};
// On a GPU, of dense logits (n, the chunk's classes and what makes the row a multiple of 16 bytes) of a half type. The
// first adds a chunk to the rows' `sums` (n, 4) and, with the last chunk, writes their losses; chunks come in order.
// The second makes gradients of a chunk's logits, and zeros of the rest of the row.
void cross_entropy_sums_gpu(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& sums,
                            const at::Tensor& losses, ClassChunk chunk, const CrossEntropyOptions& options);
void cross_entropy_gradient_gpu(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& sums,
                                const at::Tensor& scale, ClassChunk chunk, const CrossEntropyOptions& options);

}  // namespace torch_fused
