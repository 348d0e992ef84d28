// silu_mul and gelu_mul on a GPU: operands, kernel, grid and parameters of each launch.
#include <algorithm>

#include "../common/checks.h"
#include "../common/row_shape.h"
#include "../common/torch_functions.h"
#include "../runtime/launch.h"
#include "swiglu.h"
#include "swiglu_params.h"

namespace torch_fused {
namespace {

using at::Tensor;

constexpr int64_t kThreads = 256, kPackBytes = 16;

// Launches a kernel of `op` over the operands' rows, one pack per thread, with the dense results after them.
void launch_rows(const char* op, KernelSet& kernels, const SwigluRows& call, std::initializer_list<Tensor> results,
                 SwigluParams params) {
  const Tensor& result = *results.begin();
  if (result.numel() == 0) return;
  const int64_t pack = kPackBytes / result.element_size();
  const int64_t threads = std::min(kThreads, (call.cols + 32 * pack - 1) / (32 * pack) * 32);
  params.cols = call.cols;
  params.groups = kernel_size(op, "groups of columns", (call.cols + threads * pack - 1) / (threads * pack));
  std::vector<Tensor> buffers;
  bool aligned = true;
  for (const Rows& operand : call.operands) {
    buffers.push_back(operand.tensor);
    aligned = aligned && rows_aligned(operand.tensor, call.rows > 1 ? operand.stride : 0);
  }
  for (const Tensor& tensor : results) {
    buffers.push_back(tensor);
    aligned = aligned && rows_aligned(tensor, call.rows > 1 ? call.cols : 0);
  }
  if (aligned) params.flags |= ALIGNED;
  launch(kernels(result), call.rows * params.groups, threads, buffers, params);
}

Tensor forward_gpu(const char* op, KernelSet& kernels, const Tensor& gate, const Tensor& up,
                   std::string_view casting_mode) {
  const bool llama = is_llama(op, casting_mode);
  const SwigluRows call = check_swiglu(op, {{"gate", &gate}, {"up", &up}});
  const Tensor output = empty(gate.sizes(), gate.options());
  launch_rows(op, kernels, call, {output},
              {0, call.operands[0].stride, call.operands[1].stride, 0, 0, llama ? LLAMA : 0});
  return output;
}

std::tuple<Tensor, Tensor> backward_gpu(const char* op, KernelSet& kernels, const Tensor& grad, const Tensor& gate,
                                        const Tensor& up) {
  const SwigluRows call = check_swiglu(op, {{"grad", &grad}, {"gate", &gate}, {"up", &up}});
  const Tensor grad_gate = empty(gate.sizes(), gate.options()), grad_up = empty(up.sizes(), up.options());
  launch_rows(op, kernels, call, {grad_gate, grad_up},
              {0, call.operands[1].stride, call.operands[2].stride, call.operands[0].stride, 0, 0});
  return {grad_gate, grad_up};
}

}  // namespace

Tensor silu_mul_gpu(const Tensor& gate, const Tensor& up, std::string_view casting_mode) {
  static KernelSet kernels("swiglu", "silu_mul");
  return forward_gpu("silu_mul", kernels, gate, up, casting_mode);
}

std::tuple<Tensor, Tensor> silu_mul_backward_gpu(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  static KernelSet kernels("swiglu", "silu_mul_backward");
  return backward_gpu("silu_mul_backward", kernels, grad, gate, up);
}

Tensor gelu_mul_gpu(const Tensor& gate, const Tensor& up, std::string_view approximate, std::string_view casting_mode) {
  static KernelSet exact("swiglu", "gelu_mul"), by_tanh("swiglu", "gelu_mul_tanh");
  return forward_gpu("gelu_mul", is_tanh("gelu_mul", approximate) ? by_tanh : exact, gate, up, casting_mode);
}

std::tuple<Tensor, Tensor> gelu_mul_backward_gpu(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                                 std::string_view approximate) {
  static constexpr char op[] = "gelu_mul_backward";
  static KernelSet exact("swiglu", op), by_tanh("swiglu", "gelu_mul_tanh_backward");
  return backward_gpu(op, is_tanh(op, approximate) ? by_tanh : exact, grad, gate, up);
}

}  // namespace torch_fused
