#!/usr/bin/env bash
# Compiles the whole module for aarch64, another kind of processor, and runs its kernels under emulation.
#
# Needs Debian's g++-aarch64-linux-gnu and qemu-user. Every kernel is compared with plain loops. It may execute at most a
# third of the instructions that the same compiler makes of these loops in float.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/variant.sh
folder=build/aarch64/module
configure "$folder" -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
# All steps except linking, which would need a torch for that processor.
ninja -C "$folder" kernels $(ninja -C "$folder" -t targets all | grep -oE '^CMakeFiles/_C\.dir/.*\.o(:|$)' | tr -d :)

emulated() { qemu-aarch64 -L /usr/aarch64-linux-gnu "$@"; }
emulated "$folder/kernels"

cc -shared -fPIC -O2 tests/kernels/instructions.c -o "$folder/instructions.so"
executed() {  # op, instruction set: instructions of a call, from runs of one call and of two
  local counts=()
  for repeats in 1 2; do
    counts+=("$(emulated -plugin "$PWD/$folder/instructions.so" "$folder/kernels" "$1" "$2" $repeats 2>&1 >/dev/null)")
  done
  echo $((counts[1] - counts[0]))
}
printf '\n%-20s %14s %14s %14s   plain / neon\n' "instructions" plain baseline neon
for op in contrast contrast+gradient statistics statistics+gradient gaussian; do
  plain=$(executed $op plain) baseline=$(executed $op baseline) neon=$(executed $op neon)
  printf '%-20s %14d %14d %14d   %d.%d\n' $op "$plain" "$baseline" "$neon" $((plain / neon)) $((plain * 10 / neon % 10))
  ((plain >= 3 * neon)) || { echo "aarch64: $op takes more than a third of the plain loops' instructions"; exit 1; }
done
