#!/usr/bin/env bash
# Runs the op tests with the AVX-512 kernels on a processor that has only AVX2.
#
#   tools/avx512.sh [pytest arguments]     by default a selection that takes two minutes; `tests` runs all op tests
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/variant.sh
build_tree build/avx512/emulated -DPGLCL_EMULATE_AVX512=ON
cd build/avx512/tree

run() {  # instruction set, pytest arguments
  local isa=$1
  shift
  echo "--- $isa"
  PGLCL_CPU_ISA=$isa "$python" -c "import pglcl_ext; assert pglcl_ext.build_info()['cpu_instruction_set'] == '$isa'"
  PGLCL_CPU_ISA=$isa "$python" -m pytest -p no:cacheprovider "$@"
}

if [ $# -gt 0 ]; then
  run avx512 "$@"
  run avx512_bf16 "$@"
  exit
fi
files=(tests/test_patch_contrast*.py tests/test_patch_statistics.py tests/test_gaussian_contrast.py)
kernels="not (compiles or opcheck or gradcheck or bad_input or devices or autocast or baseline or avx2)"
run avx512 -m "not slow" -k "$kernels" "${files[@]}"
# Tests that name their instruction set ran above. This set differs only in the products of bfloat16.
run avx512_bf16 -m "not slow" -k "bfloat16 and $kernels and not avx512" "${files[@]}"
