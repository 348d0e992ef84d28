// Greedy choice, sampling and filtering of logits: schema, checks and the CPU kernels.
#include "sampling.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>

#include "common/autograd.h"
#include "common/philox.h"
#include "common/rows.h"
#include "ranking.h"

TORCH_LIBRARY_FRAGMENT(torch_fused, m) {
  m.def("greedy(Tensor logits) -> Tensor");
  m.def(
      "filter_logits(Tensor logits, float temperature=1.0, int? top_k=None, float? top_p=None, float? min_p=None, "
      "Tensor? row_parameters=None) -> Tensor");
  m.def(
      "sample(Tensor logits, float temperature=1.0, int? top_k=None, float? top_p=None, float? min_p=None, "
      "Tensor? row_parameters=None, Generator? generator=None, int? seed=None, int? offset=None, Tensor? state=None, "
      "bool return_valid=False) -> (Tensor, Tensor)",
      {at::Tag::nondeterministic_seeded});
}

namespace torch_fused {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ---------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kMostTokens = 1 << 20;  // sums of weights stay below 2^60
constexpr float kLog2e = 1.44269504088896f;

void check_row_parameters(const char* op, const Tensor& parameters, int64_t rows, const Tensor& logits) {
  TORCH_CHECK(parameters.dim() == 2 && parameters.size(0) == rows && parameters.size(1) == 4 &&
                  parameters.is_contiguous() && parameters.scalar_type() == at::kFloat,
              op, ": row_parameters must be a dense float32 tensor of shape (", rows, ", 4), got ",
              parameters.scalar_type(), " of shape ", parameters.sizes());
  TORCH_CHECK(parameters.device() == logits.device(), op, ": row_parameters must be on the device of logits, ",
              logits.device(), ", got ", parameters.device());
  if (!parameters.is_cpu()) return;  // reading values would wait for the device
  const auto* values = elements<const float>(parameters);
  for (int64_t row = 0; row < rows; ++row, values += 4) {
    TORCH_CHECK(values[0] >= 0, op, ": temperature must not be negative or NaN, in row ", row);
    TORCH_CHECK(values[1] >= 0 && values[1] == std::floor(values[1]), op,
                ": top_k must be a whole number, at least 1, or 0 for no filter, got ", values[1], " in row ", row);
    TORCH_CHECK(values[2] >= 0 && values[2] <= 1, op, ": top_p must be from 0 to 1, got ", values[2], " in row ", row);
    TORCH_CHECK(values[3] >= 0 && values[3] <= 1, op, ": min_p must be from 0 to 1, got ", values[3], " in row ", row);
  }
}

}  // namespace

void check_logits(const char* op, const Tensor& logits) {
  const at::ScalarType dtype = logits.scalar_type();
  const bool takes_double = logits.is_cpu();
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 || (dtype == at::kDouble && takes_double), op,
      ": logits must be float32, float16 or bfloat16", takes_double ? " (or float64 on the CPU)" : "", ", got ", dtype);
  TORCH_CHECK(logits.dim() == 1 || logits.dim() == 2, op, ": logits must be (vocabulary,) or (batch, vocabulary), got ",
              logits.sizes());
  TORCH_CHECK(logits.size(-1) > 0 && logits.size(-1) <= kMostTokens, op, ": logits must have 1 to ", kMostTokens,
              " tokens, got ", logits.size(-1));
}

Sampling check_sampling(const char* op, const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                        std::optional<double> top_p, std::optional<double> min_p,
                        const OptionalTensor& row_parameters) {
  check_logits(op, logits);
  TORCH_CHECK(temperature >= 0 && std::isfinite(temperature), op, ": temperature must be finite and not negative, got ",
              temperature);
  TORCH_CHECK(top_k.value_or(1) >= 1, op, ": top_k must be at least 1, or None for no filter, got ", *top_k);
  TORCH_CHECK(top_p.value_or(0) >= 0 && top_p.value_or(0) <= 1, op, ": top_p must be from 0 to 1, got ", *top_p);
  TORCH_CHECK(min_p.value_or(0) >= 0 && min_p.value_or(0) <= 1, op, ": min_p must be from 0 to 1, got ", *min_p);
  const int64_t rows = logits.dim() == 2 ? logits.size(0) : 1, vocabulary = logits.size(-1);
  if (row_parameters) check_row_parameters(op, *row_parameters, rows, logits);
  return {rows,
          vocabulary,
          kLog2e / static_cast<float>(temperature),
          static_cast<float>(top_k && *top_k < vocabulary ? *top_k : 0),
          static_cast<float>(top_p.value_or(1)),
          static_cast<float>(min_p.value_or(0)),
          row_parameters};
}

