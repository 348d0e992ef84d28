// Attention of the new tokens over the cache: a chunk of one sequence's context at a time, then the chunks together.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../../common/convert.h"
#include "../../common/exp.h"
#include "../cpu_step.h"
#include "formats.h"
#include "norm.h"
#include "products.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// A head of a query or key: normed if the model has a norm for it, then rotated by its position's angles, half-split.
TORCH_FUSED_INLINE void place_head(const CpuStep& s, const StepLayer& layer, const float* from, const Vector* norm,
                                   int64_t position, float* to) {
  if (norm) {
    normed(from, *norm, s.head_dim, {s.eps, s.norm_offset}, to);
  } else {
    std::copy_n(from, s.head_dim, to);
  }
  with_format(layer.cos.format, layer.cos.data, [&](const auto* table) __attribute__((always_inline)) {
    const auto* cos = table + position * layer.rotary_dim;
    const auto* sin = static_cast<decltype(table)>(layer.sin.data) + position * layer.rotary_dim;
    const int64_t half = layer.rotary_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float a = to[i], b = to[half + i];
      to[i] = a * widen(cos[i]) - b * widen(sin[i]);
      to[half + i] = b * widen(cos[half + i]) + a * widen(sin[half + i]);
    }
  });
}

// A layer with its cache as T.
template <class T>
struct Context {
  const StepLayer& layer;
  const Vector *q_norm, *k_norm;  // of each head; null for none
  CacheStates<T> keys, values;

  Context(const CpuStep& s, const StepLayer& layer, T* keys)
      : layer(layer),
        q_norm(layer.q_norm_size == s.head_dim ? &layer.q_norm : nullptr),
        k_norm(layer.k_norm_size == s.head_dim ? &layer.k_norm : nullptr),
        keys{keys, layer.keys.batch_stride, layer.keys.head_stride, layer.keys.slot_stride, layer.keys.first},
        values{static_cast<T*>(layer.values.data), layer.values.batch_stride, layer.values.head_stride,
               layer.values.slot_stride, layer.values.first} {}
};

// Writes the new keys and values of one head; `head` is room for one.
template <class T>
TORCH_FUSED_INLINE void append(const CpuStep& s, const Context<T>& context, int64_t batch, int64_t kv_head,
                               float* head) {
  for (int64_t step = 0; step < s.steps; ++step) {
    const int64_t token = batch * s.steps + step;
    const float* key = s.qkv + token * s.projected() + (s.heads + kv_head) * s.head_dim;
    const float* value = key + s.kv_heads * s.head_dim;
    place_head(s, context.layer, key, context.k_norm, s.positions[token], head);
    T* to_key = context.keys.at(batch, kv_head, s.length + step);
    T* to_value = context.values.at(batch, kv_head, s.length + step);
    for (int64_t i = 0; i < s.head_dim; ++i) {
      to_key[i] = narrow<T>(head[i]);
      to_value[i] = narrow<T>(value[i]);
    }
  }
}

// The attention state of the queries that share a key: weighted sums of values, to be divided by `sums`.
struct Attended {
  float* queries;  // (queries, head_dim), scaled
  float* values;   // (queries, head_dim)
  float* scores;   // (queries, kKeyBlock)
  float* maxima;   // (queries)
  float* sums;     // (queries)
};

// Consecutive slots of one head's keys or values.
template <class T>
struct Slots {
  const T* data;
  int64_t stride, count, head_dim;
};

// Products of N keys with C queries, which are head_dim apart; those with one query are kKeyBlock apart in `scores`.
template <int N, int C, class T>
TORCH_FUSED_INLINE void score(const Slots<T>& keys, int64_t first, const float* queries, float* scores) {
  const int64_t dim = keys.head_dim;
  const T* rows[N];
  for (int k = 0; k < N; ++k) rows[k] = keys.data + (first + k) * keys.stride;
  Lanes sums[N][C] = {}, key[N], query;
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) load(rows[k] + i, key[k]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      load(queries + c * dim + i, query);
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) sums[k][c] += key[k] * query;
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float result = sum_of(sums[k][c]);
      for (int64_t j = i; j < dim; ++j) result += widen(rows[k][j]) * queries[c * dim + j];
      scores[c * kKeyBlock + first + k] = result;
    }
  }
}

