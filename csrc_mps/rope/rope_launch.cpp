// Rotary position embedding on a GPU: operands, kernel, grid and parameters of the launch.
#include <algorithm>

#include "../common/checks.h"
#include "../common/rows.h"
#include "../runtime/launch.h"
#include "rope.h"
#include "rope_params.h"

namespace torch_fused {
namespace {

using at::Tensor;

constexpr int64_t kThreads = 512;

RopeHeadStrides strides_of(const RopeHeads& x) {
  return {x.from.batch, x.from.token, x.from.head, x.to.batch, x.to.token, x.to.head};
}

// Whether every head, and both halves of it, start at a multiple of 16 bytes.
bool aligned(const Rope& call) {
  const int64_t pack = 16 / call.cos.element_size();
  const auto whole = [&](std::initializer_list<int64_t> strides) {
    return std::all_of(strides.begin(), strides.end(), [&](int64_t stride) { return stride % pack == 0; });
  };
  const auto heads = [&](const RopeHeads& x) {
    return rows_aligned(x.input, 0) && rows_aligned(x.output, 0) &&
           whole({x.from.batch, x.from.token, x.from.head, x.to.batch, x.to.token, x.to.head});
  };
  return whole({call.rotary_dim / 2, call.cos_batch, call.cos_token, call.sin_batch, call.sin_token}) &&
         heads(call.q) && heads(call.k) && rows_aligned(call.cos, 0) && rows_aligned(call.sin, 0);
}

std::tuple<Tensor, Tensor> launch_rope(const char* op, const Rope& call, uint32_t flags) {
  if (call.q.output.numel() + call.k.output.numel() > 0) {
    const int64_t half = call.rotary_dim / 2, pack = 16 / call.cos.element_size();
    const int64_t packs = (half + pack - 1) / pack + (call.head_dim - call.rotary_dim + pack - 1) / pack;
    const int64_t heads = call.q.heads + call.k.heads, threads = std::min(kThreads, (heads * packs + 31) / 32 * 32);
    kernel_size(op, "packs of 16 bytes in a token's heads", heads * packs + threads);
    const RopeParams params{strides_of(call.q),
                            strides_of(call.k),
                            call.cos_batch,
                            call.cos_token,
                            call.sin_batch,
                            call.sin_token,
                            kernel_size(op, "tokens", call.tokens),
                            kernel_size(op, "heads", call.q.heads),
                            kernel_size(op, "heads", heads),
                            kernel_size(op, "dimensions", half),
                            kernel_size(op, "dimensions", call.head_dim),
                            flags | (aligned(call) ? ALIGNED : 0)};
    static KernelSet kernels("rope", "rope");
    launch(kernels(call.cos), call.batch * call.tokens, threads,
           {call.q.input, call.k.input, call.cos, call.sin, call.q.output, call.k.output}, params);
  }
  return {call.q.output, call.k.output};
}

}  // namespace

std::tuple<Tensor, Tensor> apply_rotary_pos_emb_gpu(const Tensor& q, const Tensor& k, const Tensor& cos,
                                                    const Tensor& sin, int64_t unsqueeze_dim,
                                                    std::string_view casting_mode) {
  const Rope call = check_rope(kRopeForward, q, k, cos, sin, unsqueeze_dim, casting_mode);
  return launch_rope(kRopeForward.op, call, call.llama ? LLAMA : 0);
}

std::tuple<Tensor, Tensor> apply_rotary_pos_emb_backward_gpu(const Tensor& grad_q, const Tensor& grad_k,
                                                             const Tensor& cos, const Tensor& sin,
                                                             int64_t unsqueeze_dim) {
  return launch_rope(kRopeBackward.op, check_rope(kRopeBackward, grad_q, grad_k, cos, sin, unsqueeze_dim, "torch"),
                     TRANSPOSED);
}

}  // namespace torch_fused
