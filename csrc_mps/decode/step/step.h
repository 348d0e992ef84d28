// The phases of a step, compiled once for each instruction set, in a namespace of its own. Each member of the team runs
// all of them and takes its share of each; small work, such as a norm, every member does for itself, which is faster
// than to meet.
#pragma once

#include <algorithm>

#include "../../common/convert.h"
#include "../../common/exp.h"
#include "../cpu_step.h"
#include "../team.h"
#include "attention.h"
#include "formats.h"
#include "norm.h"
#include "products.h"

namespace torch_fused::TORCH_FUSED_TARGET {

enum class Write { kSet, kAdd };

// Vectors (count, cols) that a member multiplies with rows of some matrices. For packed rows it makes them ready once.
class Inputs {
 public:
  Inputs(const CpuStep& s, const Team& team, const float* x, int64_t count)
      : x(x), count(count), memory_(s.ready + team.member() * s.ready_size()) {}

  const ReadyVectors& ready_for(const Matrix& matrix) {
    if (!ready_.serve(matrix.packed, matrix.int8)) ready_.prepare(matrix.packed, x, count, matrix.int8, memory_);
    return ready_;
  }

  const float* const x;
  const int64_t count;

 private:
  float* memory_;
  ReadyVectors ready_;
};

// Products with one row, of vector i in results[i * n], to to[i * stride + row].
template <Write write>
TORCH_FUSED_INLINE void put_results(const Matrix& matrix, int64_t row, const float* results, int64_t n, int64_t count,
                                    float* to, int64_t stride) {
  const float bias = matrix.bias.data ? matrix.bias[row] : 0;
  for (int64_t i = 0; i < count; ++i) {
    float& result = to[i * stride + row];
    result = (write == Write::kAdd ? result : 0) + results[i * n] + bias;
  }
}

template <Write write, class T>
TORCH_FUSED_INLINE void project_rows(const Matrix& matrix, const T* weight, Range rows, const Inputs& x, float* to,
                                     int64_t stride) {
  float results[kMostVectors];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    row_products(weight + row * matrix.stride, matrix.cols, {x.x, matrix.cols}, x.count, results);
    put_results<write>(matrix, row, results, 1, x.count, to, stride);
  }
}

template <Write write>
void project_packed(const Matrix& matrix, Range rows, Inputs& x, float* to, int64_t stride) {
  constexpr int64_t kAtOnce = 64;
  float results[kAtOnce * kMostVectors];
  const ReadyVectors& ready = x.ready_for(matrix);
  for (int64_t begin = rows.begin; begin < rows.end; begin += kAtOnce) {
    const int64_t n = std::min(kAtOnce, rows.end - begin);
    ready.multiply(matrix.packed, begin, begin + n, results, n);
    for (int64_t i = 0; i < n; ++i) put_results<write>(matrix, begin + i, results + i, n, x.count, to, stride);
  }
}

// Rows begin .. end - 1 of the product; result `row` of vector i goes to to[i * stride + row].
template <Write write>
void project(const Matrix& matrix, Range rows, Inputs& x, float* to, int64_t stride) {
  if (matrix.packed.bits > 0) return project_packed<write>(matrix, rows, x, to, stride);
  with_format(matrix.format, matrix.weight, [&](const auto* weight) __attribute__((always_inline)) {
    project_rows<write>(matrix, weight, rows, x, to, stride);
  });
}

TORCH_FUSED_INLINE void unpack_row(const PackedMatrix& m, int64_t row, float* to) {
  const auto* codes = reinterpret_cast<const uint8_t*>(m.weight + row * m.stride);
  const Vector scales{m.scales, m.format}, biases{m.biases, m.format};
  for (int64_t i = 0; i < m.cols; ++i) {
    const int64_t group = i / m.group_size;
    const int code = m.bits == 8 ? codes[i] : codes[i / 2] >> (i % 2 * 4) & 15;
    to[i] = scales[row * m.scales_stride + group] * static_cast<float>(code) + biases[row * m.biases_stride + group];
  }
}

