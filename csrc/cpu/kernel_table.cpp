#include "isa/kernel_table.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "instruction_sets.h"

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

#define PGLCL_DECLARE_ONE(isa, bf16) PGLCL_DECLARE(isa)
PGLCL_FOR_EACH_ISA(PGLCL_DECLARE_ONE)

namespace {

#define PGLCL_LEVEL(isa, bf16) isa,
struct Level {
  enum : int { PGLCL_FOR_EACH_ISA(PGLCL_LEVEL) };
};

#define PGLCL_NAME(isa, bf16) #isa,
const char* const kNames[] = {PGLCL_FOR_EACH_ISA(PGLCL_NAME)};

// A table is made on first use. The functions that fill it are compiled for its instruction set, too, so they must not
// run on a processor without it.
const KernelTable& table_of(int level) {
#define PGLCL_CASE(isa, bf16)                                \
  case Level::isa: {                                         \
    static const KernelTable table = PGLCL_TABLE(isa, bf16); \
    return table;                                            \
  }
  switch (level) { PGLCL_FOR_EACH_ISA(PGLCL_CASE) }
  throw std::logic_error("no instruction set has the number " + std::to_string(level));
}

// The most demanding instruction set that the processor has.
int best_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return Level::baseline;
#if defined(PGLCL_EMULATE_AVX512)
  return Level::avx512_bf16;
#endif
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Level::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Level::avx512_bf16 : Level::avx512;
#elif defined(__aarch64__)
  return Level::neon;
#else
  return Level::baseline;
#endif
}

// The fastest of them. By LLVM's model of Sapphire Rapids, a product of bfloat16 pairs is four operations and takes the
// time of four multiply-adds. Of AMD's processors, Zen 4 and later ones make it in the time of one.
int fastest_supported() {
#if defined(__x86_64__)
  if (best_supported() == Level::avx512_bf16 && !__builtin_cpu_is("amd")) return Level::avx512;
#endif
  return best_supported();
}

}  // namespace

const char* instruction_set(int level) { return level < int(std::size(kNames)) ? kNames[level] : nullptr; }

const KernelTable& kernel_table() {
  static const int best = best_supported(), fastest = fastest_supported();
  const char* wanted = std::getenv("PGLCL_CPU_ISA");
  if (!wanted || !*wanted) return table_of(fastest);
  std::string names;
  for (int level = 0; level < int(std::size(kNames)); ++level) {
    if (std::strcmp(wanted, kNames[level]) == 0) return table_of(std::min(level, best));
    names += (level ? ", " : "") + std::string(kNames[level]);
  }
  throw std::invalid_argument("PGLCL_CPU_ISA must be one of " + names + ", got '" + wanted + "'");
}

}  // namespace pglcl
