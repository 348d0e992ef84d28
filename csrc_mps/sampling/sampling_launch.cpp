// Sampling on a GPU: operands, kernel, grid and parameters of each launch.
#include "../common/rows.h"
#include "../common/torch_functions.h"
#include "../runtime/launch.h"
#include "sampling.h"
#include "sampling_params.h"

namespace torch_fused {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTallies = 4;
constexpr int64_t kSliceThreads = 256, kSearchThreads = 1024, kGreedyThreads = 256;

int64_t slices_of(int64_t vocabulary) {
  return (vocabulary + SLICE - 1) / SLICE;
}

// Rows divided into buckets, which the last launch searches.
struct Divided {
  Rows logits;
  SamplingParams params;
  Tensor row_parameters, tokens, segments, tallies, splitters, maxima, heavy;
};

Divided divide(const Sampling& call, const Tensor& logits) {
  const int64_t slices = slices_of(call.vocabulary);
  const Rows x = as_rows(logits, call.rows, call.vocabulary);
  const SamplingParams params{x.stride,
                              0,
                              0,
                              call.parameters.top_p,
                              call.parameters.temperature,
                              call.parameters.top_k,
                              call.parameters.min_p,
                              static_cast<uint32_t>(call.vocabulary),
                              static_cast<uint32_t>(slices),
                              call.row_parameters ? ROW_PARAMETERS : 0};
  const auto longs = logits.options().dtype(at::kLong), ints = longs.dtype(at::kInt);
  const Tensor tokens = empty({call.rows, slices, SLICE}, longs);
  const Tensor segments = empty({call.rows, slices, BUCKETS}, ints);
  const Tensor tallies = empty({call.rows, kTallies, BUCKETS}, ints);
  const Tensor splitters = empty({call.rows, BUCKETS}, longs);
  const Tensor maxima = empty({call.rows, slices}, ints), heavy = empty({call.rows, slices}, longs);
  const Tensor row_parameters = call.row_parameters.value_or(maxima);
  static KernelSet surveys("sampling", "sampling_survey"), divisions("sampling", "sampling_divide");
  launch(surveys(logits), call.rows * (slices + 1), kSliceThreads, {x.tensor, maxima, splitters, tallies}, params);
  launch(divisions(logits), call.rows * slices, kSliceThreads,
         {x.tensor, maxima, splitters, row_parameters, tokens, segments, tallies, heavy}, params);
  return {x, params, row_parameters, tokens, segments, tallies, splitters, maxima, heavy};
}

}  // namespace

Tensor greedy_gpu(const Tensor& logits) {
  check_logits("greedy", logits);
  const int64_t rows = logits.dim() == 2 ? logits.size(0) : 1, vocabulary = logits.size(-1);
  const Tensor ids = empty(logits.sizes().slice(0, logits.dim() - 1), logits.options().dtype(at::kLong));
  if (rows == 0) return ids;
  const Rows x = as_rows(logits, rows, vocabulary);
  const int64_t slices = slices_of(vocabulary);
  const Tensor best = empty({rows, slices, 2}, logits.options().dtype(at::kInt));
  const GreedyParams params{x.stride, static_cast<uint32_t>(vocabulary), static_cast<uint32_t>(slices),
                            rows_aligned(x.tensor, x.stride), 0};
  static KernelSet of_slices("greedy", "greedy_slices");
  static const Kernel& of_rows = find_kernel("greedy", "greedy_rows");
  launch(of_slices(logits), rows * slices, kGreedyThreads, {x.tensor, best}, params);
  launch(of_rows, rows, kGreedyThreads, {best, ids}, params);
  return ids;
}

Tensor filter_logits_gpu(const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                         std::optional<double> top_p, std::optional<double> min_p,
                         const OptionalTensor& row_parameters) {
  const Sampling call = check_sampling("filter_logits", logits, temperature, top_k, top_p, min_p, row_parameters);
  const Tensor output = empty(logits.sizes(), logits.options());
  if (call.rows == 0) return output;
  const Divided d = divide(call, logits);
  static KernelSet kernels("sampling", "filter_logits");
  launch(kernels(logits), call.rows * d.params.slices, kSearchThreads,
         {d.logits.tensor, d.tokens, d.segments, d.tallies, d.splitters, d.maxima, d.heavy, d.row_parameters, output},
         d.params);
  return output;
}

std::tuple<Tensor, Tensor> sample_gpu(const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                                      std::optional<double> top_p, std::optional<double> min_p,
                                      const OptionalTensor& row_parameters, std::optional<at::Generator> generator,
                                      std::optional<int64_t> seed, std::optional<int64_t> offset,
                                      const OptionalTensor& state, bool /*return_valid*/) {
  const Sampling call = check_sampling("sample", logits, temperature, top_k, top_p, min_p, row_parameters);
  const RandomSource source(logits, std::move(generator), seed, offset, state);
  const auto shape = logits.sizes().slice(0, logits.dim() - 1);
  const Tensor ids = empty(shape, logits.options().dtype(at::kLong));
  const Tensor valid = empty(shape, logits.options().dtype(at::kBool));
  if (call.rows == 0) {
    source.take();
    return {ids, valid};
  }
  Divided d = divide(call, logits);
  const RandomState random = source.take();
  d.params.seed = random.seed;
  d.params.offset = random.offset;
  if (random.tensor) d.params.flags |= STATE;
  static const Kernel& draw = find_kernel("sampling", "sampling_draw");
  launch(draw, call.rows, kSearchThreads,
         {d.tokens, d.segments, d.tallies, d.splitters, d.maxima, d.heavy, d.row_parameters,
          random.tensor.value_or(d.tokens), ids, valid},
         d.params);
  return {ids, valid};
}

}  // namespace torch_fused