TORCH_FUSED_INLINE void embed(const CpuStep& s, const Team& team) {
  const Range share = team.share(s.tokens());
  if (s.embedding.packed.bits > 0) {
    for (int64_t token = share.begin; token < share.end; ++token) {
      unpack_row(s.embedding.packed, s.token_ids[token], s.states + token * s.hidden);
    }
    return;
  }
  with_format(s.embedding.format, s.embedding.weight, [&](const auto* rows) __attribute__((always_inline)) {
    for (int64_t token = share.begin; token < share.end; ++token) {
      const auto* row = rows + s.token_ids[token] * s.embedding.stride;
      for (int64_t i = 0; i < s.hidden; ++i) s.states[token * s.hidden + i] = widen(row[i]);
    }
  });
}

TORCH_FUSED_INLINE void attention(const CpuStep& s, const StepLayer& layer, const Team& team, float* own) {
  const int64_t tokens = s.tokens(), projected = s.projected();
  for (int64_t token = 0; token < tokens; ++token) {
    normed(s.states + token * s.hidden, layer.input_norm, s.hidden, s.eps, own + token * s.hidden);
  }
  const Range rows = team.share(projected);
  Inputs states(s, team, own, tokens);
  int64_t first = 0;
  for (const Matrix* matrix : {&layer.q, &layer.k, &layer.v}) {
    project<Write::kSet>(*matrix, rows.part(first, matrix->rows), states, s.qkv + first, projected);
    first += matrix->rows;
  }
  team.meet();

  const Range units = team.share(s.batch * s.kv_heads * s.chunks);
  with_format(s.cache_format, layer.keys.data, [&](auto* keys) __attribute__((always_inline)) {
    const Context context(layer, keys);
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const int64_t head = unit / s.chunks;
      attend(s, context, head / s.kv_heads, head % s.kv_heads, unit % s.chunks, own);
    }
  });
  team.meet();

  combine_chunks(s, own);
  Inputs attended(s, team, own, tokens);
  project<Write::kAdd>(layer.o, team.share(s.hidden), attended, s.states, s.hidden);
  team.meet();
}

TORCH_FUSED_INLINE void feed_forward(const CpuStep& s, const StepLayer& layer, const Team& team, float* own) {
  const int64_t tokens = s.tokens();
  for (int64_t token = 0; token < tokens; ++token) {
    normed(s.states + token * s.hidden, layer.post_attention_norm, s.hidden, s.eps, own + token * s.hidden);
  }
  const Range rows = team.share(s.intermediate);
  Inputs states(s, team, own, tokens);
  project<Write::kSet>(layer.gate, rows, states, s.gates, s.intermediate);
  project<Write::kSet>(layer.up, rows, states, s.ups, s.intermediate);
  for (int64_t token = 0; token < tokens; ++token) {
    float* gates = s.gates + token * s.intermediate;
    const float* ups = s.ups + token * s.intermediate;
    for (int64_t i = rows.begin; i < rows.end; ++i) gates[i] *= ups[i] / one_plus_exp(-gates[i]);
  }
  team.meet();

  Inputs gated(s, team, s.gates, tokens);
  project<Write::kAdd>(layer.down, team.share(s.hidden), gated, s.states, s.hidden);
  team.meet();
}

TORCH_FUSED_INLINE void logits(const CpuStep& s, const Team& team, float* own) {
  for (int64_t i = 0; i < s.batch * s.kept; ++i) {
    const int64_t token = i / s.kept * s.steps + s.steps - s.kept + i % s.kept;
    normed(s.states + token * s.hidden, s.norm, s.hidden, s.eps, own + i * s.hidden);
  }
  Inputs last(s, team, own, s.batch * s.kept);
  project<Write::kSet>(s.head, team.share(s.vocabulary), last, s.logits, s.vocabulary);
}

void run_step(const CpuStep& s, const Team& team) {
  float* own = s.own + team.member() * s.own_size();
  embed(s, team);
  team.meet();
  for (const StepLayer& layer : s.layers) {
    attention(s, layer, team, own);
    feed_forward(s, layer, team, own);
  }
  logits(s, team, own);
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
