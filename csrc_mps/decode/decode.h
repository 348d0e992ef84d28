// One step of a decoder: the model's tensors as the kernels see them, and the memory a step works in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "team.h"

namespace torch_fused {

constexpr int64_t kMostBatch = 8, kMostSteps = 8;
constexpr int64_t kKeyBlock = 32;  // keys scored before their values are added

// y = x * weight^T + bias; a row of the weight for each result.
template <class T>
struct Matrix {
  const T* weight;
  int64_t rows, cols;
  int64_t stride;  // elements from row to row
  const T* bias;   // null for none
};

// One sequence's states after another: (batch, heads, slots, head_dim), dense in the last dimension.
template <class T>
struct CacheStates {
  T* data;
  int64_t batch_stride, head_stride, slot_stride;

  T* at(int64_t batch, int64_t head, int64_t slot) const {
    return data + batch * batch_stride + head * head_stride + slot * slot_stride;
  }
};

template <class T>
struct Layer {
  const T* input_norm;
  Matrix<T> q, k, v, o;
  const T *q_norm, *k_norm;  // null for none
  const T* post_attention_norm;
  Matrix<T> gate, up, down;
  CacheStates<T> keys, values;
};

// Sizes of a step, and of the memory it needs.
struct StepShape {
  int64_t batch, steps;  // sequences, and new tokens of each
  int64_t hidden, heads, kv_heads, head_dim, rotary_dim, intermediate, vocabulary;
  int64_t length;  // slots of the cache that are in use
  int64_t kept;    // last tokens of each sequence whose logits are wanted
  int64_t chunks;  // parts of a sequence's context, each attended on its own
  int64_t threads;

  int64_t tokens() const { return batch * steps; }
  int64_t projected() const { return (heads + 2 * kv_heads) * head_dim; }  // floats of q, k and v of a token
  int64_t queries() const { return heads / kv_heads * steps; }             // that share a key
  int64_t partial() const { return head_dim + 2; }                         // weighted sum of values, maximum, sum

  // Floats of a thread's own memory.
  int64_t own_size() const {
    return std::max({tokens() * hidden, tokens() * heads * head_dim, queries() * (2 * head_dim + kKeyBlock + 2)});
  }
};

template <class T>
struct Step : StepShape {
  const int64_t* token_ids;  // (batch, steps)
  const int64_t* positions;  // (batch, steps)
  const int64_t* starts;     // (batch), or null: the first slot that each sequence attends
  const T* embedding;
  int64_t embedding_stride;
  const T *cos, *sin;  // (positions, rotary_dim)
  std::vector<Layer<T>> layers;
  const T* norm;
  Matrix<T> head;
  float eps, scaling;

  float* states;    // (tokens, hidden): the residual stream
  float* qkv;       // (tokens, projected)
  float* partials;  // (tokens, heads, chunks, partial)
  float* gates;     // (tokens, intermediate)
  float* ups;       // (tokens, intermediate)
  float* own;       // (threads, own_size()): each thread's own memory
  float* logits;    // (batch, kept, vocabulary)
};

// One member's share of a step, for each instruction set. step/ has the code.
#define TORCH_FUSED_DECLARE_STEP(target)             \
  namespace target {                                 \
  template <class T>                                 \
  void run_step(const Step<T>& s, const Team& team); \
  }
TORCH_FUSED_DECLARE_STEP(baseline)
#ifdef TORCH_FUSED_X86_DISPATCH
TORCH_FUSED_DECLARE_STEP(avx2)
TORCH_FUSED_DECLARE_STEP(avx512)
#endif

}  // namespace torch_fused
