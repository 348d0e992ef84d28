// Half types to and from float, exp, the activations, and the sum of a row.
#include "common/convert.h"

#include "check.h"
#include "common/activation.h"
#include "common/exp.h"
#include "common/half_runs.h"
#include "common/pairs.h"
#include "common/sum.h"

using namespace torch_fused;
using namespace check;

namespace {

// In loops, as the ops have them, so that the compiler makes vector instructions of them.
template <class T>
std::vector<float> widen_all(const std::vector<T>& from) {
  std::vector<float> to(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = widen(from[i]);
  return to;
}

template <class T>
std::vector<T> narrow_all(const std::vector<float>& from) {
  std::vector<T> to(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = narrow<T>(from[i]);
  return to;
}

template <class T>
std::vector<float> round_all(const std::vector<float>& from) {
  std::vector<float> to(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = round_to<T>(from[i]);
  return to;
}

std::vector<c10::Half> narrow_run_all(const std::vector<float>& from) {
  std::vector<c10::Half> to(from.size());
  narrow_run(from.data(), to.data(), static_cast<int64_t>(from.size()));
  return to;
}

// A float16 NaN may have any payload.
int64_t comparable(uint32_t bits, uint32_t format) {
  return std::isnan(decoded(bits, format)) ? -1 : bits;
}

template <class T>
void check_widening(uint32_t format) {
  std::vector<T> all(1 << 16);
  for (uint32_t bits = 0; bits < all.size(); ++bits) all[bits].x = static_cast<uint16_t>(bits);
  const std::vector<float> wide = widen_all(all);
  for (uint32_t bits = 0; bits < all.size(); ++bits) {
    const std::string what = std::string("widen ") + name_of(format);
    close(what, wide[bits], decoded(bits, format), 0);
    equal(what + ", sign", std::signbit(wide[bits]), bits >> 15);
    const float value[] = {wide[bits]};
    if (!std::isnan(*value)) equal("narrow_exact", narrow_exact<T>(*value).x, bits);
  }
}

// Every value of the format, the midpoints between neighbours, and the floats next to both; then floats of any bits.
std::vector<float> floats_around(uint32_t format) {
  std::vector<float> floats{0.0f, -0.0f, INFINITY, -INFINITY, 65519.99f, 65520.0f, 0x1.fffffep127f, 0x1p-149f};
  const uint32_t end = format == kFloat16 ? 0x7c00 : 0x7f80;
  for (uint32_t bits = 0; bits < end; ++bits) {
    const double value = decoded(bits, format), next = decoded(bits + 1, format);
    for (double at : {value, std::isinf(next) ? value : (value + next) / 2}) {
      const auto single = static_cast<float>(at);
      for (float near : {single, std::nextafter(single, -1.0f), std::nextafter(single, INFINITY)}) {
        floats.push_back(near);
        floats.push_back(-near);
      }
    }
  }
  Random random(1);
  for (int i = 0; i < 50000; ++i) {
    const auto value = static_cast<float>(decoded(static_cast<uint32_t>(random.bits()), kFloat32));
    if (!std::isnan(value)) floats.push_back(value);
  }
  return floats;
}

template <class T>
void check_narrowing(uint32_t format) {
  std::vector<float> floats = floats_around(format);
  if (format == kFloat16) floats.push_back(NAN);
  const std::vector<T> narrowed = narrow_all<T>(floats);
  const std::vector<float> rounds = round_all<T>(floats);
  for (size_t i = 0; i < floats.size(); ++i) {
    const double expected = rounded(floats[i], format);
    equal(std::string("narrow ") + name_of(format) + " of " + std::to_string(floats[i]),
          comparable(narrowed[i].x, format), comparable(encoded(expected, format), format));
    close(std::string("round_to ") + name_of(format), rounds[i], expected, 0);
  }
  if constexpr (std::is_same_v<T, c10::Half>) {
    const std::vector<c10::Half> run = narrow_run_all(floats);
    for (size_t i = 0; i < run.size(); ++i) {
      equal("narrow_run", comparable(run[i].x, format), comparable(narrowed[i].x, format));
    }
  }
}

void check_runs() {
  Random random(2);
  for (int64_t n = 0; n < 40; ++n) {
    const Stored values(normals(random, n + 1), kFloat16);
    std::vector<float> wide(n + 1, 7.0f);
    widen_run(static_cast<const c10::Half*>(values.data()), wide.data(), n);
    for (int64_t i = 0; i < n; ++i) close("widen_run", wide[i], values[i], 0);
    close("widen_run, past the end", wide[n], 7, 0);
  }
}

void check_pairs() {
  Random random(3);
  const Stored values(normals(random, 64), kBFloat16);
  const auto* from = static_cast<const c10::BFloat16*>(values.data());
  c10::BFloat16 stored[64];
  for (int64_t i = 0; i < 64; i += 2) {
    const Pair pair = load_pair(from + i);
    const Pair sums = round_pair({pair.first + pair.second, pair.first * pair.second});
    store_pair(stored + i, sums);
    close("load_pair", pair.first, values[i], 0);
    close("load_pair", pair.second, values[i + 1], 0);
    close("round_pair", sums.first, rounded(static_cast<float>(values[i] + values[i + 1]), kBFloat16), 0);
    close("round_pair", sums.second, rounded(static_cast<float>(values[i] * values[i + 1]), kBFloat16), 0);
    close("store_pair", decoded(stored[i].x, kBFloat16), sums.first, 0);
    close("store_pair", decoded(stored[i + 1].x, kBFloat16), sums.second, 0);
  }
}

template <class T, class Function>
std::vector<T> each(const std::vector<T>& from, Function function) {
  std::vector<T> to(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = function(from[i]);
  return to;
}

template <class T>
void check_functions(double ulp) {
  std::vector<T> x{0, T(-0.0), T(-INFINITY), T(NAN)}, near;
  for (double at = -120; at <= 0; at += 0.0137) x.push_back(static_cast<T>(at));
  const std::vector<T> exps = each(x, [](T value) { return exp_nonpositive(value); });
  for (size_t i = 0; i < x.size(); ++i) {
    // What is below the normal range may be rounded twice, and of the floats the least are lost.
    const double expected = std::exp(static_cast<double>(x[i])), least = sizeof(T) == 4 ? 0x1p-148 : 0;
    close("exp_nonpositive", exps[i], expected, 2 * ulp * std::fabs(expected) + least);
  }
  for (double at = -60; at <= 60; at += 0.0137) near.push_back(static_cast<T>(at));
  const auto expect = [&](const char* what, const std::vector<T>& got, auto function, double ulps, double absolute) {
    for (size_t i = 0; i < near.size(); ++i) {
      const double expected = function(static_cast<double>(near[i]));
      close(what, got[i], expected, ulps * ulp * std::fabs(expected) + absolute);
    }
  };
  expect(
      "one_plus_exp", each(near, [](T g) { return one_plus_exp(g); }), [](double g) { return 1 + std::exp(g); }, 3, 0);
  expect(
      "silu", each(near, [](T g) { return activate<kSilu>(g); }), [](double g) { return g / (1 + std::exp(-g)); }, 4,
      0x1p-55);
  expect(
      "gelu", each(near, [](T g) { return activate<kGelu>(g); }),
      [](double g) { return g * 0.5 * std::erfc(-g * std::sqrt(0.5)); }, 8, sizeof(T) == 4 ? 4e-7 : 1e-14);
  const auto gelu_tanh = [](double g) {
    const double y = 1.5957691216057308 * g * (1 + 0.044715 * g * g);
    return g / (1 + std::exp(-y));
  };
  expect("gelu_tanh", each(near, [](T g) { return activate<kGeluTanh>(g); }), gelu_tanh, 8,
         sizeof(T) == 4 ? 4e-7 : 1e-14);
}

template <class T>
void check_sums(double ulp) {
  Random random(4);
  for (int64_t n : {0, 1, 3, 4, 7, 8, 31, 64, 100, 1000, 4097, 100000}) {
    std::vector<T> terms(n);
    double expected = 0, size = 0;
    for (T& term : terms) {
      term = static_cast<T>(random.normal());
      expected += term;
      size += std::fabs(term);
    }
    const T sum = row_sum<T>(n, Terms{[&](int64_t i) { return terms[i]; }});
    close("row_sum of " + std::to_string(n), sum, expected, 16 * ulp * size);
  }
}

}  // namespace

int main() {
  check_widening<c10::Half>(kFloat16);
  check_widening<c10::BFloat16>(kBFloat16);
  check_narrowing<c10::Half>(kFloat16);
  check_narrowing<c10::BFloat16>(kBFloat16);
  check_runs();
  check_pairs();
  check_functions<float>(0x1p-24);
  check_functions<double>(0x1p-53);
  check_sums<float>(0x1p-24);
  check_sums<double>(0x1p-53);
  return finish("conversions");
}
