// Attention of the new tokens over the cache: a chunk of one sequence's context at a time, then the chunks together.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../common/convert.h"
#include "../../common/exp.h"
#include "../decode.h"
#include "norm.h"
#include "products.h"

namespace torch_fused::TORCH_FUSED_TARGET {

// A head of a query or key: normed if the model has a norm for it, then rotated by its position's angles, half-split.
template <class T>
TORCH_FUSED_INLINE void place_head(const Step<T>& s, const float* from, const T* norm, int64_t position, float* to) {
  if (norm) {
    normed(from, norm, s.head_dim, s.eps, to);
  } else {
    std::copy_n(from, s.head_dim, to);
  }
  const T* cos = s.cos + position * s.rotary_dim;
  const T* sin = s.sin + position * s.rotary_dim;
  const int64_t half = s.rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = to[i], b = to[half + i];
    to[i] = a * widen(cos[i]) - b * widen(sin[i]);
    to[half + i] = b * widen(cos[half + i]) + a * widen(sin[half + i]);
  }
}

// Writes the new keys and values of one head; `head` is room for one.
template <class T>
TORCH_FUSED_INLINE void append(const Step<T>& s, const Layer<T>& layer, int64_t batch, int64_t kv_head, float* head) {
  for (int64_t step = 0; step < s.steps; ++step) {
    const int64_t token = batch * s.steps + step;
    const float* key = s.qkv + token * s.projected() + (s.heads + kv_head) * s.head_dim;
    const float* value = key + s.kv_heads * s.head_dim;
    place_head(s, key, layer.k_norm, s.positions[token], head);
    T* to_key = layer.keys.at(batch, kv_head, s.length + step);
    T* to_value = layer.values.at(batch, kv_head, s.length + step);
    for (int64_t i = 0; i < s.head_dim; ++i) {
      to_key[i] = narrow<T>(head[i]);
      to_value[i] = narrow<T>(value[i]);
    }
  }
}

// What the queries that share a key have seen of the context: weighted sums of values, to be divided by `sums`.
struct Attended {
  float* queries;   // (queries, head_dim), scaled
  float* values;    // (queries, head_dim)
  float* scores;    // (queries, kKeyBlock)
  float* maxima;    // (queries)
  float* sums;      // (queries)
  float* products;  // (queries)
};

// Adds the slots begin .. end - 1, at most kKeyBlock, that a query at slot s.length + step may see.
template <class T>
TORCH_FUSED_INLINE void attend_block(const Step<T>& s, const Layer<T>& layer, int64_t batch, int64_t kv_head,
                                     int64_t begin, int64_t end, const Attended& seen) {
  const int64_t queries = s.queries(), group = s.heads / s.kv_heads, n = end - begin;
  for (int64_t j = 0; j < n; ++j) {
    row_products(layer.keys.at(batch, kv_head, begin + j), s.head_dim, {seen.queries, s.head_dim}, queries,
                 seen.products);
    for (int64_t i = 0; i < queries; ++i) {
      const bool visible = begin + j <= s.length + i / group;
      seen.scores[i * kKeyBlock + j] = visible ? seen.products[i] : -std::numeric_limits<float>::infinity();
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    float* scores = seen.scores + i * kKeyBlock;
    float largest = seen.maxima[i];
    for (int64_t j = 0; j < n; ++j) largest = std::max(largest, scores[j]);
    if (largest == -std::numeric_limits<float>::infinity()) largest = 0;  // nothing visible yet
    const float keep = exp_nonpositive(seen.maxima[i] - largest);
    float sum = 0;
    for (int64_t j = 0; j < n; ++j) scores[j] = exp_nonpositive(scores[j] - largest);
    for (int64_t j = 0; j < n; ++j) sum += scores[j];
    seen.sums[i] = seen.sums[i] * keep + sum;
    seen.maxima[i] = largest;
    if (keep != 1) {
      for (int64_t d = 0; d < s.head_dim; ++d) seen.values[i * s.head_dim + d] *= keep;
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    const T* value = layer.values.at(batch, kv_head, begin + j);
    for (int64_t i = 0; i < queries; ++i) {
      add_scaled(value, seen.scores[i * kKeyBlock + j], s.head_dim, seen.values + i * s.head_dim);
    }
  }
}

// One chunk of one sequence's context for the queries of one key head; the last chunk has the new tokens, and writes
// their keys and values first. `own` has attention_memory() floats.
template <class T>
TORCH_FUSED_INLINE void attend(const Step<T>& s, const Layer<T>& layer, int64_t batch, int64_t kv_head, int64_t chunk,
                               float* own) {
  const int64_t queries = s.queries(), group = s.heads / s.kv_heads;
  Attended seen;
  seen.queries = own;
  seen.values = seen.queries + queries * s.head_dim;
  seen.scores = seen.values + queries * s.head_dim;
  seen.maxima = seen.scores + queries * kKeyBlock;
  seen.sums = seen.maxima + queries;
  seen.products = seen.sums + queries;

  const int64_t first = s.starts ? std::min(s.starts[batch], s.length) : 0, held = s.length - first;
  const int64_t begin = first + held * chunk / s.chunks;
  int64_t end = first + held * (chunk + 1) / s.chunks;
  if (chunk == s.chunks - 1) {
    append(s, layer, batch, kv_head, seen.values);
    end += s.steps;
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t token = batch * s.steps + i / group, head = kv_head * group + i % group;
    float* query = seen.queries + i * s.head_dim;
    place_head(s, s.qkv + token * s.projected() + head * s.head_dim, layer.q_norm, s.positions[token], query);
    for (int64_t d = 0; d < s.head_dim; ++d) query[d] *= s.scaling;
    seen.maxima[i] = -std::numeric_limits<float>::infinity();
    seen.sums[i] = 0;
  }
  std::fill_n(seen.values, queries * s.head_dim, 0.0f);
  for (int64_t slot = begin; slot < end; slot += kKeyBlock) {
    attend_block(s, layer, batch, kv_head, slot, std::min(slot + kKeyBlock, end), seen);
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
template <class T>
TORCH_FUSED_INLINE void combine_chunks(const Step<T>& s, float* to) {
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
