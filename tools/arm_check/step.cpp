// The decode step: small models of every format and trait, against the same models in double.
#include <algorithm>
#include <numeric>
#include <thread>

#include "check.h"
#include "decode/cpu_step.h"
#include "packed.h"

using namespace torch_fused;
using namespace check;

namespace {

enum class HeadNorm { kNone, kEach, kAll };

struct Settings {
  const char* name;
  uint32_t format = kFloat32, cache = kFloat32, others = kFloat32;  // of weights, the cache, and norms and tables
  int64_t bits = 0, group_size = 32;                                // packed weights
  bool int8 = false;
  int64_t batch = 1, steps = 1, length = 5, chunks = 1, threads = 1, kept = 1;
  int64_t hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, rotary_dim = 16, intermediate = 96;
  uint32_t activation = kSilu;
  HeadNorm head_norm = HeadNorm::kNone;
  bool biases = false, adapters = false, output_norms = false, input_norms = true, starts = false;
  int64_t window = 0;
  float softcap = 0, norm_offset = 0, embedding_scale = 1, residual_scale = 1;
  int64_t experts = 0, chosen = 2;
  bool shared_expert = false, normalise_experts = false;
  double tolerance = 1e-5;
};

constexpr int64_t kVocabulary = 100, kSlots = 400, kLayers = 2;
constexpr double kEps = 1e-6;
using Numbers = std::vector<double>;

// A matrix with its bias and adapters.
struct Weights {
  int64_t rows = 0, cols = 0;
  bool int8 = false;
  Stored dense, bias, a, b;
  PackedNumbers packed;
  static constexpr int64_t kRank = 5;
  static constexpr float kAdapterScale = 0.5f;

  Weights() = default;
  Weights(Random& random, const Settings& s, int64_t rows, int64_t cols, bool packs = true)
      : rows(rows), cols(cols), int8(packs && s.int8) {
    const double scale = 1 / std::sqrt(static_cast<double>(cols));
    if (s.bits && packs) {
      packed = PackedNumbers(random, rows, cols, s.bits, s.group_size, s.others, scale / (s.bits == 4 ? 8 : 128));
    } else {
      dense = Stored(normals(random, rows * cols, scale), s.format);
    }
    if (s.biases) bias = Stored(normals(random, rows, 0.3), s.others);
    if (!s.adapters) return;
    a = Stored(normals(random, kRank * cols, scale), s.others);
    b = Stored(normals(random, rows * kRank, 0.3), s.others);
  }

  double at(int64_t row, int64_t col) const {
    return packed.bits > 0 && !dense.count() ? packed.at(row, col) : dense[row * cols + col];
  }

  Matrix matrix() const {
    if (rows == 0) return {};
    Matrix m{dense.data(), dense.format(), rows, cols, cols, {nullptr, 0}, {}, int8, {}};
    if (bias.count()) m.bias = {bias.data(), bias.format()};
    if (!dense.count()) m.packed = packed.matrix();
    if (a.count()) {
      const Matrix thin{a.data(), a.format(), kRank, cols, cols, {nullptr, 0}, {}, false, {}};
      const Matrix wide{b.data(), b.format(), rows, kRank, kRank, {nullptr, 0}, {}, false, {}};
      m.adapters.push_back({thin, wide, kAdapterScale});
    }
    return m;
  }

  Numbers times(const Numbers& x) const {
    Numbers y(rows), thin(a.count() ? kRank : 0);
    for (size_t r = 0; r < thin.size(); ++r) {
      for (int64_t c = 0; c < cols; ++c) thin[r] += a[r * cols + c] * x[c];
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < cols; ++c) y[row] += at(row, c) * x[c];
      if (bias.count()) y[row] += bias[row];
      for (size_t r = 0; r < thin.size(); ++r) y[row] += kAdapterScale * b[row * kRank + r] * thin[r];
    }
    return y;
  }
};

