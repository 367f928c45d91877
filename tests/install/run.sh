#!/usr/bin/env bash
# Installs as users do it, with the real compiler: isolated, twice, from an sdist, by front ends that hide the environment.
# Takes two compilations. The build folder's other states are tested in seconds by tests/test_build.py.
#
#   tests/install/run.sh TORCH
set -euo pipefail
torch=$1
. "$(dirname "$0")/checkout.sh"

python3 -m venv "$work/venv"
pip="$work/venv/bin/pip"
"$pip" install --quiet "$torch"
before=$("$work/venv/bin/python" -c 'import torch; print(torch.__version__)')

check() {  # the installed package works outside of the sources, and torch is the one that was there
  (cd "$work" && venv/bin/python - "$before" <<'PY'
import sys

import torch

from pglcl_ext import PatchContrastLoss, build_info, patch_entropy

assert torch.__version__ == sys.argv[1], f"the install replaced torch {sys.argv[1]} with {torch.__version__}"
z = torch.randn(100, 16, requires_grad=True)
loss = PatchContrastLoss(max_positive_disparity=0.5)(z, torch.randint(0, 3, (100,)), torch.rand(100))
loss.backward()
assert torch.isfinite(z.grad).all() and loss > 0
assert patch_entropy(torch.zeros(1, 2, 8, 8), 4).shape == (1, 2, 2)
print(build_info())
PY
  )
}

refused() {  # a command that must stop at once, with one line that says what to do
  local said
  if said=$("$@" 2>&1); then echo "not refused: $*"; exit 1; fi
  case "$said" in *PGLCL_TORCH_DIR=*) ;; *) echo "refused without a way out: $* -> $said"; exit 1 ;; esac
}

echo "--- isolated, and again with the build folder that is left"
"$pip" install --quiet "$work/checkout"
check
said=$(cd "$work/checkout" && "$work/venv/bin/python" -c "import pglcl_ext" 2>&1) && { echo "sources imported"; exit 1; }
case "$said" in *"finds the sources in"*) ;; *) echo "import in the checkout: $said"; exit 1 ;; esac
"$pip" install --quiet --no-deps --force-reinstall "$work/checkout"
check

echo "--- no path of this machine in the module"
module=$(ls "$work"/venv/lib/python3*/site-packages/pglcl_ext/_C*.so)
if grep -aoE "($work|$HOME|$PWD)/[A-Za-z0-9_./-]+" "$module" | head -3 | grep .; then exit 1; fi

echo "--- front ends that hide the environment fetch no torch"
"$pip" install --quiet build uv
refused env -u VIRTUAL_ENV PATH="/usr/bin:/bin" "$work/venv/bin/python" -m build --wheel "$work/checkout"
refused env -u VIRTUAL_ENV PATH="/usr/bin:/bin" "$work/venv/bin/uv" build --wheel --python "$work/venv/bin/python" \
  "$work/checkout"

echo "--- sdist, wheel, and the wheel in an environment where it is the first package"
"$work/venv/bin/python" -m build --quiet --sdist --outdir "$work/dist" "$work/checkout"
"$pip" wheel --quiet --no-deps --wheel-dir "$work/dist" "$work"/dist/pglcl_ext-*.tar.gz

echo "--- a manylinux wheel, but for the libraries that come with torch"
"$pip" install --quiet auditwheel
"$work/venv/bin/auditwheel" show --json "$work"/dist/pglcl_ext-*.whl >"$work/wheel.json"
python3 - "$work/wheel.json" <<'PY'
import json
import re
import sys

found = json.load(open(sys.argv[1]))
others = [name for name in found["external_libs"] if not re.match(r"lib(torch|c10|gomp|cuda)", name)]
assert not others, f"the wheel needs libraries that neither torch nor every Linux brings: {others}"
assert found["sym_tag"].startswith("manylinux"), found["sym_tag"]
print(found["sym_tag"])
PY
"$pip" uninstall --quiet --yes pglcl-ext
"$pip" install --quiet "$work"/dist/pglcl_ext-*.whl
check

# Without the extra, the command says which one it needs.
code=0
said=$(cd "$work" && venv/bin/pglcl inspect . 2>&1) || code=$?
case "$code $said" in "3 pglcl needs monai"*) ;; *) echo "pglcl without its extra: $code $said"; exit 1 ;; esac
echo "installs as it should"
