// A step on the CPU: the model's tensors as the loops see them, and the memory a step works in.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/convert.h"
#include "../quantized/cpu/ready_vectors.h"
#include "decode_params.h"
#include "team.h"

namespace torch_fused {

constexpr int64_t kMostVectors = 64;  // sequences times tokens of each
constexpr int64_t kKeyBlock = 32;     // keys scored before their values are added

struct Vector {
  const void* data;  // null for none
  uint32_t format;

  TORCH_FUSED_INLINE float operator[](int64_t i) const {
    if (format == kFloat32) return static_cast<const float*>(data)[i];
    if (format == kFloat16) return widen(static_cast<const c10::Half*>(data)[i]);
    return widen(static_cast<const c10::BFloat16*>(data)[i]);
  }
};

struct MatrixAdapter;

// y = x * weight^T + bias, and what the adapters add; a row of the weight for each result.
struct Matrix {
  const void* weight;
  uint32_t format;
  int64_t rows, cols;
  int64_t stride;  // elements from row to row
  Vector bias;
  PackedMatrix packed;  // in place of the weight if it has bits
  bool int8;            // multiplied as integers
  std::vector<MatrixAdapter> adapters;
};

struct MatrixAdapter {
  Matrix a, b;
  float scale;
};

// The matrices of all experts, `stride` bytes apart.
struct Experts {
  Matrix first;
  int64_t stride;

  Matrix operator[](int64_t expert) const {
    Matrix matrix = first;
    matrix.weight = static_cast<const char*>(first.weight) + expert * stride;
    return matrix;
  }
};

// One sequence's states after another: (batch, heads, slots, head_dim), dense in the last dimension.
template <class T>
struct CacheStates {
  T* data;
  int64_t batch_stride, head_stride, slot_stride;
  int64_t first;  // the slot that the memory begins with

  T* at(int64_t batch, int64_t head, int64_t slot) const {
    return data + batch * batch_stride + head * head_stride + (slot - first) * slot_stride;
  }
};

struct StepLayer {
  Vector input_norm, attention_output_norm, post_attention_norm, feed_forward_output_norm;
  Matrix q, k, v, o;
  Vector q_norm, k_norm;
  int64_t q_norm_size, k_norm_size;  // of one head, or of all
  Matrix gate, up, down;             // without rows if there are experts alone
  Matrix router, shared_gate;        // without rows if there are none
  Experts experts_gate, experts_up, experts_down;
  CacheStates<void> keys, values;  // both of cache_format
  int64_t window;                  // the last slots that a token attends, its own included; 0 for all
  Vector cos, sin;                 // (positions, rotary_dim)
  int64_t rotary_dim;              // 0 for none
};

// Sizes of a step, and of the memory it needs.
struct StepShape {
  int64_t batch, steps;  // sequences, and new tokens of each
  int64_t hidden, heads, kv_heads, head_dim, vocabulary;
  int64_t intermediate;     // gates of a token: of the feed-forward layers, then of the chosen experts
  int64_t experts, chosen;  // of a token
  int64_t most_cols;        // of a matrix that may be packed
  int64_t length;           // slots of the cache that are in use
  int64_t kept;             // last tokens of each sequence whose logits are wanted
  int64_t chunks;           // parts of a sequence's context, each attended on its own
  int64_t threads;

  int64_t tokens() const { return batch * steps; }
  int64_t projected() const { return (heads + 2 * kv_heads) * head_dim; }  // floats of q, k and v of a token
  int64_t queries() const { return heads / kv_heads * steps; }             // that share a key
  int64_t partial() const { return head_dim + 2; }                         // weighted sum of values, maximum, sum

  // Floats of a thread's own memory.
  int64_t own_size() const {
    return std::max({tokens() * hidden, tokens() * heads * head_dim, queries() * (2 * head_dim + kKeyBlock + 2)});
  }

  // And those in which it makes vectors ready for packed rows.
  int64_t ready_size() const { return ReadyVectors::size(most_cols, tokens()); }
};

struct CpuStep : StepShape {
  const int64_t* token_ids;  // (batch, steps)
  const int64_t* positions;  // (batch, steps)
  const int64_t* starts;     // (batch), or null: the first slot that each sequence attends
  Matrix embedding;
  std::vector<StepLayer> layers;
  uint32_t cache_format;
  Vector norm;
  Matrix head;
  uint32_t activation;
  bool normalise_experts;
  float eps, scaling, norm_offset, embedding_scale, residual_scale;
  float softcap;  // of scores; 0 for none

  float* states;    // (tokens, hidden): the residual stream
  float* output;    // (tokens, hidden): what is normed before it is added to it
  float* qkv;       // (tokens, projected)
  float* partials;  // (tokens, heads, chunks, partial)
  float* gates;     // (tokens, intermediate)
  float* ups;       // (tokens, intermediate)
  float* routes;    // (tokens, experts + 1): the router's logits, and the gate of the shared expert
  float* own;       // (threads, own_size()): each thread's own memory
  float* ready;     // (threads, ready_size())
  float* logits;    // (batch, kept, vocabulary)
};

// One member's share of a step, for each instruction set. step/ has the code.
#define TORCH_FUSED_DECLARE_STEP(target)             \
  namespace target {                                 \
  void run_step(const CpuStep& s, const Team& team); \
  }
TORCH_FUSED_DECLARE_STEP(baseline)
#ifdef TORCH_FUSED_X86_DISPATCH
TORCH_FUSED_DECLARE_STEP(avx2)
TORCH_FUSED_DECLARE_STEP(avx512)
#endif

}  // namespace torch_fused
