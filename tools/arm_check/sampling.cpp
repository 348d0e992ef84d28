// The ranking of tokens: greedy, what top-k, top-p and min-p keep, and the tokens drawn. The last line is a digest of
// every decision, which must be the same on every machine.
#include "sampling/ranking.h"

#include <numeric>

#include "check.h"
#include "common/philox.h"

using namespace torch_fused;
using namespace check;

namespace {

uint64_t digest = 0xcbf29ce484222325u;  // FNV-1a

void remember(int64_t value) {
  digest = (digest ^ static_cast<uint64_t>(value)) * 0x100000001b3u;
}

struct Filters {
  double temperature;
  int64_t top_k;  // 0 for none
  double top_p, min_p;

  RowParameters parameters() const {
    return {static_cast<float>(temperature), static_cast<float>(top_k), static_cast<float>(min_p),
            top_p < 1 ? static_cast<uint64_t>(top_p * 0x1p64) : kNoTopP};
  }
};

// The tokens in order, their probabilities after the temperature, and how many are kept, by sorting. `clear`: nothing
// that decides is so close that rounding could turn it.
struct Sorted {
  std::vector<int64_t> order;
  std::vector<double> probabilities;
  size_t kept;
  bool clear = true;
};

Sorted sort_tokens(const Stored& logits, const Filters& f) {
  constexpr double kClose = 1e-5;
  Sorted s;
  for (int64_t i = 0; i < logits.count(); ++i) {
    if (!std::isnan(logits[i]) && logits[i] != -INFINITY) s.order.push_back(i);
  }
  std::sort(s.order.begin(), s.order.end(),
            [&](int64_t a, int64_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  s.kept = s.order.size();
  if (f.top_k && static_cast<size_t>(f.top_k) < s.kept) {
    s.kept = static_cast<size_t>(f.top_k);
    while (s.kept < s.order.size() && logits[s.order[s.kept]] == logits[s.order[s.kept - 1]]) ++s.kept;
  }
  for (size_t i = 0; i < s.kept; ++i) {
    s.probabilities.push_back(std::exp((logits[s.order[i]] - logits[s.order[0]]) / f.temperature));
  }
  const auto normalise = [&] {
    s.probabilities.resize(s.kept);
    const double total = std::accumulate(s.probabilities.begin(), s.probabilities.end(), 0.0);
    for (double& p : s.probabilities) p /= total;
  };
  normalise();
  if (f.top_p < 1) {
    double sum = 0;
    for (size_t i = 0; i < s.kept; ++i) {
      sum += s.probabilities[i];
      s.clear &= std::fabs(sum - f.top_p) > kClose;
      if (sum >= f.top_p) s.kept = i + 1;
    }
    normalise();
  }
  const double least = f.min_p * s.probabilities[0];
  while (s.kept > 1 && s.probabilities[s.kept - 1] < least) --s.kept;
  for (double p : s.probabilities) s.clear &= f.min_p == 0 || std::fabs(p - least) > kClose * least;
  normalise();
  return s;
}

template <class T>
void check_row(const std::string& what, const Stored& logits, const Filters& f, uint64_t row, int& unclear) {
  const auto* values = static_cast<const T*>(logits.data());
  const int64_t count = logits.count();
  const Sorted expected = sort_tokens(logits, f);
  const Ranking<T> ranking(values, count, f.parameters());
  std::vector<T> output(count);
  ranking.write_kept(output.data(), f.temperature);
  std::vector<double> kept(count, -INFINITY);
  for (size_t i = 0; i < expected.kept; ++i) kept[expected.order[i]] = logits[expected.order[i]] / f.temperature;
  equal(what + ", greedy", first_maximum(values, count), expected.order[0]);
  for (int64_t i = 0; i < count; ++i) {
    const double got = static_cast<double>(static_cast<float>(output[i]));
    remember(std::isinf(got));
    const double ulp = logits.format() == kFloat32 ? 0x1p-23 : logits.format() == kFloat16 ? 0x1p-10 : 0x1p-7;
    if (expected.clear) close(what + ", kept", got, kept[i], std::isinf(kept[i]) ? 0 : ulp * std::fabs(kept[i]));
  }
  unclear += !expected.clear;
  for (uint64_t draw = 0; draw < 20; ++draw) {
    const uint64_t bits = random_bits(row, draw, 3);
    const int64_t token = ranking.draw(bits);
    remember(token);
    const double place = static_cast<double>(bits) * 0x1p-64;
    double before = 0, near = 1;
    size_t at = 0;
    for (; at + 1 < expected.kept && before + expected.probabilities[at] <= place; ++at) {
      near = std::min(near, std::fabs(before - place));
      before += expected.probabilities[at];
    }
    near = std::min({near, std::fabs(before - place), std::fabs(before + expected.probabilities[at] - place)});
    if (expected.clear && near > 1e-5) equal(what + ", drawn", token, expected.order[at]);
  }
}

template <class T>
void check_format(uint32_t format) {
  const Filters filters[] = {{1, 0, 1, 0},       {0.7, 50, 1, 0},    {1.3, 0, 0.9, 0},   {1, 0, 1, 0.05},
                             {0.8, 40, 0.95, 0}, {1, 50, 0.9, 0.02}, {2.5, 3, 0.5, 0.1}, {1, 1, 1, 0}};
  Random random(6);
  int unclear = 0, rows = 0;
  for (int64_t count : {1, 2, 63, 64, 65, 1000, 5003}) {
    for (const Filters& f : filters) {
      for (double spread : {0.5, 3.0}) {
        std::vector<double> values = normals(random, count, spread);
        if (count > 60) {
          values[7] = NAN;
          values[9] = -INFINITY;
          values[11] = values[20] = 4 * spread;  // a tie at the top
          values[30] = -0.0;
          values[31] = 0;
        }
        const std::string what = std::string(name_of(format)) + ", " + std::to_string(count) + " tokens";
        check_row<T>(what, Stored(values, format), f, static_cast<uint64_t>(++rows), unclear);
      }
    }
  }
  equal("rows of which most are compared", unclear < rows / 4, true);
}

void check_special() {
  const float nothing[] = {-INFINITY, NAN, -INFINITY}, infinite[] = {1, INFINITY, 2, INFINITY, NAN}, few[] = {NAN, 3};
  equal("nothing to draw", anything_in(nothing, 3), false);
  equal("nothing to draw", Ranking<float>(nothing, 3, {1, 0, 0, kNoTopP}).anything(), false);
  equal("greedy of nothing", first_maximum(nothing, 3), 0);
  equal("something to draw", anything_in(few, 2), true);
  equal("infinity", Ranking<float>(infinite, 5, {1, 0, 0, kNoTopP}).draw(0), 1);
  equal("infinity", Ranking<float>(infinite, 5, {1, 0, 0, kNoTopP}).draw(~uint64_t(0)), 3);
  equal("NaN or infinity", has_nan_or_inf(infinite, 1), false);
  equal("NaN or infinity", has_nan_or_inf(infinite, 2), true);
  equal("NaN or infinity", has_nan_or_inf(few, 2), true);
  equal("temperature 0", Ranking<float>(infinite, 1, {0, 0, 0, kNoTopP}).draw(~uint64_t(0)), 0);
  const float tied[] = {1, 5, 5, 2};
  for (uint64_t bits : {uint64_t(0), ~uint64_t(0)}) {
    equal("temperature 0 of a tie", Ranking<float>(tied, 4, {0, 0, 0, kNoTopP}).draw(bits), 1);
  }
}

// The known answers that come with the generator's paper.
void check_philox() {
  const Philox zeros = philox({0, 0, 0, 0}, 0, 0), ones = philox({~0u, ~0u, ~0u, ~0u}, ~0u, ~0u);
  equal("philox of zeros", int64_t(zeros.x) << 32 | zeros.y, int64_t(0x6627e8d5e169c58d));
  equal("philox of zeros", int64_t(zeros.z) << 32 | zeros.w, int64_t(0xbc57ac4c9b00dbd8));
  equal("philox of ones", int64_t(ones.x) << 32 | ones.y, int64_t(0x408f276d41c83b0e));
  equal("philox of ones", int64_t(ones.z) << 32 | ones.w, int64_t(0xa20bc7c66d5451fd));
}

}  // namespace

int main() {
  check_philox();
  check_special();
  check_format<float>(kFloat32);
  check_format<c10::Half>(kFloat16);
  check_format<c10::BFloat16>(kBFloat16);
  const int status = finish("sampling");
  std::printf("digest %016llx\n", (unsigned long long)digest);
  return status;
}