Vector vector_of(const Stored& numbers) {
  return numbers.count() ? Vector{numbers.data(), numbers.format()} : Vector{nullptr, 0};
}

struct Layer {
  Stored input_norm, output_norm, post_norm, feed_forward_norm, q_norm, k_norm, keys, values;
  Weights q, k, v, o, gate, up, down, router, shared_gate, experts_gate, experts_up, experts_down;
  int64_t window = 0;
};

class Model {
 public:
  Model(const Settings& s, uint64_t seed) : s(s), random_(seed) {
    const int64_t queries = s.heads * s.head_dim, keys = s.kv_heads * s.head_dim;
    embedding_ = Weights(random_, plain(), kVocabulary, s.hidden);
    head_ = Weights(random_, plain(), kVocabulary, s.hidden);
    norm_ = norm(s.hidden);
    cos_ = Stored(normals(random_, kSlots * s.rotary_dim, 0.7), s.others);
    sin_ = Stored(normals(random_, kSlots * s.rotary_dim, 0.7), s.others);
    for (int64_t i = 0; i < kLayers; ++i) {
      Layer& l = layers_.emplace_back();
      if (s.input_norms) l.input_norm = norm(s.hidden), l.post_norm = norm(s.hidden);
      if (s.output_norms) l.output_norm = norm(s.hidden), l.feed_forward_norm = norm(s.hidden);
      l.q = Weights(random_, s, queries, s.hidden);
      l.k = Weights(random_, s, keys, s.hidden);
      l.v = Weights(random_, s, keys, s.hidden);
      l.o = Weights(random_, s, s.hidden, queries);
      if (s.head_norm == HeadNorm::kEach) l.q_norm = norm(s.head_dim), l.k_norm = norm(s.head_dim);
      if (s.head_norm == HeadNorm::kAll) l.q_norm = norm(queries), l.k_norm = norm(keys);
      if (s.experts == 0 || s.shared_expert) {
        l.gate = Weights(random_, s, s.intermediate, s.hidden);
        l.up = Weights(random_, s, s.intermediate, s.hidden);
        l.down = Weights(random_, s, s.hidden, s.intermediate);
      }
      if (s.experts > 0) {
        l.router = Weights(random_, plain(), s.experts, s.hidden, false);
        if (s.shared_expert) l.shared_gate = Weights(random_, plain(), 1, s.hidden, false);
        l.experts_gate = Weights(random_, plain(), s.experts * kEach, s.hidden, false);
        l.experts_up = Weights(random_, plain(), s.experts * kEach, s.hidden, false);
        l.experts_down = Weights(random_, plain(), s.experts * s.hidden, kEach, false);
      }
      l.keys = Stored(normals(random_, s.batch * s.kv_heads * kSlots * s.head_dim), s.cache);
      l.values = Stored(normals(random_, s.batch * s.kv_heads * kSlots * s.head_dim), s.cache);
      l.window = i == 1 ? s.window : 0;
    }
    for (int64_t i = 0; i < s.batch * s.steps; ++i) {
      token_ids_.push_back(random_.below(kVocabulary));
      positions_.push_back(s.length + i % s.steps);
    }
    for (int64_t i = 0; i < s.batch; ++i) starts_.push_back(i * 3);
  }

