// The phases of a step, compiled once per instruction set, in separate namespaces. Each member of the team runs
// its share of each. Small work, such as a norm, is done by every member itself, which is faster
// than a barrier.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../common/activation.h"
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

// Where result `row` of vector i goes, times `scale`: data[i * stride + row].
struct Results {
  float* data;
  int64_t stride;
  float scale = 1;
};

// Vectors (count, cols) that a member multiplies by rows of some matrices. For packed rows it prepares them once.
class Inputs {
 public:
  Inputs(const CpuStep& s, const Team& team, const float* x, int64_t count)
      : x(x), count(count), memory_(s.ready + team.member() * s.ready_size()) {}
  Inputs(const float* x, int64_t count) : x(x), count(count), memory_(nullptr) {}  // of dense rows alone

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

// Products with one row, of vector i in results[i * n].
template <Write write>
TORCH_FUSED_INLINE void put_results(const Matrix& matrix, int64_t row, const float* results, int64_t n, int64_t count,
                                    const Results& to) {
  const float bias = matrix.bias.data ? matrix.bias[row] : 0;
  for (int64_t i = 0; i < count; ++i) {
    float& result = to.data[i * to.stride + row];
    result = (write == Write::kAdd ? result : 0) + (results[i * n] + bias) * to.scale;
  }
}

template <Write write, class T>
TORCH_FUSED_INLINE void project_rows(const Matrix& matrix, const T* weight, Range rows, const Inputs& x,
                                     const Results& to) {
  float results[kMostVectors];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    row_products(weight + row * matrix.stride, matrix.cols, {x.x, matrix.cols}, x.count, results);
    put_results<write>(matrix, row, results, 1, x.count, to);
  }
}

template <Write write>
void project_packed(const Matrix& matrix, Range rows, Inputs& x, const Results& to) {
  constexpr int64_t kAtOnce = 64;
  float results[kAtOnce * kMostVectors];
  const ReadyVectors& ready = x.ready_for(matrix);
  if (write == Write::kSet && !matrix.bias.data && to.scale == 1) {
    return ready.multiply(matrix.packed, rows.begin, rows.end, to.data + rows.begin, to.stride);
  }
  for (int64_t begin = rows.begin; begin < rows.end; begin += kAtOnce) {
    const int64_t n = std::min(kAtOnce, rows.end - begin);
    ready.multiply(matrix.packed, begin, begin + n, results, n);
    for (int64_t i = 0; i < n; ++i) put_results<write>(matrix, begin + i, results + i, n, x.count, to);
  }
}

template <Write write>
void project_dense(const Matrix& matrix, Range rows, const Inputs& x, const Results& to) {
  with_format(matrix.format, matrix.weight, [&](const auto* weight) __attribute__((always_inline)) {
    project_rows<write>(matrix, weight, rows, x, to);
  });
}

// Adds b * thin to one vector, for a rank of whole registers: no row waits for the sum of the one before it.
template <class T>
TORCH_FUSED_INLINE void add_low_rank(const Matrix& b, const T* weight, Range rows, const float* thin,
                                     const Results& to) {
  constexpr int kRows = 8;
  int64_t row = rows.begin;
  for (; row + kRows <= rows.end; row += kRows) {
    Lanes sums[kRows] = {};
    for (int64_t i = 0; i < b.cols; i += kLanes) {
      Lanes low, values;
      load(thin + i, low);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        load(weight + (row + r) * b.stride + i, values);
        sums[r] += values * low;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) to.data[row + r] += sum_of(sums[r]) * to.scale;
  }
  for (; row < rows.end; ++row) {
    float result;
    row_products<1>(weight + row * b.stride, b.cols, {thin, b.cols}, 0, &result);
    to.data[row] += result * to.scale;
  }
}