template <int C, class T>
TORCH_FUSED_INLINE void score(const Slots<T>& keys, const float* queries, float* scores) {
  int64_t k = 0;
  for (; k + 2 <= keys.count; k += 2) score<2, C>(keys, k, queries, scores);
  if (k < keys.count) score<1, C>(keys, k, queries, scores);
}

// Adds the values times C queries' scores to the queries' N * kLanes dimensions from `d` on. The sums stay in
// registers: through memory, each addition would wait for the one before it to be stored.
template <int N, int C, class T>
TORCH_FUSED_INLINE void add_values(const Slots<T>& values, const float* scores, int64_t d, float* to) {
  Lanes sums[C][N], value[N];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) load(to + c * values.head_dim + d + n * kLanes, sums[c][n]);
  }
  for (int64_t k = 0; k < values.count; ++k) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) load(values.data + k * values.stride + d + n * kLanes, value[n]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[c][n] += scores[c * kKeyBlock + k] * value[n];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(sums[c][n], to + c * values.head_dim + d + n * kLanes);
  }
}

template <int C, class T>
TORCH_FUSED_INLINE void add_values(const Slots<T>& values, const float* scores, float* to) {
  const int64_t dim = values.head_dim;
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) add_values<2, C>(values, scores, d, to);
  if (d + kLanes <= dim) {
    add_values<1, C>(values, scores, d, to);
    d += kLanes;
  }
  for (; d < dim; ++d) {
    for (int c = 0; c < C; ++c) {
      for (int64_t k = 0; k < values.count; ++k) {
        to[c * dim + d] += scores[c * kKeyBlock + k] * widen(values.data[k * values.stride + d]);
      }
    }
  }
}

// Calls function(number of queries, first query) for all of them, as many at once as registers hold.
template <class Function>
TORCH_FUSED_INLINE void for_queries(int64_t queries, Function function) {
  int64_t i = 0;
  for (; i + 4 <= queries; i += 4) function(std::integral_constant<int, 4>(), i);
  switch (queries - i) {
    case 3:
      return function(std::integral_constant<int, 3>(), i);
    case 2:
      return function(std::integral_constant<int, 2>(), i);
    case 1:
      return function(std::integral_constant<int, 1>(), i);
  }
}

TORCH_FUSED_INLINE float largest_of(const float* scores, float largest) {
  Lanes most, next;
  load(scores, most);
  for (int64_t j = kLanes; j < kKeyBlock; j += kLanes) {
    load(scores + j, next);
    most = next > most ? next : most;
  }
  float each[kLanes];
  store(most, each);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) each[j] = each[j + width] > each[j] ? each[j + width] : each[j];
  }
  return std::max(largest, each[0]);
}

TORCH_FUSED_INLINE float sum_of_block(const float* scores) {
  Lanes sum = {}, next;
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
    load(scores + j, next);
    sum += next;
  }
  return sum_of(sum);
}

// Adds the slots begin .. end - 1, at most kKeyBlock, that a query at slot s.length + step may attend to.
template <class T>
TORCH_FUSED_INLINE void attend_block(const CpuStep& s, const Context<T>& context, int64_t batch, int64_t kv_head,
                                     int64_t begin, int64_t end, const Attended& seen) {
  const int64_t queries = s.queries(), group = s.heads / s.kv_heads, n = end - begin;
  const Slots<T> keys{context.keys.at(batch, kv_head, begin), context.keys.slot_stride, n, s.head_dim};
  const Slots<T> values{context.values.at(batch, kv_head, begin), context.values.slot_stride, n, s.head_dim};
  for_queries(queries, [&](auto count, int64_t i) __attribute__((always_inline)) {
    score<count>(keys, seen.queries + i * s.head_dim, seen.scores + i * kKeyBlock);
  });
  for (int64_t i = 0; i < queries; ++i) {
    float* scores = seen.scores + i * kKeyBlock;
    const int64_t newest = s.length + i / group, window = context.layer.window;
    const int64_t visible = std::clamp<int64_t>(newest + 1 - begin, 0, n);
    const int64_t hidden = window ? std::clamp<int64_t>(newest + 1 - window - begin, 0, n) : 0;
    if (s.softcap > 0) {
      const float cap = s.softcap;  // times tanh(y), which is 1 - 2 / (1 + exp(2 y))
      for (int64_t j = hidden; j < visible; ++j) scores[j] = cap - 2 * cap / one_plus_exp(2 * scores[j] / cap);
    }
    std::fill(scores, scores + hidden, -std::numeric_limits<float>::infinity());
    std::fill(scores + visible, scores + kKeyBlock, -std::numeric_limits<float>::infinity());
    float largest = largest_of(scores, seen.maxima[i]);
    if (largest == -std::numeric_limits<float>::infinity()) largest = 0;  // nothing visible yet
    const float keep = exp_nonpositive(seen.maxima[i] - largest);
    for (int64_t j = 0; j < kKeyBlock; ++j) scores[j] = exp_nonpositive(scores[j] - largest);
    seen.sums[i] = seen.sums[i] * keep + sum_of_block(scores);
    seen.maxima[i] = largest;
    if (keep != 1) {
      for (int64_t d = 0; d < s.head_dim; ++d) seen.values[i * s.head_dim + d] *= keep;
    }
  }
  for_queries(queries, [&](auto count, int64_t i) __attribute__((always_inline)) {
    add_values<count>(values, seen.scores + i * kKeyBlock, seen.values + i * s.head_dim);
  });
}