  // Takes the step, then the same in double.
  void check() {
    run();
    for (int64_t sequence = 0; sequence < s.batch; ++sequence) {
      std::vector<Numbers> states;
      for (int64_t step = 0; step < s.steps; ++step) {
        Numbers& state = states.emplace_back(s.hidden);
        for (int64_t i = 0; i < s.hidden; ++i) {
          state[i] = embedding_.at(token_ids_[sequence * s.steps + step], i) * s.embedding_scale;
        }
      }
      for (const Layer& layer : layers_) {
        std::vector<Numbers> queries;
        for (int64_t step = 0; step < s.steps; ++step) queries.push_back(place(layer, sequence, step, states[step]));
        for (int64_t step = 0; step < s.steps; ++step) {
          const Numbers attended = attend(layer, sequence, step, queries[step]);
          add(states[step], normed(layer.o.times(attended), layer.output_norm));
          add(states[step],
              normed(feed_forward(layer, normed(states[step], layer.post_norm)), layer.feed_forward_norm));
        }
      }
      for (int64_t kept = 0; kept < s.kept; ++kept) {
        const Numbers expected = head_.times(normed(states[s.steps - s.kept + kept], norm_));
        for (int64_t i = 0; i < kVocabulary; ++i) {
          close(std::string(s.name) + ", logits", logits_[(sequence * s.kept + kept) * kVocabulary + i], expected[i],
                s.tolerance * 10);
        }
      }
    }
  }

 private:
  static constexpr int64_t kEach = 24;  // gates of an expert

  Settings plain() const {
    Settings settings = s;
    settings.biases = settings.adapters = false;
    return settings;
  }
  Stored norm(int64_t n) { return Stored(normals(random_, n, 0.2, 1), s.others); }

  CacheStates<void> cache(Stored& states) const {
    return {states.data(), s.kv_heads * kSlots * s.head_dim, kSlots * s.head_dim, s.head_dim, 0};
  }
  int64_t slot(int64_t sequence, int64_t head, int64_t slot) const {
    return ((sequence * s.kv_heads + head) * kSlots + slot) * s.head_dim;
  }
  static Experts experts(const Weights& all, int64_t each) {
    if (all.rows == 0) return {};
    Matrix first = all.matrix();
    first.rows = each;
    return {first, each * all.cols * size_of(all.dense.format())};
  }

