// The tokens of one row in the sampling order: larger logits first, equal ones by index. Nothing is sorted: a histogram
// over the distance from the maximum leaves one bin to look into, and there a selection settles the place.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <vector>

#include "common/convert.h"
#include "common/token_weight.h"

namespace torch_fused {

struct Token {
  uint32_t key, index;
};

inline bool precedes(const Token& a, const Token& b) {
  return a.key != b.key ? a.key > b.key : a.index < b.index;
}

constexpr int64_t kBlock = 64;        // tokens whose largest key is known
constexpr int64_t kBlockGrain = 256;  // blocks a thread should at least have
constexpr int kBinShift = 19;         // 32 bins an octave
constexpr size_t kBins = (kFarthest >> kBinShift) + 1;

template <class T>
TORCH_FUSED_INLINE uint32_t key_of(T logit) {
  return order_key(bit_copy<uint32_t>(static_cast<float>(widen(logit))));
}

template <class T>
TORCH_FUSED_INLINE void block_maxima_loop(const T* values, int64_t count, uint32_t* maxima) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    uint32_t largest = 0;
    if (count - begin >= kBlock) {
      for (int64_t i = 0; i < kBlock; ++i) {
        const uint32_t key = key_of(values[begin + i]);
        largest = key > largest ? key : largest;
      }
    } else {
      for (int64_t i = begin; i < count; ++i) largest = std::max(largest, key_of(values[i]));
    }
    maxima[begin / kBlock] = largest;
  }
}

// Whether there is a NaN or +inf, of which no softmax makes probabilities.
template <class T>
TORCH_FUSED_INLINE bool has_nan_or_inf_loop(const T* values, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = bit_copy<uint32_t>(static_cast<float>(widen(values[i])));
    found |= uint32_t((bits & 0x7fffffffu) >= 0x7f800000u) & uint32_t(bits != 0xff800000u);
  }
  return found != 0;
}

// Keys and distances from the maximum of up to a block of tokens.
struct Measured {
  uint32_t key[kBlock], steps[kBlock];
};

template <class T>
TORCH_FUSED_INLINE void measure_loop(const T* values, int64_t count, float maximum, float scale, Measured& block) {
  for (int64_t i = 0; i < count; ++i) block.key[i] = key_of(values[i]);
  for (int64_t i = 0; i < count; ++i) {
    block.steps[i] = steps_below(maximum, static_cast<float>(widen(values[i])), scale);
  }
}

#define RANKING_LOOPS(T)                                                                                              \
  TORCH_FUSED_SIMD inline void block_maxima(const T* values, int64_t count, uint32_t* maxima) {                       \
    block_maxima_loop(values, count, maxima);                                                                         \
  }                                                                                                                   \
  TORCH_FUSED_SIMD inline bool has_nan_or_inf(const T* values, int64_t count) {                                       \
    return has_nan_or_inf_loop(values, count);                                                                        \
  }                                                                                                                   \
  TORCH_FUSED_SIMD inline void measure(const T* values, int64_t count, float maximum, float scale, Measured& block) { \
    measure_loop(values, count, maximum, scale, block);                                                               \
  }
RANKING_LOOPS(float)
RANKING_LOOPS(double)
RANKING_LOOPS(at::Half)
RANKING_LOOPS(at::BFloat16)

template <class T>
std::vector<uint32_t> all_block_maxima(const T* values, int64_t count) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<uint32_t> maxima(blocks);
  at::parallel_for(0, blocks, kBlockGrain, [&](int64_t begin, int64_t end) {
    block_maxima(values + begin * kBlock, std::min(end * kBlock, count) - begin * kBlock, maxima.data() + begin);
  });
  return maxima;
}

// Whether a token can be drawn: nearly always the first block says so.
template <class T>
bool anything_in(const T* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t begin = 0; begin < count && largest == 0; begin += kBlock) {
    block_maxima(values + begin, std::min(kBlock, count - begin), &largest);
  }
  return largest != 0;
}

// The lowest index of the maximum; 0 if there is nothing but NaN and -inf.
template <class T>
int64_t first_maximum(const T* values, int64_t count) {
  const std::vector<uint32_t> maxima = all_block_maxima(values, count);
  const auto block = std::max_element(maxima.begin(), maxima.end());
  if (*block == 0) return 0;
  int64_t index = (block - maxima.begin()) * kBlock;
  while (key_of(values[index]) != *block) ++index;
  return index;
}

