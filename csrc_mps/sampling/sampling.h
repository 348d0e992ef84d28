// What sampling.cpp (CPU) and sampling_launch.cpp (GPU) share: the kernels' signatures and the checked call.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "common/token_weight.h"

namespace torch_fused {

constexpr int64_t kMostTokens = 1 << 20;  // sums of weights stay below 2^60

// One checked call: logits as rows, and the parameters, for all rows or in a (rows, 4) float32 tensor: temperature,
// top_k, top_p, min_p, where 0 is no top_k.
struct Sampling {
  int64_t rows;
  int64_t vocabulary;
  RowParameters parameters;
  std::optional<at::Tensor> row_parameters;
};

// Where the random numbers come from: a (2,) int64 tensor of seed and offset, or the two numbers.
struct RandomState {
  uint64_t seed, offset;
  std::optional<at::Tensor> tensor;
};

// Checks where they come from, and takes them from a generator only when asked to: an op that raises moves none.
class RandomSource {
 public:
  RandomSource(const at::Tensor& logits, std::optional<at::Generator> generator, std::optional<int64_t> seed,
               std::optional<int64_t> offset, const std::optional<at::Tensor>& state);
  RandomState take() const;

 private:
  RandomState given_;
  std::optional<at::Generator> generator_;
};

void check_logits(const char* op, const at::Tensor& logits);
void check_filters(const char* op, double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                   std::optional<double> min_p);
Sampling check_sampling(const char* op, const at::Tensor& logits, double temperature, std::optional<int64_t> top_k,
                        std::optional<double> top_p, std::optional<double> min_p,
                        const std::optional<at::Tensor>& row_parameters);

at::Tensor greedy_cpu(const at::Tensor& logits);
at::Tensor greedy_gpu(const at::Tensor& logits);

using FilterLogitsSignature = at::Tensor(const at::Tensor& logits, double temperature, std::optional<int64_t> top_k,
                                         std::optional<double> top_p, std::optional<double> min_p,
                                         const std::optional<at::Tensor>& row_parameters);
FilterLogitsSignature filter_logits_cpu, filter_logits_gpu;

// (ids, valid). On the CPU a row with nothing to draw is an error unless return_valid.
using SampleSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& logits, double temperature,
                                                           std::optional<int64_t> top_k, std::optional<double> top_p,
                                                           std::optional<double> min_p,
                                                           const std::optional<at::Tensor>& row_parameters,
                                                           std::optional<at::Generator> generator,
                                                           std::optional<int64_t> seed, std::optional<int64_t> offset,
                                                           const std::optional<at::Tensor>& state, bool return_valid);
SampleSignature sample_cpu, sample_gpu;

}  // namespace torch_fused