// What an adapter adds to some rows. Every member with rows computes a * x itself, because it is small.
inline void add_adapter(const MatrixAdapter& adapter, Range rows, const Inputs& x, const Results& to) {
  if (rows.begin >= rows.end) return;
  float thin[kMostVectors * kMostRank];
  const int64_t rank = adapter.a.rows;
  project_dense<Write::kSet>(adapter.a, {0, rank}, x, {thin, rank});
  const Results low{to.data, to.stride, to.scale * adapter.scale};
  if (x.count == 1 && rank % kLanes == 0) {
    with_format(adapter.b.format, adapter.b.weight, [&](const auto* weight) __attribute__((always_inline)) {
      add_low_rank(adapter.b, weight, rows, thin, low);
    });
  } else {
    project_dense<Write::kAdd>(adapter.b, rows, Inputs(thin, x.count), low);
  }
}

// Rows begin .. end - 1 of the product.
template <Write write>
void project(const Matrix& matrix, Range rows, Inputs& x, const Results& to) {
  if (matrix.packed.bits > 0) {
    project_packed<write>(matrix, rows, x, to);
  } else {
    project_dense<write>(matrix, rows, x, to);
  }
  for (const MatrixAdapter& adapter : matrix.adapters) add_adapter(adapter, rows, x, to);
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
      float* state = s.states + token * s.hidden;
      unpack_row(s.embedding.packed, s.token_ids[token], state);
      for (int64_t i = 0; i < s.hidden; ++i) state[i] *= s.embedding_scale;
    }
    return;
  }
  with_format(s.embedding.format, s.embedding.weight, [&](const auto* rows) __attribute__((always_inline)) {
    for (int64_t token = share.begin; token < share.end; ++token) {
      const auto* row = rows + s.token_ids[token] * s.embedding.stride;
      for (int64_t i = 0; i < s.hidden; ++i) s.states[token * s.hidden + i] = widen(row[i]) * s.embedding_scale;
    }
  });
}

// The states as attention and the feed-forward layers take them, in a member's own memory.
TORCH_FUSED_INLINE void normed_states(const CpuStep& s, const Vector& norm, float* own) {
  for (int64_t token = 0; token < s.tokens(); ++token) {
    const float* state = s.states + token * s.hidden;
    if (norm.data) {
      normed(state, norm, s.hidden, {s.eps, s.norm_offset}, own + token * s.hidden);
    } else {
      std::copy_n(state, s.hidden, own + token * s.hidden);
    }
  }
}

// Adds a product to the states; with a norm, after the whole product is computed.
TORCH_FUSED_INLINE void add_output(const CpuStep& s, const Matrix& matrix, const Vector& norm, const Team& team,
                                   Inputs& x, float* own) {
  const Range rows = team.share(s.hidden);
  if (!norm.data) {
    project<Write::kAdd>(matrix, rows, x, {s.states, s.hidden, s.residual_scale});
  } else {
    project<Write::kSet>(matrix, rows, x, {s.output, s.hidden});
    team.meet();
    const Range tokens = team.share(s.tokens());
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      normed(s.output + token * s.hidden, norm, s.hidden, {s.eps, s.norm_offset}, own);
      float* state = s.states + token * s.hidden;
      for (int64_t i = 0; i < s.hidden; ++i) state[i] += own[i] * s.residual_scale;
    }
  }
  team.meet();
}

// Norms of all heads of queries or keys as one, in place.
TORCH_FUSED_INLINE void norm_heads(const CpuStep& s, const StepLayer& layer, const Team& team, float* own) {
  const auto apply = [&](const Vector& norm, int64_t size, int64_t first) {
    const Range tokens = team.share(s.tokens());
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      float* heads = s.qkv + token * s.projected() + first;
      normed(heads, norm, size, {s.eps, s.norm_offset}, own);
      std::copy_n(own, size, heads);
    }
  };
  const bool queries = layer.q_norm_size > s.head_dim, keys = layer.k_norm_size > s.head_dim;
  if (queries) apply(layer.q_norm, layer.q_norm_size, 0);
  if (keys) apply(layer.k_norm, layer.k_norm_size, s.heads * s.head_dim);
  if (queries || keys) team.meet();
}

