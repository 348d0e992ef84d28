// Greedy choice, sampling and filtering of logits: schema, checks and the CPU kernels.
#include "sampling.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/argmax.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <string>
#include <string_view>

#include "common/autograd.h"
#include "common/checks.h"
#include "common/philox.h"
#include "common/registration.h"
#include "common/rows.h"
#include "common/torch_functions.h"
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
  m.def(
      "_next_token(Tensor logits, bool do_sample, float temperature=1.0, int? top_k=None, float? top_p=None, "
      "float? min_p=None) -> Tensor",
      {at::Tag::nondeterministic_seeded});
  m.def("_check_sampling_parameter(str op, str name, Tensor value) -> ()");
}

namespace torch_fused {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ---------------------------------------------------------------------------------------------------------

namespace {

bool is_temperature(double value) {
  return value >= 0 && std::isfinite(static_cast<float>(value));
}

void check_value(const char* op, std::string_view name, double value, int64_t row) {
  if (name == "temperature") {
    TORCH_CHECK(is_temperature(value), op, ": temperature must be finite and not negative, got ", value, " in row ",
                row);
  } else if (name == "top_k") {
    TORCH_CHECK(value >= 0 && value == std::floor(value), op,
                ": top_k must be a whole number, at least 1, or 0 for no filter, got ", value, " in row ", row);
  } else {
    TORCH_CHECK(value >= 0 && value <= 1, op, ": ", name, " must be from 0 to 1, got ", value, " in row ", row);
  }
}

void check_row_parameters(const char* op, const Tensor& parameters, int64_t rows, const Tensor& logits) {
  TORCH_CHECK(parameters.dim() == 2 && parameters.size(0) == rows && parameters.size(1) == 4 &&
                  parameters.is_contiguous() && parameters.scalar_type() == at::kFloat,
              op, ": row_parameters must be a dense float32 tensor of shape (", rows, ", 4), got ",
              parameters.scalar_type(), " of shape ", parameters.sizes());
  TORCH_CHECK(parameters.device() == logits.device(), op, ": row_parameters must be on the device of logits, ",
              logits.device(), ", got ", parameters.device());
  if (!parameters.is_cpu()) return;  // reading values would wait for the device
  const auto* values = elements<const float>(parameters);
  for (int64_t row = 0; row < rows; ++row) {
    for (const char* name : {"temperature", "top_k", "top_p", "min_p"}) check_value(op, name, *values++, row);
  }
}

// A parameter of one value or one a row, before it is rounded to float32 or sent to a GPU.
void check_parameter_cpu(c10::string_view op, c10::string_view name, const Tensor& value) {
  const Tensor values = value.to(at::kDouble).contiguous();
  for (int64_t row = 0; row < values.numel(); ++row) {
    check_value(std::string(op).c_str(), name, elements<const double>(values)[row], row);
  }
}

}  // namespace

void check_logits(const char* op, const Tensor& logits) {
  check_dtype(op, "logits", logits);
  TORCH_CHECK(logits.dim() == 1 || logits.dim() == 2, op, ": logits must be (vocabulary,) or (batch, vocabulary), got ",
              logits.sizes());
  TORCH_CHECK(logits.size(-1) > 0 && logits.size(-1) <= kMostTokens, op, ": logits must have 1 to ", kMostTokens,
              " tokens, got ", logits.size(-1));
}

void check_filters(const char* op, double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                   std::optional<double> min_p) {
  TORCH_CHECK(is_temperature(temperature), op, ": temperature must be finite and not negative, got ", temperature);
  TORCH_CHECK(top_k.value_or(1) >= 1, op, ": top_k must be at least 1, or None for no filter, got ", *top_k);
  TORCH_CHECK(top_p.value_or(0) >= 0 && top_p.value_or(0) <= 1, op, ": top_p must be from 0 to 1, got ", *top_p);
  TORCH_CHECK(min_p.value_or(0) >= 0 && min_p.value_or(0) <= 1, op, ": min_p must be from 0 to 1, got ", *min_p);
}

Sampling check_sampling(const char* op, const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                        std::optional<double> top_p, std::optional<double> min_p,
                        const OptionalTensor& row_parameters) {
  check_logits(op, logits);
  check_filters(op, temperature, top_k, top_p, min_p);
  const int64_t rows = logits.dim() == 2 ? logits.size(0) : 1, vocabulary = logits.size(-1);
  if (row_parameters) check_row_parameters(op, *row_parameters, rows, logits);
  const RowParameters parameters{
      static_cast<float>(temperature), static_cast<float>(top_k && *top_k < vocabulary ? *top_k : 0),
      static_cast<float>(min_p.value_or(0)), top_p.value_or(1) < 1 ? static_cast<uint64_t>(*top_p * 0x1p64) : kNoTopP};
  return {rows, vocabulary, parameters, row_parameters};
}

RandomSource::RandomSource(const Tensor& logits, std::optional<at::Generator> generator, std::optional<int64_t> seed,
                           std::optional<int64_t> offset, const OptionalTensor& state)
    : given_{static_cast<uint64_t>(seed.value_or(0)), static_cast<uint64_t>(offset.value_or(0)), state} {
  if (state) {
    TORCH_CHECK(state->scalar_type() == at::kLong && state->sizes() == at::IntArrayRef{2} && state->is_contiguous(),
                "sample: state must be a dense int64 tensor of seed and offset, (2,), got ", state->scalar_type(),
                " of shape ", state->sizes());
    TORCH_CHECK(state->device() == logits.device(), "sample: seed and offset must be on the device of logits, ",
                logits.device(), ", got ", state->device());
  }
  if (state || seed) return;
  generator_ = generator && generator->defined() ? *generator : at::detail::getDefaultCPUGenerator();
  const c10::Device device = generator_->device();
  const bool on_device =  // one made for "cuda" has no index, and torch's kernels take it on any
      device.type() == logits.device().type() && (!device.has_index() || device == logits.device());
  TORCH_CHECK(device.is_cpu() || on_device, "sample: generator must be the CPU's or that of ", logits.device(),
              ", got one of ", device);
}

RandomState RandomSource::take() const {
  if (!generator_) return given_;
  at::Generator source = *generator_;
  const std::lock_guard<std::mutex> lock(source.mutex());
  if (source.device().is_cpu()) return {source.get<at::CPUGeneratorImpl>()->random64(), given_.offset, std::nullopt};
  const uint64_t start = source.get_offset();
  source.set_offset(start + 4);  // what one thread of torch's own kernels takes at a time
  return {source.current_seed(), start + given_.offset, std::nullopt};
}

// ---- CPU ------------------------------------------------------------------------------------------------------------

namespace {

RowParameters parameters_of(const Sampling& call, int64_t row) {
  if (!call.row_parameters) return call.parameters;
  const float* values = elements<const float>(*call.row_parameters) + row * 4;
  return {values[0], std::min(values[1], static_cast<float>(kMostTokens)), values[3], top_p_of(values[2])};
}

template <class Function>
void for_each_row(const Rows& x, int64_t rows, const Function& function) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.tensor.scalar_type(), "sampling", [&] {
    const auto* data = elements<const scalar_t>(x.tensor);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) function(row, data + row * x.stride);
    });
  });
}

