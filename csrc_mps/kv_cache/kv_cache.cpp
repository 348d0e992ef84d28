// Appending to a key / value cache: schema, checks, autograd and the copy on the CPU.
#include "kv_cache.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../common/autograd.h"
#include "../common/checks.h"
#include "../common/lazy_views.h"
#include "../common/memory.h"
#include "../common/registration.h"

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

// `fresh` must fit into `buffer` at `position`; the names are those of the op's arguments.
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
  MemoryCheck memory("kv_append_");
  memory.writes("keys", keys);
  memory.writes("values", values);
  memory.reads("new_keys", new_keys);
  memory.reads("new_values", new_values);
  memory.run();
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

// The minimum number of bytes per thread: below that, waking a thread costs more than it saves.
constexpr int64_t kGrainBytes = 65536;

// Copies `from` to `to` from token `position` on: consecutive tokens of a head in one memcpy, else
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
  check_not_differentiated("kv_append_", "keys", keys);
  check_not_differentiated("kv_append_", "values", values);
  check_not_differentiated("kv_append_", "new_keys", new_keys);
  check_not_differentiated("kv_append_", "new_values", new_values);
  change({keys, values}, [&] { call_kv_append(keys, values, new_keys, new_values, position); });
}

// ---- append and view ------------------------------------------------------------------------------------------------

// The same as kv_append_ and two views on every device and in autograd, with one call from Python instead of three.
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
TORCH_FUSED_WRITES(kv_append_)
TORCH_FUSED_KERNELS_NAMED(kv_append_, kv_append)
