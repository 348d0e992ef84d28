// Appending to a key / value cache on a GPU: kernel, grid and parameters of the launch.
#include <algorithm>
#include <array>
#include <limits>

#include "../common/rows.h"
#include "../runtime/launch.h"
#include "kv_append_params.h"
#include "kv_cache.h"

namespace torch_fused {
namespace {

using at::Tensor;

constexpr int64_t kThreads = 256;
constexpr int64_t kPack = 16;  // bytes

// Whether packs can be used: each row of head_dim elements is dense, and starts and ends at a multiple of a pack.
bool takes_packs(const Tensor& tensor) {
  const bool dense = tensor.stride(3) == 1 && tensor.size(3) * tensor.element_size() % kPack == 0;
  return dense && rows_aligned(tensor, tensor.stride(0)) && rows_aligned(tensor, tensor.stride(1)) &&
         rows_aligned(tensor, tensor.stride(2));
}

KvStrides strides_in_units(const Tensor& tensor, int64_t elements) {
  const auto stride = [&](int64_t dim) { return tensor.stride(dim) / elements; };
  return {stride(0), stride(1), stride(2), elements == 1 ? tensor.stride(3) : 1};
}

// The copy of `from` in units of `elements` elements.
KvCopy copy_in_units(const Tensor& to, const Tensor& from, int64_t elements) {
  const int64_t units = from.numel() / elements;
  TORCH_CHECK(units <= std::numeric_limits<uint32_t>::max(), "kv_append_: a GPU copies at most 2^32 - 1 elements or ",
              "packs of 16 bytes at once, got ", units);
  return {strides_in_units(to, elements), strides_in_units(from, elements), static_cast<uint32_t>(units),
          static_cast<uint32_t>(from.size(3) / elements)};
}

}  // namespace

void kv_append_gpu(const Tensor& keys, const Tensor& values, const Tensor& new_keys, const Tensor& new_values,
                   c10::SymInt symbolic_position) {
  const int64_t position = symbolic_position.expect_int();
  check_kv_append(keys, values, new_keys, new_values, position);
  const int64_t tokens = new_keys.size(2);
  const Tensor to_keys = keys.narrow(2, position, tokens), to_values = values.narrow(2, position, tokens);
  const int64_t element = static_cast<int64_t>(keys.element_size());
  const bool packs = takes_packs(to_keys) && takes_packs(to_values) && takes_packs(new_keys) && takes_packs(new_values);
  const int64_t unit = packs ? kPack : element;
  const KvAppendParams params{copy_in_units(to_keys, new_keys, unit / element),
                              copy_in_units(to_values, new_values, unit / element),
                              static_cast<uint32_t>(new_keys.size(1)), static_cast<uint32_t>(tokens)};
  const int64_t units = int64_t{params.keys.units} + params.values.units;
  static const auto kernels = [] {  // by the bytes of a unit
    std::array<const Kernel*, kPack + 1> found{};
    for (const int64_t bytes : {1, 2, 4, 8, 16}) {
      found.at(bytes) = &find_kernel("kv_append", "kv_append_" + std::to_string(bytes));
    }
    return found;
  }();
  launch(*kernels.at(unit), (units + kThreads - 1) / kThreads, kThreads, {to_keys, new_keys, to_values, new_values},
         params);
}

}  // namespace torch_fused
