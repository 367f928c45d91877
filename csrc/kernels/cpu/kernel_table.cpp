#include "kernel_table.h"

#include <cstdlib>
#include <cstring>

namespace pglcl {

// Declared here and defined in contrast_tile.cpp and statistics_strip.cpp, compiled once per instruction set.
#define PGLCL_DECLARE(isa)                          \
  namespace isa {                                   \
  template <typename scalar_t>                      \
  ContrastKernels<scalar_t> contrast_kernels();     \
  template <typename scalar_t>                      \
  StatisticsKernels<scalar_t> statistics_kernels(); \
  }

#define PGLCL_TABLE(isa, bf16)       \
  {#isa,                             \
   bf16,                             \
   isa::contrast_kernels<float>(),   \
   isa::contrast_kernels<double>(),  \
   isa::statistics_kernels<float>(), \
   isa::statistics_kernels<double>()}

PGLCL_DECLARE(baseline)
#if defined(__x86_64__)
PGLCL_DECLARE(avx2)
PGLCL_DECLARE(avx512)
PGLCL_DECLARE(avx512_bf16)
#endif

namespace {

// From the least to the most demanding.
const KernelTable kTables[] = {
    PGLCL_TABLE(baseline, false),
#if defined(__x86_64__)
    PGLCL_TABLE(avx2, false),
    PGLCL_TABLE(avx512, false),
    PGLCL_TABLE(avx512_bf16, true),
#endif
};
constexpr int kTableCount = sizeof(kTables) / sizeof(kTables[0]);

int best_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

}  // namespace

const KernelTable& kernel_table() {
  static const int best = best_supported();
  const char* wanted = std::getenv("PGLCL_CPU_ISA");
  if (wanted) {
    for (int i = 0; i <= best; ++i)
      if (std::strcmp(wanted, kTables[i].name) == 0) return kTables[i];
  }
  return kTables[best];
}

}  // namespace pglcl