template <class T>
class Ranking {
 public:
  Ranking(const T* values, int64_t count, const RowParameters& parameters)
      : values_(values), count_(count), maxima_(all_block_maxima(values, count)) {
    const uint32_t largest = *std::max_element(maxima_.begin(), maxima_.end());
    if (largest == 0) return;
    maximum_ = bit_copy<float>(key_bits(largest));
    filter_ = token_filter(parameters, maximum_);
    floor_ = least_key();
    build_histogram();
    apply_filter();
  }

  bool anything() const { return floor_ != 0; }

  // The token that 64 random bits stand for.
  int64_t draw(uint64_t bits) const { return reach_mass(share_of(total_, bits) + 1).token.index; }

  // The logits that are kept, divided by the temperature, and -inf in place of the others.
  void write_kept(T* output, double temperature) const {
    const auto divisor = static_cast<wide_t<T>>(std::isinf(filter_.scale) ? 1 : temperature);
    std::fill(output, output + count_, static_cast<T>(-std::numeric_limits<float>::infinity()));
    if (!anything()) return;
    for_each_block(0, static_cast<int64_t>(maxima_.size()), 1, [&](int64_t start, int64_t size, const Measured& block) {
      for (int64_t i = 0; i < size; ++i) {
        const Token token{block.key[i], static_cast<uint32_t>(start + i)};
        const bool kept =
            token.key >= floor_ && token_weight(block.steps[i]) >= filter_.min_weight && !precedes(last_, token);
        if (kept) output[start + i] = narrow<T>(widen(values_[start + i]) / divisor);
      }
    });
  }

 private:
  struct Reached {
    Token token;
    uint64_t mass;  // of the tokens up to and with it
  };
  struct Histogram {
    std::vector<uint64_t> counts = std::vector<uint64_t>(kBins), masses = std::vector<uint64_t>(kBins);
    uint64_t heavy = 0;  // mass of the tokens that min_p keeps
  };

  // A key that at least top_k tokens reach: the top_k-th largest of the blocks' maxima. Blocks below are never looked
  // at.
  uint32_t least_key() const {
    if (filter_.top_k == 0 || filter_.top_k > maxima_.size()) return 1;
    std::vector<uint32_t> keys = maxima_;
    const auto kth = keys.begin() + filter_.top_k - 1;
    std::nth_element(keys.begin(), kth, keys.end(), std::greater<>());
    return std::max(*kth, 1u);
  }

  // Calls visit(start, size, measured) for the blocks from begin to end that reach `key`.
  template <class Visit>
  void for_each_block(int64_t begin, int64_t end, uint32_t key, const Visit& visit) const {
    Measured block;
    for (int64_t i = begin; i < end; ++i) {
      if (maxima_[i] < key) continue;
      const int64_t start = i * kBlock, size = std::min(kBlock, count_ - start);
      measure(values_ + start, size, maximum_, filter_.scale, block);
      visit(start, size, block);
    }
  }

  template <class Body>
  void parallel_blocks(const Body& body) const {
    at::parallel_for(0, static_cast<int64_t>(maxima_.size()), kBlockGrain, body);
  }

