// Appending to a key / value cache: schema, checks, autograd and the copy on the CPU.
#include "kv_cache.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../common/checks.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def("kv_append_(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, SymInt position) -> ()");
  m.def(
      "kv_update_(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, SymInt position) -> "
      "(Tensor(a), Tensor(b))");
}

namespace torch_fused {
namespace {

using at::Tensor;

// ---- checks ---------------------------------------------------------------------------------------------------------

// `fresh` must fit into `buffer` at `position`; their names are those of the op's arguments.
void check_pair(const char* buffer_name, const Tensor& buffer, const char* fresh_name, const Tensor& fresh,
                int64_t position) {
  TORCH_CHECK(buffer.dim() == 4, "kv_append_: ", buffer_name, " must be (batch, heads, capacity, head_dim), got shape ",
              buffer.sizes());
  TORCH_CHECK(fresh.dim() == 4 && fresh.size(0) == buffer.size(0) && fresh.size(1) == buffer.size(1) &&
                  fresh.size(3) == buffer.size(3),
              "kv_append_: ", fresh_name, " must be (", buffer.size(0), ", ", buffer.size(1), ", tokens, ",
              buffer.size(3), ") to fit into ", buffer_name, ", got shape ", fresh.sizes());
  TORCH_CHECK(fresh.scalar_type() == buffer.scalar_type(), "kv_append_: ", fresh_name, " must have the dtype of ",
              buffer_name, ", ", buffer.scalar_type(), ", got ", fresh.scalar_type());
  TORCH_CHECK(fresh.device() == buffer.device(), "kv_append_: ", fresh_name, " must be on the device of ", buffer_name,
              ", ", buffer.device(), ", got ", fresh.device());
  TORCH_CHECK(position >= 0 && fresh.size(2) <= buffer.size(2) - position, "kv_append_: position must be from 0 to ",
              buffer.size(2) - fresh.size(2), " for ", fresh.size(2), " tokens in ", buffer_name,
              " with a capacity of ", buffer.size(2), ", got ", position);
  TORCH_CHECK(at::has_internal_overlap(buffer) != at::MemOverlap::Yes, "kv_append_: ", buffer_name,
              " must not be an expanded tensor, whose elements share memory; its strides are ", buffer.strides());
  TORCH_CHECK(!fresh.is_alias_of(buffer), "kv_append_: ", fresh_name, " must not share memory with ", buffer_name);
}

}  // namespace

void check_kv_append(const Tensor& keys, const Tensor& values, const Tensor& new_keys, const Tensor& new_values,
                     int64_t position) {
  check_pair("keys", keys, "new_keys", new_keys, position);
  check_pair("values", values, "new_values", new_values, position);
  TORCH_CHECK(values.size(0) == keys.size(0) && values.size(1) == keys.size(1),
              "kv_append_: values must have the batch and heads of keys, ", keys.sizes(), ", got ", values.sizes());
  check_alike("kv_append_", "values", values, "keys", keys);
  TORCH_CHECK(new_values.size(2) == new_keys.size(2), "kv_append_: new_values must have as many tokens as new_keys, ",
              new_keys.size(2), ", got ", new_values.size(2));
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

// Bytes a thread should at least copy: below that, waking one costs more than it saves.
constexpr int64_t kGrainBytes = 65536;

// Copies `from` to tokens `position` and on of `to`: tokens of a head that lie one behind the other in one memcpy, else
// token by token, else element by element.
void copy_tokens(const Tensor& to, const Tensor& from, int64_t position) {
  if (from.numel() == 0) return;
  const int64_t heads = from.size(1), tokens = from.size(2), head_dim = from.size(3);
  const int64_t element = static_cast<int64_t>(from.element_size());
  const bool dense = head_dim == 1 || (to.stride(3) == 1 && from.stride(3) == 1);
  const bool dense_tokens = dense && to.stride(2) == head_dim && from.stride(2) == head_dim;
  char* const to_data = static_cast<char*>(to.mutable_data_ptr()) + position * to.stride(2) * element;
  const char* const from_data = static_cast<const char*>(from.const_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / (head_dim * element));
  at::parallel_for(0, from.size(0) * heads * tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin, rows = 1; row < end; row += rows) {
      const int64_t batch = row / (heads * tokens), head = row / tokens % heads, token = row % tokens;
      if (dense_tokens) rows = std::min(end - row, tokens - token);
      const auto start = [&](const Tensor& tensor) {
        return (batch * tensor.stride(0) + head * tensor.stride(1) + token * tensor.stride(2)) * element;
      };
      char* const to_row = to_data + start(to);
      const char* const from_row = from_data + start(from);
      if (dense) {
        std::memcpy(to_row, from_row, rows * head_dim * element);
      } else {
        for (int64_t i = 0; i < head_dim; ++i) {
          std::memcpy(to_row + i * to.stride(3) * element, from_row + i * from.stride(3) * element, element);
        }
      }
    }
  });
}

}  // namespace

void kv_append_cpu(const Tensor& keys, const Tensor& values, const Tensor& new_keys, const Tensor& new_values,
                   c10::SymInt symbolic_position) {
  const int64_t position = symbolic_position.expect_int();
  check_kv_append(keys, values, new_keys, new_values, position);
  copy_tokens(keys, new_keys, position);
  copy_tokens(values, new_values, position);
}

// ---- autograd -------------------------------------------------------------------------------------------------------

namespace {

void call_kv_append(const Tensor& keys, const Tensor& values, const Tensor& new_keys, const Tensor& new_values,
                    const c10::SymInt& position) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_fused::kv_append_", "")
                             .typed<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::SymInt)>();
  op.call(keys, values, new_keys, new_values, position);
}

// Not differentiable, but autograd must know that the buffers have changed.
void kv_append_autograd(const Tensor& keys, const Tensor& values, const Tensor& new_keys, const Tensor& new_values,
                        c10::SymInt position) {
  const auto check = [grad = at::GradMode::is_enabled()](const char* name, const Tensor& tensor) {
    TORCH_CHECK(!grad || !tensor.requires_grad(), "kv_append_: ", name,
                " requires grad, but the op is not differentiable: call it under torch.no_grad()");
    TORCH_CHECK(!tensor._fw_grad(/*level=*/0).defined(), "kv_append_: ", name,
                " has a tangent, but the op is not differentiable");
  };
  check("keys", keys);
  check("values", values);
  check("new_keys", new_keys);
  check("new_values", new_values);
  // Before the write, because torch refuses here to change an inference tensor outside of inference mode.
  torch::autograd::impl::bump_version(keys);
  torch::autograd::impl::bump_version(values);
  at::AutoDispatchBelowADInplaceOrView below;
  call_kv_append(keys, values, new_keys, new_values, position);
}

// ---- append and view ------------------------------------------------------------------------------------------------

// Every device and autograd see kv_append_ and two views: this only saves the way from Python and back for each.
std::tuple<Tensor, Tensor> kv_update(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                                     const Tensor& new_values, c10::SymInt position) {
  call_kv_append(keys, values, new_keys, new_values, position);
  const c10::SymInt length = position + new_keys.sym_size(2);
  return {keys.slice_symint(2, 0, length), values.slice_symint(2, 0, length)};
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("kv_append_", torch_fused::kv_append_autograd);
}
TORCH_LIBRARY_IMPL(torch_fused, CompositeImplicitAutograd, m) {
  m.impl("kv_update_", torch_fused::kv_update);
}
