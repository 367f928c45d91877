// The CPU kernels of one instruction set, and the choice between them.
#pragma once

#include "contrast_tile.h"
#include "gaussian_tile.h"
#include "statistics_strip.h"

namespace pglcl {

template <typename scalar_t>
struct ContrastKernels {
  using Function = void (*)(const ContrastTile<scalar_t>&, const TilePosition&, const ContrastScratch<scalar_t>&);
  int panel;          // keys in a packed panel
  int lanes;          // scalars in a vector
  Function maximum;   // raises state.max_logit to the largest logit of each anchor
  Function sum;       // adds to the forward sums of each anchor
  Function gradient;  // adds to the gradients
};

template <typename scalar_t>
struct StatisticsKernels {
  void (*forward_strip)(const StatisticsStrip<scalar_t>&);
  void (*backward_strip)(const StatisticsGradientStrip<scalar_t>&);
};

template <typename scalar_t>
struct GaussianKernels {
  int panel;  // rows are padded to a multiple of this
  void (*tile)(const GaussianTile<scalar_t>&);
};

struct KernelTable {
  const char* name;
  bool bf16_products;  // contrast tiles multiply bfloat16 in hardware
  ContrastKernels<float> contrast_float;
  ContrastKernels<double> contrast_double;
  StatisticsKernels<float> statistics_float;
  StatisticsKernels<double> statistics_double;
  GaussianKernels<float> gaussian_float;
  GaussianKernels<double> gaussian_double;

  template <typename scalar_t>
  const ContrastKernels<scalar_t>& contrast() const {
    if constexpr (sizeof(scalar_t) == 4)
      return contrast_float;
    else
      return contrast_double;
  }
  template <typename scalar_t>
  const StatisticsKernels<scalar_t>& statistics() const {
    if constexpr (sizeof(scalar_t) == 4)
      return statistics_float;
    else
      return statistics_double;
  }
  template <typename scalar_t>
  const GaussianKernels<scalar_t>& gaussian() const {
    if constexpr (sizeof(scalar_t) == 4)
      return gaussian_float;
    else
      return gaussian_double;
  }
};

// The table for this machine: the fastest instruction set of the processor, or the one that PGLCL_CPU_ISA names,
// lowered to what the processor has. An empty value counts as unset, and an unknown name throws std::invalid_argument.
// The variable is read at every call, in little time compared with a kernel; the module also calls this once at its
// import.
const KernelTable& kernel_table();

// The names that PGLCL_CPU_ISA takes, from the least to the most demanding; null after the last.
const char* instruction_set(int level);

#ifdef PGLCL_ISA
namespace PGLCL_ISA {
template <typename scalar_t>
ContrastKernels<scalar_t> contrast_kernels();
template <typename scalar_t>
StatisticsKernels<scalar_t> statistics_kernels();
template <typename scalar_t>
GaussianKernels<scalar_t> gaussian_kernels();
}  // namespace PGLCL_ISA
#endif

}  // namespace pglcl