  void run() {
    CpuStep step{};
    step.batch = s.batch, step.steps = s.steps, step.hidden = s.hidden, step.heads = s.heads;
    step.kv_heads = s.kv_heads, step.head_dim = s.head_dim, step.vocabulary = kVocabulary;
    const int64_t feed_forward = s.experts == 0 || s.shared_expert ? s.intermediate : 0;
    step.chosen = s.experts ? s.chosen : 0, step.experts = s.experts;
    step.intermediate = feed_forward + step.chosen * kEach;
    step.most_cols = std::max({s.hidden, s.heads * s.head_dim, s.intermediate});
    step.length = s.length, step.kept = s.kept, step.chunks = s.chunks, step.threads = s.threads;
    step.token_ids = token_ids_.data(), step.positions = positions_.data();
    step.starts = s.starts ? starts_.data() : nullptr;
    step.embedding = embedding_.matrix(), step.head = head_.matrix(), step.norm = vector_of(norm_);
    step.cache_format = s.cache, step.activation = s.activation, step.normalise_experts = s.normalise_experts;
    step.eps = static_cast<float>(kEps), step.scaling = scaling(), step.norm_offset = s.norm_offset;
    step.embedding_scale = s.embedding_scale, step.residual_scale = s.residual_scale, step.softcap = s.softcap;
    for (Layer& l : layers_) {
      StepLayer& to = step.layers.emplace_back();
      to.input_norm = vector_of(l.input_norm), to.attention_output_norm = vector_of(l.output_norm);
      to.post_attention_norm = vector_of(l.post_norm), to.feed_forward_output_norm = vector_of(l.feed_forward_norm);
      to.q = l.q.matrix(), to.k = l.k.matrix(), to.v = l.v.matrix(), to.o = l.o.matrix();
      to.q_norm = vector_of(l.q_norm), to.k_norm = vector_of(l.k_norm);
      to.q_norm_size = l.q_norm.count(), to.k_norm_size = l.k_norm.count();
      to.gate = l.gate.matrix(), to.up = l.up.matrix(), to.down = l.down.matrix();
      to.router = l.router.matrix(), to.shared_gate = l.shared_gate.matrix();
      to.experts_gate = experts(l.experts_gate, kEach), to.experts_up = experts(l.experts_up, kEach);
      to.experts_down = experts(l.experts_down, s.hidden);
      to.keys = cache(l.keys), to.values = cache(l.values), to.window = l.window;
      to.cos = vector_of(cos_), to.sin = vector_of(sin_), to.rotary_dim = s.rotary_dim;
    }
    const int64_t tokens = step.tokens();
    const int64_t sizes[] = {tokens * s.hidden,
                             tokens * s.hidden,
                             tokens * step.projected(),
                             tokens * s.heads * s.chunks * step.partial(),
                             tokens * step.intermediate,
                             tokens * step.intermediate,
                             tokens * (s.experts + 1),
                             s.threads * step.own_size(),
                             s.threads * step.ready_size()};
    std::vector<float> memory(std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0}), NAN);
    float* next = memory.data();
    float** places[] = {&step.states, &step.output, &step.qkv, &step.partials, &step.gates,
                        &step.ups,    &step.routes, &step.own, &step.ready};
    for (size_t i = 0; i < std::size(places); next += sizes[i++]) *places[i] = next;
    logits_.assign(s.batch * s.kept * kVocabulary, NAN);
    step.logits = logits_.data();
    Barrier barrier(static_cast<uint32_t>(s.threads), false);
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < s.threads; ++i) {
      threads.emplace_back([&, i] { baseline::run_step(step, Team(i, s.threads, &barrier)); });
    }
    for (std::thread& thread : threads) thread.join();
  }

  float scaling() const { return 1 / std::sqrt(static_cast<float>(s.head_dim)); }

  Numbers normed(Numbers x, const Stored& weight) const {
    if (weight.count()) norm_in_place(x.data(), weight);
    return x;
  }
  void norm_in_place(double* x, const Stored& weight) const {
    double squares = 0;
    for (int64_t i = 0; i < weight.count(); ++i) squares += x[i] * x[i];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(weight.count()) + kEps);
    for (int64_t i = 0; i < weight.count(); ++i) x[i] *= scale * (weight[i] + s.norm_offset);
  }
  void add(Numbers& state, const Numbers& more) const {
    for (size_t i = 0; i < state.size(); ++i) state[i] += more[i] * s.residual_scale;
  }

  // Norms and rotates heads.
  void finish_heads(Numbers& heads, const Stored& norm, int64_t position) const {
    if (norm.count()) {
      for (size_t first = 0; first < heads.size(); first += norm.count()) norm_in_place(heads.data() + first, norm);
    }
    const int64_t half = s.rotary_dim / 2;
    for (size_t first = 0; first < heads.size(); first += s.head_dim) {
      double* head = heads.data() + first;
      for (int64_t i = 0; i < half; ++i) {
        const double low = head[i], high = head[half + i];
        const int64_t at = position * s.rotary_dim + i;
        head[i] = low * cos_[at] - high * sin_[at];
        head[half + i] = high * cos_[at + half] + low * sin_[at + half];
      }
    }
  }

  // A token's queries. Its keys and values must be in the cache, rounded once; attention reads them from there.
  Numbers place(const Layer& layer, int64_t sequence, int64_t step, const Numbers& state) const {
    const int64_t position = positions_[sequence * s.steps + step];
    const Numbers x = normed(state, layer.input_norm);
    Numbers queries = layer.q.times(x), keys = layer.k.times(x), values = layer.v.times(x);
    finish_heads(queries, layer.q_norm, position);
    finish_heads(keys, layer.k_norm, position);
    const double ulp = s.cache == kFloat32 ? 0 : s.cache == kFloat16 ? 0x1p-11 : 0x1p-8;
    for (int64_t i = 0; i < s.kv_heads * s.head_dim; ++i) {
      const int64_t at = slot(sequence, i / s.head_dim, s.length + step) + i % s.head_dim;
      close(std::string(s.name) + ", key", layer.keys[at], keys[i], s.tolerance * 3 + ulp * std::fabs(keys[i]));
      close(std::string(s.name) + ", value", layer.values[at], values[i], s.tolerance * 3 + ulp * std::fabs(values[i]));
    }
    return queries;
  }

  Numbers attend(const Layer& layer, int64_t sequence, int64_t step, const Numbers& queries) const {
    Numbers result(queries.size());
    const int64_t newest = s.length + step;
    int64_t first = s.starts ? std::min(starts_[sequence], s.length) : 0;
    if (layer.window) first = std::max(first, newest + 1 - layer.window);
    for (int64_t head = 0; head < s.heads; ++head) {
      const int64_t kv_head = head / (s.heads / s.kv_heads);
      Numbers scores;
      for (int64_t at = first; at <= newest; ++at) {
        double score = 0;
        for (int64_t d = 0; d < s.head_dim; ++d) {
          score += queries[head * s.head_dim + d] * layer.keys[slot(sequence, kv_head, at) + d];
        }
        score *= scaling();
        scores.push_back(s.softcap > 0 ? s.softcap * std::tanh(score / s.softcap) : score);
      }
      const double largest = *std::max_element(scores.begin(), scores.end());
      double sum = 0;
      for (double& score : scores) sum += score = std::exp(score - largest);
      for (size_t i = 0; i < scores.size(); ++i) {
        for (int64_t d = 0; d < s.head_dim; ++d) {
          const int64_t at = slot(sequence, kv_head, first + static_cast<int64_t>(i)) + d;
          result[head * s.head_dim + d] += scores[i] / sum * layer.values[at];
        }
      }
    }
    return result;
  }

  double activated(double g) const {
    if (s.activation == kSilu) return g / (1 + std::exp(-g));
    if (s.activation == kGelu) return g * 0.5 * std::erfc(-g * std::sqrt(0.5));
    return g / (1 + std::exp(-1.5957691216057308 * g * (1 + 0.044715 * g * g)));
  }
  void add_gated(Numbers& to, double weight, const Numbers& gates, const Numbers& ups, const Weights& down,
                 int64_t expert = 0) const {
    for (int64_t i = 0; i < s.hidden; ++i) {
      for (size_t j = 0; j < gates.size(); ++j) {
        to[i] += weight * down.at(expert * s.hidden + i, j) * activated(gates[j]) * ups[j];
      }
    }
  }

  Numbers feed_forward(const Layer& layer, const Numbers& x) const {
    Numbers result(s.hidden);
    if (s.experts == 0) {
      Numbers gates = layer.gate.times(x);
      const Numbers ups = layer.up.times(x);
      for (size_t i = 0; i < gates.size(); ++i) gates[i] = activated(gates[i]) * ups[i];
      return layer.down.times(gates);
    }
    if (s.shared_expert) {
      const double weight = 1 / (1 + std::exp(-layer.shared_gate.times(x)[0]));
      add_gated(result, weight, layer.gate.times(x), layer.up.times(x), layer.down);
    }
    Numbers routes = layer.router.times(x);
    double sum = 0, chosen = 0;
    for (double& route : routes) sum += route = std::exp(route);
    std::vector<int64_t> order(s.experts);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return routes[a] > routes[b]; });
    for (int64_t k = 0; k < s.chosen; ++k) chosen += routes[order[k]];
    const Numbers gates = layer.experts_gate.times(x), ups = layer.experts_up.times(x);
    for (int64_t k = 0; k < s.chosen; ++k) {
      const int64_t expert = order[k];
      const auto of = [&](const Numbers& all) {
        return Numbers(all.begin() + expert * kEach, all.begin() + (expert + 1) * kEach);
      };
      add_gated(result, routes[expert] / (s.normalise_experts ? chosen : sum), of(gates), of(ups), layer.experts_down,
                expert);
    }
    return result;
  }

  const Settings s;
  Random random_;
  std::vector<Layer> layers_;
  Weights embedding_, head_;
  Stored norm_, cos_, sin_;
  std::vector<int64_t> token_ids_, positions_, starts_;
  std::vector<float> logits_;
};

