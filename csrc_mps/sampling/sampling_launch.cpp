// Sampling on a GPU: operands, kernel, grid and parameters of each launch.
#include <ATen/ops/empty.h>

#include "../common/dtype.h"
#include "../common/registration.h"
#include "../common/rows.h"
#include "../runtime/launch.h"
#include "sampling.h"

namespace torch_fused {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// As in greedy.metal and ranking.metal.h.
struct GreedyParams {
  int64_t row_stride;
  uint32_t vocabulary, slices, aligned, unused;
};
struct SamplingParams {
  int64_t row_stride;
  uint64_t seed, offset;
  float scale, top_k, top_p, min_p;
  uint32_t vocabulary, slices, flags, unused;
};
constexpr uint32_t ROW_PARAMETERS = 1, STATE = 2;

constexpr int64_t kSlice = 2048;  // tokens that one threadgroup sorts
constexpr int64_t kSliceThreads = 256, kSearchThreads = 768;
constexpr int64_t kGreedyThreads = 256;

int64_t slices_of(int64_t vocabulary) {
  return (vocabulary + kSlice - 1) / kSlice;
}

// A row's order, which the last launch searches.
struct Order {
  Rows logits;
  SamplingParams params;
  Tensor sorted, masses, summaries, row_parameters;
};

Order sort(const Sampling& call, const Tensor& logits) {
  const int64_t slices = slices_of(call.vocabulary);
  const Rows x = as_rows(logits, call.rows, call.vocabulary);
  const SamplingParams params{x.stride,
                              0,
                              0,
                              call.scale,
                              call.top_k,
                              call.top_p,
                              call.min_p,
                              static_cast<uint32_t>(call.vocabulary),
                              static_cast<uint32_t>(slices),
                              call.row_parameters ? ROW_PARAMETERS : 0,
                              0};
  const auto longs = logits.options().dtype(at::kLong);
  const Tensor sorted = at::empty({call.rows, slices, kSlice}, longs), masses = at::empty(sorted.sizes(), longs);
  const Tensor summaries = at::empty({call.rows, slices, 5}, longs);
  const Tensor maxima = at::empty({call.rows, slices}, longs.dtype(at::kInt));
  const Tensor row_parameters = call.row_parameters.value_or(sorted);
  const int64_t groups = call.rows * slices;
  launch("sampling", "sampling_maximum_" + dtype_name(logits), groups, kSliceThreads, {x.tensor, maxima}, params);
  launch("sampling", "sampling_sort_" + dtype_name(logits), groups, kSliceThreads,
         {x.tensor, maxima, row_parameters, sorted, masses, summaries}, params);
  return {x, params, sorted, masses, summaries, row_parameters};
}

}  // namespace

Tensor greedy_gpu(const Tensor& logits) {
  check_logits("greedy", logits);
  const int64_t rows = logits.dim() == 2 ? logits.size(0) : 1, vocabulary = logits.size(-1);
  const Tensor ids = at::empty(logits.sizes().slice(0, logits.dim() - 1), logits.options().dtype(at::kLong));
  if (rows == 0) return ids;
  const Rows x = as_rows(logits, rows, vocabulary);
  const int64_t slices = slices_of(vocabulary);
  const Tensor best = at::empty({rows, slices, 2}, logits.options().dtype(at::kInt));
  const GreedyParams params{x.stride, static_cast<uint32_t>(vocabulary), static_cast<uint32_t>(slices),
                            rows_aligned(x.tensor, x.stride), 0};
  launch("greedy", "greedy_slices_" + dtype_name(logits), rows * slices, kGreedyThreads, {x.tensor, best}, params);
  launch("greedy", "greedy_rows", rows, kGreedyThreads, {best, ids}, params);
  return ids;
}

Tensor filter_logits_gpu(const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                         std::optional<double> top_p, std::optional<double> min_p,
                         const OptionalTensor& row_parameters) {
  const Sampling call = check_sampling("filter_logits", logits, temperature, top_k, top_p, min_p, row_parameters);
  const Tensor output = at::empty(logits.sizes(), logits.options());
  if (call.rows == 0) return output;
  const Order order = sort(call, logits);
  launch("sampling", "filter_logits_" + dtype_name(logits), call.rows * order.params.slices, kSearchThreads,
         {order.logits.tensor, order.sorted, order.masses, order.summaries, order.row_parameters, output},
         order.params);
  return output;
}

std::tuple<Tensor, Tensor> sample_gpu(const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                                      std::optional<double> top_p, std::optional<double> min_p,
                                      const OptionalTensor& row_parameters, std::optional<at::Generator> generator,
                                      std::optional<int64_t> seed, std::optional<int64_t> offset,
                                      const OptionalTensor& state, bool /*return_valid*/) {
  const Sampling call = check_sampling("sample", logits, temperature, top_k, top_p, min_p, row_parameters);
  const RandomState random = random_state(logits, std::move(generator), seed, offset, state);
  const auto shape = logits.sizes().slice(0, logits.dim() - 1);
  const Tensor ids = at::empty(shape, logits.options().dtype(at::kLong));
  const Tensor valid = at::empty(shape, logits.options().dtype(at::kBool));
  if (call.rows == 0) return {ids, valid};
  Order order = sort(call, logits);
  order.params.seed = random.seed;
  order.params.offset = random.offset;
  if (random.tensor) order.params.flags |= STATE;
  launch("sampling", "sampling_draw", call.rows, kSearchThreads,
         {order.sorted, order.masses, order.summaries, order.row_parameters, random.tensor.value_or(order.sorted), ids,
          valid},
         order.params);
  return {ids, valid};
}

}  // namespace torch_fused

using namespace torch_fused;
TORCH_FUSED_KERNELS(greedy)
TORCH_FUSED_KERNELS(filter_logits)
TORCH_FUSED_KERNELS(sample)
