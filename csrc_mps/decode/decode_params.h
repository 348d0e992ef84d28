// Shared by the host code and the kernels of the decode step.
#pragma once
#include "common/activation_params.h"
#include "common/shared.h"

namespace torch_fused {

SHARED_CONSTANT uint32_t kOne = 0x3f800000;  // the bits of 1.0f

// The number format of a matrix, a vector or a cache.
SHARED_CONSTANT uint32_t kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2;

SHARED_CONSTANT uint32_t kLaneColumns = 8;                     // columns that a lane takes at once
SHARED_CONSTANT uint32_t kBlockColumns = 32 * kLaneColumns;    // and a simdgroup
SHARED_CONSTANT uint32_t kTileColumns = 64, kTileVectors = 8;  // of a product on the matrix units
SHARED_CONSTANT uint32_t kStagedWords = 256;                   // of a vector's codes, for packed rows of four bits
SHARED_CONSTANT uint32_t kMostHeadDim = 256;
SHARED_CONSTANT uint32_t kAttentionSimdgroups = 16;
SHARED_CONSTANT uint32_t kMostTeams = 8,
                         kKeysAtOnce = 8;  // of attention: queries at once, and keys of a group of lanes

SHARED_CONSTANT uint32_t kMostRank = 256;  // of an adapter

// One row of the embedding per token, times `scale`.
struct EmbedParams {
  int64_t stride;  // elements from row to row
  uint32_t hidden, vocabulary;
  float scale;
  uint32_t unused;
};

SHARED_CONSTANT uint32_t kNormed = 1;  // the vectors are normed before the product
SHARED_CONSTANT uint32_t kAdd = 2;     // the results are added to what is there
SHARED_CONSTANT uint32_t kBias = 4;    // shifted by a matrix's number: it has a bias

// The product of up to three matrices, one below the other, with the step's vectors.
struct ProductParams {
  int64_t strides[3];  // elements from row to row of each matrix
  uint32_t ends[3];    // where each matrix's results end
  uint32_t cols;
  uint32_t result_stride;  // floats from vector to vector
  uint32_t vectors;
  uint32_t steps, kept;  // of each sequence's `steps` vectors the last `kept` are taken
  uint32_t splits;       // simdgroups that share a row
  uint32_t flags, norm_format, bias_format;
  float eps, norm_offset;  // which is added to the norm's weights
  float scale;             // of the results
  uint32_t activation;
  uint32_t rounds;  // of packed_tiles: tiles of rows that a simdgroup takes one after the other
};

// How up to three packed matrices are laid out.
struct PackedFormat {
  int64_t strides[3], scale_strides[3], bias_strides[3];  // words, or elements, from row to row
  uint32_t group_size, scale_format;
  uint32_t one, unused;  // the bits of 1.0f
};

struct PackedProductParams {
  ProductParams product;  // its strides are not used
  PackedFormat format;
};

SHARED_CONSTANT uint32_t kProductSimdgroups = 4;    // of a threadgroup that multiplies, without splits
SHARED_CONSTANT uint32_t kMostSplitSimdgroups = 8;  // with them
SHARED_CONSTANT uint32_t kMostTileSimdgroups = 16;

// The product after attention.
struct AttendedParams {
  int64_t stride;  // elements from row to row
  uint32_t rows, cols, vectors;
  uint32_t chunks, head_dim;
  uint32_t flags, bias_format;
  float scale;  // of the results
};

struct PackedAttendedParams {
  AttendedParams attended;
  PackedFormat format;
};

struct PackedEmbedParams {
  EmbedParams embed;
  PackedFormat format;
};

// activation(gate) * up of `count` floats, in place of the gates.
struct GateParams {
  uint32_t count, activation;
};

SHARED_CONSTANT uint32_t kMostExperts = 1024, kMostChosen = 32;

// The choice of a token's experts: those with the largest logits, weighted by their softmax.
struct ChooseParams {
  uint32_t experts, chosen, stride;  // floats from token to token
  uint32_t normalise;                // the chosen experts' weights, to a sum of 1
};

// The product of each chosen expert's matrix, or of two that gate, with one vector.
struct ExpertsParams {
  ProductParams product;
  int64_t expert_strides[2];  // elements from expert to expert
  uint32_t groups;            // threadgroups of one expert's product
  uint32_t shared_by;         // experts that take the same vector
};

// The sum of a token's experts, and of the shared one, added to its state.
struct ExpertSumParams {
  uint32_t cols, chosen, flags, stride;  // floats from token to token of the routes
  uint32_t gate;                         // where a token's routes have the shared expert's gate
  float scale;
};

SHARED_CONSTANT uint32_t kSharedExpert = 1, kSharedGate = 2;

// The RMS norm of `cols` floats of each token, in place or added to what is there.
struct StepNormParams {
  int64_t from_stride, to_stride;  // floats from token to token
  uint32_t cols, flags, norm_format;
  float eps, norm_offset, scale;
};

// Attention of the new tokens over one chunk of the context, one threadgroup per key/value head and chunk.
struct AttentionParams {
  int64_t keys_batch, keys_head, values_batch, values_head;  // strides
  uint32_t keys_slot, values_slot;
  uint32_t length, window;  // slots in use; the last slots that a token sees, its own included, 0 for all
  uint32_t dropped;         // slots before the first of the buffers
  uint32_t steps, heads, kv_heads, head_dim, rotary_dim, positions;
  uint32_t teams;  // of simdgroups, one a query
  uint32_t chunks, flags, q_norm_format, k_norm_format, table_format;
  float eps, scaling;
  float softcap;  // of scores, in octaves; 0 for none
  float norm_offset;
  uint32_t unused;
};

SHARED_CONSTANT uint32_t kQueryNorm = 1, kKeyNorm = 2, kStarts = 4;  // flags of attention

}  // namespace torch_fused