std::vector<Settings> all_settings() {
  std::vector<Settings> all;
  const auto with = [&](const char* name, auto change) {
    Settings s{};
    s.name = name;
    change(s);
    all.push_back(s);
  };
  const char* names[] = {"f32", "f16", "bf16"};
  for (uint32_t format : {kFloat32, kFloat16, kBFloat16}) {
    with(names[format], [&](Settings& s) { s.format = s.cache = s.others = format; });
    // Sizes that no register divides.
    with(names[format], [&](Settings& s) {
      s.format = s.cache = s.others = format;
      s.hidden = 75, s.head_dim = s.rotary_dim = 22, s.intermediate = 101, s.heads = 6, s.rotary_dim = 10;
    });
    with(names[format], [&](Settings& s) { s.cache = s.others = format, s.batch = 3, s.steps = 5, s.kept = 2; });
    with("a long context in chunks, three threads",
         [&](Settings& s) { s.cache = format, s.length = 300, s.chunks = 4, s.threads = 3, s.batch = 2; });
    for (int64_t bits : {4, 8}) {
      with("packed", [&](Settings& s) { s.others = format, s.bits = bits, s.head_dim = s.rotary_dim = 32; });
      with("packed, a group of 64, two threads", [&](Settings& s) {
        s.others = format, s.bits = bits, s.group_size = 64, s.hidden = 192, s.intermediate = 128, s.threads = 2;
        s.steps = 3;
      });
    }
  }
  for (int64_t bits : {4, 8}) {
    with("packed, as integers", [&](Settings& s) {
      s.bits = bits, s.int8 = true, s.group_size = 64, s.hidden = s.intermediate = 256, s.tolerance = 0.03;
    });
  }
  with("gelu", [](Settings& s) { s.activation = kGelu, s.norm_offset = 1, s.embedding_scale = 8; });
  with("gelu by tanh", [](Settings& s) { s.activation = kGeluTanh, s.residual_scale = 0.25f; });
  with("windows", [](Settings& s) { s.length = 90, s.window = 40, s.steps = 4; });
  with("windows in chunks", [](Settings& s) { s.length = 350, s.window = 200, s.chunks = 3, s.steps = 2; });
  with("capped scores", [](Settings& s) { s.softcap = 5, s.length = 70; });
  with("padding on the left", [](Settings& s) { s.batch = 4, s.starts = true, s.length = 40; });
  with("norms of each head", [](Settings& s) { s.head_norm = HeadNorm::kEach; });
  with("norms of all heads", [](Settings& s) { s.head_norm = HeadNorm::kAll, s.threads = 2, s.steps = 3; });
  with("biases", [](Settings& s) { s.biases = true; });
  with("adapters", [](Settings& s) { s.adapters = s.biases = true, s.threads = 2; });
  with("norms of outputs", [](Settings& s) { s.output_norms = true, s.threads = 2, s.steps = 2; });
  with("norms of outputs alone", [](Settings& s) { s.output_norms = true, s.input_norms = false; });
  with("experts", [](Settings& s) { s.experts = 6, s.threads = 2, s.steps = 2; });
  with("experts, one shared", [](Settings& s) { s.experts = 5, s.chosen = 3, s.shared_expert = true; });
  with("experts, weights of sum 1",
       [](Settings& s) { s.experts = 6, s.normalise_experts = true, s.format = kBFloat16; });
  with("no rotation", [](Settings& s) { s.rotary_dim = 0; });
  return all;
}

}  // namespace

int main() {
  uint64_t seed = 10;
  for (const Settings& settings : all_settings()) Model(settings, ++seed).check();
  return finish("decode step");
}
