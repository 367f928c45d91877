// The instruction sets that the kernels are compiled for. The kernel table is made from this list, and CMakeLists.txt
// reads the names from it: it preprocesses this file with PGLCL_PRINT_INSTRUCTION_SETS and adds each name's flags.
#pragma once

// X(name, whether it multiplies pairs of bfloat16), from the least to the most demanding.
#if defined(__x86_64__)
#define PGLCL_FOR_EACH_ISA(X) X(baseline, false) X(avx2, false) X(avx512, false) X(avx512_bf16, true)
#elif defined(__aarch64__)
// Every such processor has NEON. The baseline is the compiler's plain vectors.
#define PGLCL_FOR_EACH_ISA(X) X(baseline, false) X(neon, false)
#else
#define PGLCL_FOR_EACH_ISA(X) X(baseline, false)
#endif

#if defined(PGLCL_PRINT_INSTRUCTION_SETS)
#define PGLCL_PRINT(isa, bf16) isa
PGLCL_FOR_EACH_ISA(PGLCL_PRINT)
#endif