Tensor empty_ids(const Tensor& logits, at::ScalarType dtype) {
  return empty(logits.sizes().slice(0, logits.dim() - 1), logits.options().dtype(dtype));
}

}  // namespace

Tensor greedy_cpu(const Tensor& logits) {
  check_logits("greedy", logits);
  const int64_t rows = logits.dim() == 2 ? logits.size(0) : 1, vocabulary = logits.size(-1);
  const Tensor ids = empty_ids(logits, at::kLong);
  int64_t* const id = elements<int64_t>(ids);
  for_each_row(as_rows(logits, rows, vocabulary), rows,
               [&](int64_t row, const auto* values) { id[row] = first_maximum(values, vocabulary); });
  return ids;
}

Tensor filter_logits_cpu(const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                         std::optional<double> top_p, std::optional<double> min_p,
                         const OptionalTensor& row_parameters) {
  const Sampling call = check_sampling("filter_logits", logits, temperature, top_k, top_p, min_p, row_parameters);
  const Tensor output = empty(logits.sizes(), logits.options());
  for_each_row(as_rows(logits, call.rows, call.vocabulary), call.rows, [&](int64_t row, const auto* values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    const RowParameters parameters = parameters_of(call, row);
    const Ranking<T> ranking(values, call.vocabulary, parameters);
    ranking.write_kept(elements<T>(output) + row * call.vocabulary,
                       call.row_parameters ? parameters.temperature : temperature);
  });
  return output;
}