RandomState random_state(const Tensor& logits, std::optional<at::Generator> generator, std::optional<int64_t> seed,
                         std::optional<int64_t> offset, const OptionalTensor& state) {
  if (state) {
    TORCH_CHECK(state->scalar_type() == at::kLong && state->numel() == 2 && state->is_contiguous(),
                "sample: state must be a dense int64 tensor of seed and offset, got ", state->scalar_type(),
                " of shape ", state->sizes());
    TORCH_CHECK(state->device() == logits.device(), "sample: seed and offset must be on the device of logits, ",
                logits.device(), ", got ", state->device());
    return {0, 0, state};
  }
  const auto from = static_cast<uint64_t>(offset.value_or(0));
  if (seed) return {static_cast<uint64_t>(*seed), from, std::nullopt};
  at::Generator source = generator && generator->defined() ? *generator : at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(source.mutex());
  if (source.device().is_cpu()) return {source.get<at::CPUGeneratorImpl>()->random64(), from, std::nullopt};
  const c10::Device device = source.device();
  const bool on_device =  // one made for "cuda" has no index, and torch's kernels take it on any
      device.type() == logits.device().type() && (!device.has_index() || device == logits.device());
  TORCH_CHECK(on_device, "sample: generator must be the CPU's or that of ", logits.device(), ", got one of ", device);
  const uint64_t start = source.get_offset();
  source.set_offset(start + 4);  // what one thread of torch's own kernels takes at a time
  return {source.current_seed(), start + from, std::nullopt};
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

TokenFilter filter_of(const Sampling& call, int64_t row) {
  if (!call.row_parameters) return token_filter(call.scale, call.top_k, call.top_p, call.min_p);
  const float* values = elements<const float>(*call.row_parameters) + row * 4;
  return token_filter(values[0], std::min(values[1], static_cast<float>(kMostTokens)), values[2], values[3]);
}

template <class Function>
void for_each_row(const Tensor& logits, int64_t rows, int64_t vocabulary, const Function& function) {
  if (rows == 0) return;
  const Rows x = as_rows(logits, rows, vocabulary);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "sampling", [&] {
    const auto* data = elements<const scalar_t>(x.tensor);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) function(row, data + row * x.stride);
    });
  });
}

Tensor empty_ids(const Tensor& logits, at::ScalarType dtype) {
  return at::empty(logits.sizes().slice(0, logits.dim() - 1), logits.options().dtype(dtype));
}

}  // namespace

Tensor greedy_cpu(const Tensor& logits) {
  check_logits("greedy", logits);
  const int64_t rows = logits.dim() == 2 ? logits.size(0) : 1, vocabulary = logits.size(-1);
  const Tensor ids = empty_ids(logits, at::kLong);
  int64_t* const id = elements<int64_t>(ids);
  for_each_row(logits, rows, vocabulary,
               [&](int64_t row, const auto* values) { id[row] = first_maximum(values, vocabulary); });
  return ids;
}

Tensor filter_logits_cpu(const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                         std::optional<double> top_p, std::optional<double> min_p,
                         const OptionalTensor& row_parameters) {
  const Sampling call = check_sampling("filter_logits", logits, temperature, top_k, top_p, min_p, row_parameters);
  const Tensor output = at::empty(logits.sizes(), logits.options());
  for_each_row(logits, call.rows, call.vocabulary, [&](int64_t row, const auto* values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    Ranking<T> ranking(values, call.vocabulary, filter_of(call, row));
    ranking.write_kept(elements<T>(output) + row * call.vocabulary);
  });
  return output;
}

std::tuple<Tensor, Tensor> sample_cpu(const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                                      std::optional<double> top_p, std::optional<double> min_p,
                                      const OptionalTensor& row_parameters, std::optional<at::Generator> generator,
                                      std::optional<int64_t> seed, std::optional<int64_t> offset,
                                      const OptionalTensor& state, bool return_valid) {
  const Sampling call = check_sampling("sample", logits, temperature, top_k, top_p, min_p, row_parameters);
  RandomState random = random_state(logits, std::move(generator), seed, offset, state);
  if (random.tensor) {
    random.seed = static_cast<uint64_t>(elements<const int64_t>(*random.tensor)[0]);
    random.offset = static_cast<uint64_t>(elements<const int64_t>(*random.tensor)[1]);
  }
  const Tensor ids = empty_ids(logits, at::kLong), valid = empty_ids(logits, at::kBool);
  int64_t* const id = elements<int64_t>(ids);
  bool* const drawn = elements<bool>(valid);
  for_each_row(logits, call.rows, call.vocabulary, [&](int64_t row, const auto* values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    Ranking<T> ranking(values, call.vocabulary, filter_of(call, row));
    drawn[row] = ranking.anything();
    id[row] = drawn[row] ? ranking.draw(random_bits(random.seed, random.offset, static_cast<uint32_t>(row))) : 0;
  });
  if (!return_valid) {
    const bool* const invalid = std::find(drawn, drawn + call.rows, false);
    TORCH_CHECK(invalid == drawn + call.rows,
                "sample: logits must have a token that can be drawn in every row, but row ", invalid - drawn,
                " has only NaN and -inf; return_valid=True reports such rows instead");
  }
  return {ids, valid};
}

}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("filter_logits", torch_fused::differentiable_by_reference());
}
