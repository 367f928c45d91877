#!/usr/bin/env bash
# The AVX-512 kernels, executed on a processor that has AVX2 alone, by the op tests.
#
#   tools/avx512.sh [pytest arguments]     by default a selection that takes two minutes; `tests` runs all op tests
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/variant.sh
selection=("$@")
if [ $# -eq 0 ]; then
  selection=(tests/test_patch_contrast.py tests/test_patch_statistics.py tests/test_gaussian_contrast.py
    -m "not slow" -k "not (compiles or opcheck or gradcheck or bad_input or citizenship or devices or autocast)")
fi

build_tree build/avx512/emulated -DPGLCL_EMULATE_AVX512=ON
cd build/avx512/tree
for isa in avx512 avx512_bf16; do
  echo "--- $isa"
  PGLCL_CPU_ISA=$isa "$python" -c "import pglcl_ext; assert pglcl_ext.build_info()['cpu_instruction_set'] == '$isa'"
  PGLCL_CPU_ISA=$isa "$python" -m pytest -p no:cacheprovider "${selection[@]}"
done
