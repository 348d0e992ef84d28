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

// Rows begin .. end - 1 of the product of `count` vectors; result `row` of vector i goes to to[i * stride + row].
template <Write write, class T>
TORCH_FUSED_INLINE void project_rows(const Matrix& matrix, const T* weight, Range rows, const float* x, int64_t count,
                                     float* to, int64_t stride) {
  float results[kMostVectors];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    row_products(weight + row * matrix.stride, matrix.cols, {x, matrix.cols}, count, results);
    const float bias = matrix.bias.data ? matrix.bias[row] : 0;
    for (int64_t i = 0; i < count; ++i) {
      float& result = to[i * stride + row];
      result = (write == Write::kAdd ? result : 0) + results[i] + bias;
    }
  }
}

template <Write write>
void project(const Matrix& matrix, Range rows, const float* x, int64_t count, float* to, int64_t stride) {
  with_format(matrix.format, matrix.weight, [&](const auto* weight) __attribute__((always_inline)) {
    project_rows<write>(matrix, weight, rows, x, count, to, stride);
  });
}

TORCH_FUSED_INLINE void embed(const CpuStep& s, const Team& team) {
  const Range share = team.share(s.tokens());
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
  int64_t first = 0;
  for (const Matrix* matrix : {&layer.q, &layer.k, &layer.v}) {
    project<Write::kSet>(*matrix, rows.part(first, matrix->rows), own, tokens, s.qkv + first, projected);
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
  project<Write::kAdd>(layer.o, team.share(s.hidden), own, tokens, s.states, s.hidden);
  team.meet();
}

TORCH_FUSED_INLINE void feed_forward(const CpuStep& s, const StepLayer& layer, const Team& team, float* own) {
  const int64_t tokens = s.tokens();
  for (int64_t token = 0; token < tokens; ++token) {
    normed(s.states + token * s.hidden, layer.post_attention_norm, s.hidden, s.eps, own + token * s.hidden);
  }
  const Range rows = team.share(s.intermediate);
  project<Write::kSet>(layer.gate, rows, own, tokens, s.gates, s.intermediate);
  project<Write::kSet>(layer.up, rows, own, tokens, s.ups, s.intermediate);
  for (int64_t token = 0; token < tokens; ++token) {
    float* gates = s.gates + token * s.intermediate;
    const float* ups = s.ups + token * s.intermediate;
    for (int64_t i = rows.begin; i < rows.end; ++i) gates[i] *= ups[i] / one_plus_exp(-gates[i]);
  }
  team.meet();

  project<Write::kAdd>(layer.down, team.share(s.hidden), s.gates, tokens, s.states, s.hidden);
  team.meet();
}

TORCH_FUSED_INLINE void logits(const CpuStep& s, const Team& team, float* own) {
  for (int64_t i = 0; i < s.batch * s.kept; ++i) {
    const int64_t token = i / s.kept * s.steps + s.steps - s.kept + i % s.kept;
    normed(s.states + token * s.hidden, s.norm, s.hidden, s.eps, own + i * s.hidden);
  }
  project<Write::kSet>(s.head, team.share(s.vocabulary), own, s.batch * s.kept, s.logits, s.vocabulary);
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