  void build_histogram() {
    std::mutex mutex;
    parallel_blocks([&](int64_t begin, int64_t end) {
      Histogram part;
      for_each_block(begin, end, floor_, [&](int64_t, int64_t size, const Measured& block) {
        for (int64_t i = 0; i < size; ++i) {
          if (block.key[i] < floor_) continue;
          const uint32_t bin = block.steps[i] >> kBinShift;
          const uint64_t weight = token_weight(block.steps[i]);
          part.counts[bin] += 1;
          part.masses[bin] += weight;
          part.heavy += weight >= filter_.min_weight ? weight : 0;
        }
      });
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t bin = 0; bin < kBins; ++bin) {
        histogram_.counts[bin] += part.counts[bin];
        histogram_.masses[bin] += part.masses[bin];
      }
      histogram_.heavy += part.heavy;
    });
  }

  std::vector<Token> tokens_in(uint32_t bin) const {
    std::mutex mutex;
    std::vector<Token> tokens;
    parallel_blocks([&](int64_t begin, int64_t end) {
      std::vector<Token> part;
      for_each_block(begin, end, floor_, [&](int64_t start, int64_t size, const Measured& block) {
        for (int64_t i = 0; i < size; ++i) {
          if (block.key[i] >= floor_ && block.steps[i] >> kBinShift == bin) {
            part.push_back({block.key[i], static_cast<uint32_t>(start + i)});
          }
        }
      });
      const std::lock_guard<std::mutex> lock(mutex);
      tokens.insert(tokens.end(), part.begin(), part.end());
    });
    return tokens;
  }

  uint32_t steps(const Token& token) const {
    return steps_below(maximum_, bit_copy<float>(key_bits(token.key)), filter_.scale);
  }
  uint64_t weight(const Token& token) const { return token_weight(steps(token)); }

  // Of the larger of the token and the maximum, and of the distance between them.
  uint32_t octaves(const Token& token) const {
    const float logit = bit_copy<float>(key_bits(token.key));
    return std::max(octaves_of(logit, filter_.scale), octaves_of(maximum_, filter_.scale)) + (steps(token) >> 24);
  }

  // The first token at which the running mass is at least `target`.
  Reached reach_mass(uint64_t target) const {
    uint32_t bin = 0;
    uint64_t before = 0;
    while (before + histogram_.masses[bin] < target) before += histogram_.masses[bin++];
    std::vector<Token> tokens = tokens_in(bin);
    auto first = tokens.begin(), last = tokens.end();
    while (last - first > 1) {
      const auto middle = first + (last - first) / 2;
      std::nth_element(first, middle, last, precedes);
      uint64_t mass = 0;
      for (auto token = first; token != middle; ++token) mass += weight(*token);
      if (before + mass >= target) {
        last = middle;
      } else {
        before += mass;
        first = middle;
      }
    }
    return {*first, before + weight(*first)};
  }

  // The top_k-th token, and the mass up to the last token with its key.
  Reached reach_count(uint64_t target) const {
    uint32_t bin = 0;
    uint64_t before = 0, mass = 0;
    for (; before + histogram_.counts[bin] < target; ++bin) {
      before += histogram_.counts[bin];
      mass += histogram_.masses[bin];
    }
    std::vector<Token> tokens = tokens_in(bin);
    const auto kth = tokens.begin() + (target - before - 1);
    std::nth_element(tokens.begin(), kth, tokens.end(), precedes);
    for (const Token& token : tokens) mass += token.key >= kth->key ? weight(token) : 0;
    return {*kth, mass};
  }

  // Sets the last token kept and the mass of those kept.
  void apply_filter() {
    uint64_t live = 0;
    for (size_t bin = 0; bin < kBins; ++bin) {
      live += histogram_.counts[bin];
      total_ += histogram_.masses[bin];
    }
    if (filter_.top_k != 0 && filter_.top_k < live) {
      const Reached kth = reach_count(filter_.top_k);
      last_ = {kth.token.key, std::numeric_limits<uint32_t>::max()};  // and all its ties
      total_ = kth.mass;
    }
    if (filter_.top_p < kNoTopP) {
      const uint64_t target = top_p_target(total_, filter_.top_p);
      const Reached edge = reach_mass(target);
      last_ = edge.token;
      if (is_surplus(edge.mass, weight(edge.token), target, total_, octaves(edge.token))) {
        last_ = {last_.key + (last_.index == 0), last_.index - 1};  // nothing is between that and the token
        total_ = edge.mass - weight(edge.token);
      } else {
        total_ = edge.mass;
      }
    }
    total_ = std::min(total_, histogram_.heavy);
  }

  const T* values_;
  int64_t count_;
  TokenFilter filter_{};
  std::vector<uint32_t> maxima_;  // the largest key of each block
  float maximum_ = 0;             // the largest logit
  uint32_t floor_ = 0;            // smaller keys are not looked at; 0: nothing can be drawn
  Histogram histogram_;
  Token last_{0, std::numeric_limits<uint32_t>::max()};
  uint64_t total_ = 0;
};

}  // namespace torch_fused
