#include "isa/kernel_table.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

namespace pglcl {

// Declared here and defined in contrast_tile.cpp, statistics_strip.cpp and gaussian_tile.cpp, compiled once per
// instruction set.
#define PGLCL_DECLARE(isa)                          \
  namespace isa {                                   \
  template <typename scalar_t>                      \
  ContrastKernels<scalar_t> contrast_kernels();     \
  template <typename scalar_t>                      \
  StatisticsKernels<scalar_t> statistics_kernels(); \
  template <typename scalar_t>                      \
  GaussianKernels<scalar_t> gaussian_kernels();     \
  }

#define PGLCL_TABLE(isa, bf16)        \
  {#isa,                              \
   bf16,                              \
   isa::contrast_kernels<float>(),    \
   isa::contrast_kernels<double>(),   \
   isa::statistics_kernels<float>(),  \
   isa::statistics_kernels<double>(), \
   isa::gaussian_kernels<float>(),    \
   isa::gaussian_kernels<double>()}

PGLCL_DECLARE(baseline)
#if defined(__x86_64__)
PGLCL_DECLARE(avx2)
PGLCL_DECLARE(avx512)
PGLCL_DECLARE(avx512_bf16)
#elif defined(__aarch64__)
PGLCL_DECLARE(neon)
#endif

namespace {

// From the least to the most demanding.
const char* const kNames[] = {
    "baseline",
#if defined(__x86_64__)
    "avx2",
    "avx512",
    "avx512_bf16",
#elif defined(__aarch64__)
    "neon",
#endif
};

// A table is made on first use. The functions that fill it are compiled for its instruction set, too, so they must not
// run on a processor without it.
const KernelTable& table_of(int level) {
  switch (level) {
#if defined(__x86_64__)
    case 3: {
      static const KernelTable table = PGLCL_TABLE(avx512_bf16, true);
      return table;
    }
    case 2: {
      static const KernelTable table = PGLCL_TABLE(avx512, false);
      return table;
    }
    case 1: {
      static const KernelTable table = PGLCL_TABLE(avx2, false);
      return table;
    }
#elif defined(__aarch64__)
    case 1: {
      static const KernelTable table = PGLCL_TABLE(neon, false);
      return table;
    }
#endif
    default: {
      static const KernelTable table = PGLCL_TABLE(baseline, false);
      return table;
    }
  }
}

int best_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
#if defined(PGLCL_EMULATE_AVX512)
  return 3;
#endif
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#elif defined(__aarch64__)
  return 1;
#else
  return 0;
#endif
}

}  // namespace

const char* instruction_set(int level) { return level < int(std::size(kNames)) ? kNames[level] : nullptr; }

const KernelTable& kernel_table() {
  static const int best = best_supported();
  const char* wanted = std::getenv("PGLCL_CPU_ISA");
  if (!wanted || !*wanted) return table_of(best);
  std::string names;
  for (int level = 0; level < int(std::size(kNames)); ++level) {
    if (std::strcmp(wanted, kNames[level]) == 0) return table_of(std::min(level, best));
    names += (level ? ", " : "") + std::string(kNames[level]);
  }
  throw std::invalid_argument("PGLCL_CPU_ISA must be one of " + names + ", got '" + wanted + "'");
}

}  // namespace pglcl