std::tuple<Tensor, Tensor> sample_cpu(const Tensor& logits, double temperature, std::optional<int64_t> top_k,
                                      std::optional<double> top_p, std::optional<double> min_p,
                                      const OptionalTensor& row_parameters, std::optional<at::Generator> generator,
                                      std::optional<int64_t> seed, std::optional<int64_t> offset,
                                      const OptionalTensor& state, bool return_valid) {
  const Sampling call = check_sampling("sample", logits, temperature, top_k, top_p, min_p, row_parameters);
  const RandomSource source(logits, std::move(generator), seed, offset, state);
  const Tensor ids = empty_ids(logits, at::kLong), valid = empty_ids(logits, at::kBool);
  int64_t* const id = elements<int64_t>(ids);
  bool* const can_draw = elements<bool>(valid);
  const Rows x = as_rows(logits, call.rows, call.vocabulary);
  for_each_row(x, call.rows,
               [&](int64_t row, const auto* values) { can_draw[row] = anything_in(values, call.vocabulary); });
  if (!return_valid) {
    const bool* const invalid = std::find(can_draw, can_draw + call.rows, false);
    TORCH_CHECK(invalid == can_draw + call.rows,
                "sample: logits must have a token that can be drawn in every row, but row ", invalid - can_draw,
                " has only NaN and -inf; return_valid=True reports such rows instead");
  }
  RandomState random = source.take();
  if (random.tensor) {
    random.seed = static_cast<uint64_t>(elements<const int64_t>(*random.tensor)[0]);
    random.offset = static_cast<uint64_t>(elements<const int64_t>(*random.tensor)[1]);
  }
  for_each_row(x, call.rows, [&](int64_t row, const auto* values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    id[row] = 0;
    if (!can_draw[row]) return;
    const Ranking<T> ranking(values, call.vocabulary, parameters_of(call, row));
    id[row] = ranking.draw(random_bits(random.seed, random.offset, static_cast<uint32_t>(row)));
  });
  return {ids, valid};
}

// ---- the next token of a generation ---------------------------------------------------------------------------------

namespace {

Tensor next_token(const Tensor& logits, bool do_sample, double temperature, std::optional<int64_t> top_k,
                  std::optional<double> top_p, std::optional<double> min_p) {
  static const auto sample = find_op<decltype(sample_cpu)>("torch_fused::sample");
  static const auto greedy = find_op<decltype(greedy_cpu)>("torch_fused::greedy");
  if (!do_sample) return greedy.call(logits);
  return std::get<0>(sample.call(logits, temperature, top_k, top_p, min_p, std::nullopt, std::nullopt, std::nullopt,
                                 std::nullopt, std::nullopt, false));
}

// Where there are no probabilities to draw from, an error as from torch.multinomial; the argmax is torch's, which takes
// the first NaN.
Tensor next_token_cpu(const Tensor& logits, bool do_sample, double temperature, std::optional<int64_t> top_k,
                      std::optional<double> top_p, std::optional<double> min_p) {
  check_logits("_next_token", logits);
  const int64_t rows = logits.dim() == 2 ? logits.size(0) : 1, vocabulary = logits.size(-1);
  std::vector<char> lacks(rows);
  for_each_row(as_rows(logits, rows, vocabulary), rows,
               [&](int64_t row, const auto* values) { lacks[row] = has_nan_or_inf(values, vocabulary); });
  const auto first = std::find(lacks.begin(), lacks.end(), true);
  if (first != lacks.end()) {
    TORCH_CHECK(!do_sample,
                "sample: logits must have no NaN or +inf to draw the next token of a generation from, but "
                "row ",
                first - lacks.begin(), " has");
    return logits.argmax(-1);
  }
  return next_token(logits, do_sample, temperature, top_k, top_p, min_p);
}

}  // namespace
}  // namespace torch_fused

TORCH_LIBRARY_IMPL(torch_fused, CompositeExplicitAutograd, m) {
  m.impl("_next_token", torch_fused::next_token);
}
TORCH_LIBRARY_IMPL(torch_fused, CPU, m) {
  m.impl("_next_token", torch_fused::next_token_cpu);
  m.impl("_check_sampling_parameter", torch_fused::check_parameter_cpu);
}
TORCH_LIBRARY_IMPL(torch_fused, Autograd, m) {
  m.impl("filter_logits", torch_fused::differentiable_by_reference());
}

TORCH_FUSED_KERNELS(greedy)
TORCH_FUSED_KERNELS(filter_logits)
TORCH_FUSED_KERNELS(sample)