// activation(gate) * up in place of some gates.
template <uint32_t activation>
TORCH_FUSED_INLINE void gate(Range columns, float* gates, const float* ups) {
  for (int64_t i = columns.begin; i < columns.end; ++i) gates[i] = activate<activation>(gates[i]) * ups[i];
}

TORCH_FUSED_INLINE void gate(uint32_t activation, Range columns, float* gates, const float* ups) {
  if (activation == kSilu) return gate<kSilu>(columns, gates, ups);
  activation == kGelu ? gate<kGelu>(columns, gates, ups) : gate<kGeluTanh>(columns, gates, ups);
}

TORCH_FUSED_INLINE void attention(const CpuStep& s, const StepLayer& layer, const Team& team, float* own) {
  const int64_t tokens = s.tokens(), projected = s.projected();
  normed_states(s, layer.input_norm, own);
  const Range rows = team.share(projected);
  Inputs states(s, team, own, tokens);
  int64_t first = 0;
  for (const Matrix* matrix : {&layer.q, &layer.k, &layer.v}) {
    project<Write::kSet>(*matrix, rows.part(first, matrix->rows), states, {s.qkv + first, projected});
    first += matrix->rows;
  }
  team.meet();
  norm_heads(s, layer, team, own);

  const Range units = team.share(s.batch * s.kv_heads * s.chunks);
  with_format(s.cache_format, layer.keys.data, [&](auto* keys) __attribute__((always_inline)) {
    const Context context(s, layer, keys);
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const int64_t head = unit / s.chunks;
      attend(s, context, head / s.kv_heads, head % s.kv_heads, unit % s.chunks, own);
    }
  });
  team.meet();

  combine_chunks(s, own);
  Inputs attended(s, team, own, tokens);
  add_output(s, layer.o, layer.attention_output_norm, team, attended, own);
}

TORCH_FUSED_INLINE void feed_forward(const CpuStep& s, const StepLayer& layer, const Team& team, float* own) {
  const int64_t tokens = s.tokens();
  const int64_t intermediate = layer.gate.rows;
  normed_states(s, layer.post_attention_norm, own);
  const Range rows = team.share(intermediate);
  Inputs states(s, team, own, tokens);
  project<Write::kSet>(layer.gate, rows, states, {s.gates, intermediate});
  project<Write::kSet>(layer.up, rows, states, {s.ups, intermediate});
  for (int64_t token = 0; token < tokens; ++token) {
    gate(s.activation, rows, s.gates + token * intermediate, s.ups + token * intermediate);
  }
  team.meet();

  Inputs gated(s, team, s.gates, tokens);
  add_output(s, layer.down, layer.feed_forward_output_norm, team, gated, own);
}

// An expert of a token, and its weight.
struct Choice {
  int64_t expert;
  float weight;
};

// The experts with the largest logits, weighted by the softmax of all, or of the chosen ones.
TORCH_FUSED_INLINE void choose_experts(const CpuStep& s, const float* logits, int64_t experts, Choice* choices) {
  float largest = logits[0], sum = 0, chosen = 0;
  for (int64_t e = 1; e < experts; ++e) largest = std::max(largest, logits[e]);
  for (int64_t e = 0; e < experts; ++e) sum += std::exp(logits[e] - largest);
  bool taken[kMostExperts] = {};
  for (int64_t k = 0; k < s.chosen; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
    }
    taken[best] = true;
    choices[k] = {best, std::exp(logits[best] - largest) / sum};
    chosen += choices[k].weight;
  }
  for (int64_t k = 0; k < s.chosen && s.normalise_experts; ++k) choices[k].weight /= chosen;
}

