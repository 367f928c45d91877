#!/usr/bin/env bash
# The kernels' threads under ThreadSanitizer, then op tests under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tools/sanitize.sh [pytest arguments]     by default a selection that takes minutes; `tests` runs all op tests
#
# PYTHON names the interpreter of an environment with torch, cmake, ninja and pybind11 (default: that of .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
export PATH="$(dirname "$python"):$PATH"
selection=("$@")
if [ $# -eq 0 ]; then
  selection=(tests/test_patch_contrast.py tests/test_patch_statistics.py tests/test_gaussian_contrast.py
    tests/test_semantic_disparity.py
    -k "sizes or instruction_set or explicit_masks or slices or nothing or bad_input or every_shape or reference")
fi

configure() {  # folder, sanitizers
  cmake -S . -B "$1" -G Ninja -DPGLCL_SANITIZE="$2" -DPGLCL_CUDA=0 -DPython_EXECUTABLE="$python" \
    -DPGLCL_INSTALL_DIR="$PWD/build/sanitize/tree/pglcl_ext" >"$1.log" 2>&1 || { cat "$1.log"; exit 1; }
}

mkdir -p build/sanitize
configure build/sanitize/thread thread
cmake --build build/sanitize/thread --target sanitize_threads
TSAN_OPTIONS=halt_on_error=1 build/sanitize/thread/sanitize_threads

# The tests run on a copy of the Python sources, beside the instrumented module.
rm -rf build/sanitize/tree
mkdir -p build/sanitize/tree
cp -r pglcl_ext tests benchmarks pyproject.toml build/sanitize/tree
rm -f build/sanitize/tree/pglcl_ext/_C*.so
configure build/sanitize/address address,undefined
cmake --build build/sanitize/address
cmake --install build/sanitize/address >/dev/null
cd build/sanitize/tree
# Leaks are not looked for: the interpreter and torch never free what lives as long as they do.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -m pytest -p no:cacheprovider "${selection[@]}"
