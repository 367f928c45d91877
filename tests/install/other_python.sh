#!/usr/bin/env bash
# The package under another Python: the first of VERSIONs that this machine has and that there is a wheel of torch for. A
# wheel of ours is for one Python, so it is compiled there. Then a draw of the ops' tests and some tests of the training
# package run. Takes a compilation, 6 GB for another torch, and 3 more while pip unpacks it.
#
#   tests/install/other_python.sh [--find] TORCH VERSION...     --find: only prints that Python, or fails
set -euo pipefail
find=false
[ "${1-}" != --find ] || { find=true; shift; }
torch=$1
shift

first() {  # prints an interpreter
  local version python said
  for version in "$@"; do
    for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version."*"/bin/python$version"; do
      "$python" -c "import ensurepip, venv" 2>/dev/null || continue
      if said=$("$python" -m pip install --quiet --dry-run --no-deps --only-binary=:all: "$torch" 2>&1); then
        echo "$python"
        return
      fi
      echo "$python has no wheel of $torch: $(tail -n 1 <<<"$said")" >&2
    done
  done
  return 1
}

if ! python=$(first "$@"); then
  echo "no Python $* with venv and a wheel of $torch is here" >&2
  exit 1
fi
$find && { echo "$python"; exit; }
. "$(dirname "$0")/checkout.sh"
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir "$torch"
PGLCL_CUDA=0 "$work/venv/bin/pip" install --quiet "$work/checkout[train]" pytest hypothesis psutil
mkdir "$work/core"  # without the sources of the package, which would be imported in its place
cp -r "$work/checkout/"{tests,benchmarks,pyproject.toml} "$work/core"
cd "$work/core"
"$work/venv/bin/python" -m pytest -k "not memory" --draw 200 $(make -s -C "$work/checkout" op-tests)
"$work/venv/bin/python" -m pytest tests/pglcl/test_config.py tests/pglcl/test_contrast.py
"$work/venv/bin/python" -c "import platform, torch
print('passes under Python', platform.python_version(), 'and torch', torch.__version__)"
