// What the programs of the witness share: numbers of the kernels' types, a comparison with brute force in float64, and
// gradients by central differences. Brute force is not watched by ThreadSanitizer, which would only slow it down.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "ptx.h"
// The shim comes first: the kernels' headers are CUDA.
#include "cuda/kernels/device.h"

#define PGLCL_UNWATCHED __attribute__((no_sanitize("thread")))

namespace witness {

using Values = std::vector<double>;
using Integers = std::vector<int64_t>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// --- numbers of a type, as doubles: 11 bits of mantissa, or 8

template <typename T>
struct Numbers {
  static constexpr const char* kName = sizeof(T) == 8 ? "float64" : "float32";
  static constexpr double kTolerance = sizeof(T) == 8 ? 1e-7 : 1e-4;  // of the differences, and of float32 sums
  static T encode(double x) { return T(x); }
  static double decode(T x) { return double(x); }
};
template <>
struct Numbers<pglcl::BFloat16> {
  static constexpr const char* kName = "bfloat16";
  static constexpr double kTolerance = 2e-2;
  static pglcl::BFloat16 encode(double x) { return {uint16_t(__float_as_uint(float(x)) >> 16)}; }
  static double decode(pglcl::BFloat16 x) { return double(__uint_as_float(unsigned(x.bits) << 16)); }
};
template <>
struct Numbers<pglcl::Float16> {
  static constexpr const char* kName = "float16";
  static constexpr double kTolerance = 4e-3;
  static pglcl::Float16 encode(double x) {  // towards 0; below 2^-14: 0
    int exponent = 0;
    const double mantissa = std::frexp(std::fabs(x), &exponent);  // in [1/2, 1)
    const int bits = exponent < -13 ? 0 : (exponent + 14) * 1024 + int(mantissa * 2048) - 1024;
    return {uint16_t(bits | (x < 0 ? 0x8000 : 0))};
  }
  static double decode(pglcl::Float16 x) { return double(Ptx::half_to_float(x.bits)); }
};

template <typename T>
PGLCL_UNWATCHED std::vector<T> encode(const Values& values) {
  std::vector<T> out;
  for (const double v : values) out.push_back(Numbers<T>::encode(v));
  return out;
}
template <typename T>
PGLCL_UNWATCHED Values decode(const std::vector<T>& numbers) {
  Values out;
  for (const T& x : numbers) out.push_back(Numbers<T>::decode(x));
  return out;
}

inline std::mt19937_64& engine() {
  static std::mt19937_64 engine(0);
  return engine;
}
// Normal numbers that T represents.
template <typename T>
Values numbers(int64_t count, double scale = 1) {
  std::normal_distribution<double> draw(0, scale);
  Values out;
  for (int64_t i = 0; i < count; ++i) out.push_back(Numbers<T>::decode(Numbers<T>::encode(draw(engine()))));
  return out;
}
// From [0, 1], in steps of 1 / steps, so that ties occur.
inline Values fractions(int64_t count, int steps) {
  Values out;
  for (int64_t i = 0; i < count; ++i)
    out.push_back(double(std::uniform_int_distribution<int>(0, steps)(engine())) / steps);
  return out;
}
inline Integers integers(int64_t low, int64_t above, int64_t count) {
  Integers out;
  for (int64_t i = 0; i < count; ++i) out.push_back(std::uniform_int_distribution<int64_t>(low, above - 1)(engine()));
  return out;
}
// An output before the kernel writes it: no number.
template <typename T>
std::vector<T> unwritten(int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  std::memset(static_cast<void*>(out.data()), kNaN, out.size() * sizeof(T));
  return out;
}

// --- comparison

inline int failures = 0;

PGLCL_UNWATCHED inline void compare(const std::string& what, const Values& have, const Values& want, double tolerance) {
  double scale = 1e-3, worst = 0;
  for (const double v : want)
    if (std::isfinite(v)) scale = std::max(scale, std::fabs(v));
  bool same = have.size() == want.size();
  for (size_t i = 0; same && i < want.size(); ++i) {
    if (have[i] == want[i]) continue;
    const double error = std::fabs(have[i] - want[i]) / scale;
    if (!(error <= worst)) worst = error;
  }
  if (same && worst <= tolerance) return;
  std::printf("%s: off by %g of its largest, %zu numbers for %zu\n", what.c_str(), worst, have.size(), want.size());
  ++failures;
}

template <typename Function>
PGLCL_UNWATCHED Values differences(const Function& f, Values x) {
  Values gradient(x.size());
  const double step = 1e-5;
  for (size_t i = 0; i < x.size(); ++i) {
    const double at = x[i];
    x[i] = at + step;
    const double above = f(x);
    x[i] = at - step;
    gradient[i] = (above - f(x)) / (2 * step);
    x[i] = at;
  }
  return gradient;
}

// --- programs: PROGRAM [CASE [BARRIER]]
// Runs all cases, or one of them, counted from 0. BARRIER is the number of a barrier to leave out. Exit status 0:
// agrees; 1: disagrees; 3: the shim refuses; what ThreadSanitizer finds ends the program with a status of its own.
inline int run(int count, char** arguments, const std::vector<std::function<void()>>& cases) {
  const int only = count > 1 ? std::atoi(arguments[1]) : -1;
  if (count > 2) removed() = std::atoi(arguments[2]);
  for (int i = 0; i < int(cases.size()); ++i)
    if (only < 0 || only == i) cases[size_t(i)]();
  return failures ? 1 : 0;
}

}  // namespace witness