// One chunk of one sequence's context for the queries of one key head; the last chunk has the new tokens, and writes
// their keys and values first. `own` has s.own_size() floats.
template <class T>
TORCH_FUSED_INLINE void attend(const CpuStep& s, const Context<T>& context, int64_t batch, int64_t kv_head,
                               int64_t chunk, float* own) {
  const int64_t queries = s.queries(), group = s.heads / s.kv_heads;
  Attended seen;
  seen.queries = own;
  seen.values = seen.queries + queries * s.head_dim;
  seen.scores = seen.values + queries * s.head_dim;
  seen.maxima = seen.scores + queries * kKeyBlock;
  seen.sums = seen.maxima + queries;

  const int64_t window = context.layer.window, start = s.starts ? std::min(s.starts[batch], s.length) : 0;
  const int64_t first = window ? std::max(start, s.length + 1 - window) : start, held = s.length - first;
  const int64_t begin = first + held * chunk / s.chunks;
  int64_t end = first + held * (chunk + 1) / s.chunks;
  if (chunk == s.chunks - 1) {
    append(s, context, batch, kv_head, seen.values);
    end += s.steps;
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t token = batch * s.steps + i / group, head = kv_head * group + i % group;
    float* query = seen.queries + i * s.head_dim;
    place_head(s, context.layer, s.qkv + token * s.projected() + head * s.head_dim, context.q_norm, s.positions[token],
               query);
    for (int64_t d = 0; d < s.head_dim; ++d) query[d] *= s.scaling;
    seen.maxima[i] = -std::numeric_limits<float>::infinity();
    seen.sums[i] = 0;
  }
  std::fill_n(seen.values, queries * s.head_dim, 0.0f);
  for (int64_t slot = begin; slot < end; slot += kKeyBlock) {
    attend_block(s, context, batch, kv_head, slot, std::min(slot + kKeyBlock, end), seen);
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t token = batch * s.steps + i / group, head = kv_head * group + i % group;
    float* partial = s.partials + ((token * s.heads + head) * s.chunks + chunk) * s.partial();
    std::copy_n(seen.values + i * s.head_dim, s.head_dim, partial);
    partial[s.head_dim] = seen.maxima[i];
    partial[s.head_dim + 1] = seen.sums[i];
  }
}

// The chunks of each token's heads as one: `to` is (tokens, heads, head_dim).
TORCH_FUSED_INLINE void combine_chunks(const CpuStep& s, float* to) {
  for (int64_t row = 0; row < s.tokens() * s.heads; ++row, to += s.head_dim) {
    const float* partials = s.partials + row * s.chunks * s.partial();
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t c = 0; c < s.chunks; ++c) largest = std::max(largest, partials[c * s.partial() + s.head_dim]);
    std::fill_n(to, s.head_dim, 0.0f);
    for (int64_t c = 0; c < s.chunks; ++c) {
      const float* partial = partials + c * s.partial();
      const float weight = exp_nonpositive(partial[s.head_dim] - largest);
      sum += partial[s.head_dim + 1] * weight;
      for (int64_t d = 0; d < s.head_dim; ++d) to[d] += partial[d] * weight;
    }
    for (int64_t d = 0; d < s.head_dim; ++d) to[d] /= sum;
  }
}

}  // namespace torch_fused::TORCH_FUSED_TARGET