// Feed-forward layers of which each token takes a few, and one that all share, if there is one. The gates of a token
// are those of the shared one, then those of its experts.
TORCH_FUSED_INLINE void feed_forward_of_experts(const CpuStep& s, const StepLayer& layer, const Team& team,
                                                float* own) {
  const int64_t tokens = s.tokens(), experts = layer.router.rows, routes = s.experts + 1;
  const int64_t shared = layer.gate.rows, each = layer.experts_gate.first.rows;
  normed_states(s, layer.post_attention_norm, own);
  Inputs states(s, team, own, tokens);
  project<Write::kSet>(layer.router, team.share(experts), states, {s.routes, routes});
  if (layer.shared_gate.rows > 0) {
    project<Write::kSet>(layer.shared_gate, team.share(1), states, {s.routes + s.experts, routes});
  }
  team.meet();

  Choice choices[kMostVectors * kMostChosen];
  const Range rows = team.share(shared), rows_of_experts = team.share(s.chosen * each);
  for (int64_t token = 0; token < tokens; ++token) {
    float *gates = s.gates + token * s.intermediate, *ups = s.ups + token * s.intermediate;
    Inputs state(s, team, own + token * s.hidden, 1);
    if (shared > 0) {
      project<Write::kSet>(layer.gate, rows, state, {gates, shared});
      project<Write::kSet>(layer.up, rows, state, {ups, shared});
      gate(s.activation, rows, gates, ups);
    }
    choose_experts(s, s.routes + token * routes, experts, choices + token * s.chosen);
    for (int64_t k = 0; k < s.chosen; ++k) {
      const int64_t expert = choices[token * s.chosen + k].expert, first = shared + k * each;
      const Range part = rows_of_experts.part(k * each, each);
      project_dense<Write::kSet>(layer.experts_gate[expert], part, state, {gates + first, each});
      project_dense<Write::kSet>(layer.experts_up[expert], part, state, {ups + first, each});
      gate(s.activation, part, gates + first, ups + first);
    }
  }
  team.meet();

  const Range results = team.share(s.hidden);
  for (int64_t token = 0; token < tokens; ++token) {
    const float* gates = s.gates + token * s.intermediate;
    float* state = s.states + token * s.hidden;
    if (shared > 0) {
      Inputs gated(s, team, gates, 1);
      const float weight = layer.shared_gate.rows > 0 ? 1 / one_plus_exp(-s.routes[token * routes + s.experts]) : 1;
      project<Write::kAdd>(layer.down, results, gated, {state, s.hidden, weight * s.residual_scale});
    }
    for (int64_t k = 0; k < s.chosen; ++k) {
      const Choice& choice = choices[token * s.chosen + k];
      const Inputs gated(gates + shared + k * each, 1);
      project_dense<Write::kAdd>(layer.experts_down[choice.expert], results, gated,
                                 {state, s.hidden, choice.weight * s.residual_scale});
    }
  }
  team.meet();
}

TORCH_FUSED_INLINE void logits(const CpuStep& s, const Team& team, float* own) {
  for (int64_t i = 0; i < s.batch * s.kept; ++i) {
    const int64_t token = i / s.kept * s.steps + s.steps - s.kept + i % s.kept;
    normed(s.states + token * s.hidden, s.norm, s.hidden, {s.eps, s.norm_offset}, own + i * s.hidden);
  }
  Inputs last(s, team, own, s.batch * s.kept);
  project<Write::kSet>(s.head, team.share(s.vocabulary), last, {s.logits, s.vocabulary});
}

void run_step(const CpuStep& s, const Team& team) {
  float* own = s.own + team.member() * s.own_size();
  embed(s, team);
  team.meet();
  for (const StepLayer& layer : s.layers) {
    attention(s, layer, team, own);
    if (layer.router.rows > 0) {
      feed_forward_of_experts(s, layer, team, own);
    } else {
      feed_forward(s, layer, team, own);
    }
  }
  logits(s, team, own);
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
