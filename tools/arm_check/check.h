// What the checks share: random numbers, numbers rounded to a format, and a comparison that counts what is wrong.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "decode/decode_params.h"

namespace check {

using torch_fused::kBFloat16;
using torch_fused::kFloat16;
using torch_fused::kFloat32;

inline int failures = 0, comparisons = 0;

// `got` must be within `tolerance` of `expected`, or be the same infinity, or both NaN.
inline void close(const std::string& what, double got, double expected, double tolerance) {
  ++comparisons;
  const bool same = std::isnan(expected) ? std::isnan(got) : got == expected || std::fabs(got - expected) <= tolerance;
  if (!same && ++failures <= 20) std::printf("%s: got %.9g, expected %.9g\n", what.c_str(), got, expected);
}

inline void equal(const std::string& what, int64_t got, int64_t expected) {
  ++comparisons;
  if (got != expected && ++failures <= 20) {
    std::printf("%s: got %lld, expected %lld\n", what.c_str(), (long long)got, (long long)expected);
  }
}

// The program's last line and its exit status.
inline int finish(const char* name) {
  std::printf("%s: %d comparisons, %d failed\n", name, comparisons, failures);
  return failures || !comparisons;
}

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  // About normal, with a standard deviation of 1.
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += static_cast<double>(bits() >> 11) * 0x1p-53;
    return sum;
  }

 private:
  uint64_t state_;
};

// A format with `bits` significant bits; `lowest` is the exponent of its last bit near zero, `largest` its largest
// value.
struct Format {
  int bits, lowest;
  double largest;
};

inline Format format_of(uint32_t format) {
  if (format == kFloat32) return {24, -149, 0x1.fffffep127};
  if (format == kFloat16) return {11, -24, 65504};
  return {8, -133, 0x1.fep127};
}

// The nearest value of the format, ties to even, in arithmetic on doubles.
inline double rounded(double value, uint32_t format) {
  if (value == 0 || !std::isfinite(value)) return value;
  const Format f = format_of(format);
  int exponent;
  std::frexp(value, &exponent);
  const int last = std::max(exponent - f.bits, f.lowest);
  const double result = std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
  return std::fabs(result) > f.largest ? std::copysign(INFINITY, value) : result;
}

// The bits of a value that the format holds.
inline uint32_t encoded(double value, uint32_t format) {
  if (format == kFloat32 || format == kBFloat16) {
    const auto single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof(bits));
    return format == kFloat32 ? bits : bits >> 16;
  }
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  if (std::isinf(value)) return sign | 0x7c00;
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);  // from 0.5 to 1
  if (value == 0 || exponent < -13) return sign | static_cast<uint32_t>(std::ldexp(std::fabs(value), 24));
  return sign | static_cast<uint32_t>(exponent + 14) << 10 | static_cast<uint32_t>((fraction * 2 - 1) * 1024);
}

inline double decoded(uint32_t bits, uint32_t format) {
  if (format != kFloat16) {
    if (format == kBFloat16) bits <<= 16;
    float single;
    std::memcpy(&single, &bits, sizeof(single));
    return single;
  }
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

inline int64_t size_of(uint32_t format) {
  return format == kFloat32 ? 4 : 2;
}

// Numbers in memory, as a kernel takes them.
class Stored {
 public:
  Stored() = default;
  Stored(const std::vector<double>& values, uint32_t format)
      : bytes_(values.size() * static_cast<size_t>(size_of(format))), format_(format) {
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t bits = encoded(rounded(values[i], format), format);
      std::memcpy(bytes_.data() + i * static_cast<size_t>(size_of(format)), &bits, size_of(format));
    }
  }

  double operator[](int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes_.data() + i * size_of(format_), size_of(format_));
    return decoded(bits, format_);
  }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  uint32_t format() const { return format_; }
  int64_t count() const { return static_cast<int64_t>(bytes_.size()) / size_of(format_); }

 private:
  std::vector<char> bytes_;
  uint32_t format_ = kFloat32;
};

inline std::vector<double> normals(Random& random, int64_t n, double scale = 1, double shift = 0) {
  std::vector<double> values(n);
  for (double& value : values) value = random.normal() * scale + shift;
  return values;
}

inline const char* name_of(uint32_t format) {
  return format == kFloat32 ? "f32" : format == kFloat16 ? "f16" : "bf16";
}

}  // namespace check
