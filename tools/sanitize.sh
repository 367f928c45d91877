#!/usr/bin/env bash
# Runs the kernels' threads under ThreadSanitizer, then op tests under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tools/sanitize.sh [pytest arguments]     by default a selection that takes minutes; `tests` runs all op tests
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/variant.sh
selection=("$@")
if [ $# -eq 0 ]; then
  selection=(tests/test_patch_contrast*.py tests/test_patch_statistics.py tests/test_gaussian_contrast.py
    tests/test_semantic_disparity.py
    -k "sizes or instruction_set or explicit_masks or slices or nothing or bad_input or every_shape or reference")
fi

configure build/sanitize/thread -DPGLCL_SANITIZE=thread
cmake --build build/sanitize/thread --target kernels
TSAN_OPTIONS=halt_on_error=1 build/sanitize/thread/kernels

build_tree build/sanitize/address -DPGLCL_SANITIZE=address,undefined
cd build/sanitize/tree
# Leaks are not checked: the interpreter and torch never free memory that they use until their end.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -m pytest -p no:cacheprovider "${selection[@]}"
