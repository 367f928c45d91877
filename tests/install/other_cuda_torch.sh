#!/usr/bin/env bash
# A CUDA build, made against one torch, under another torch of the same major version of CUDA: it imports, and its CPU
# kernels pass the ops' tests. Takes 6 GB for the other torch, and 3 more while pip unpacks it.
#
#   tests/install/other_cuda_torch.sh VENV TORCH     VENV: where the CUDA build is installed (make cuda-check)
set -euo pipefail
cd "$(dirname "$0")/../.."
built=$(realpath "$1")
torch=$2
free=$(($(df --output=avail -k "${TMPDIR:-/tmp}" . | sort -n | sed -n 2p) >> 20))
[ "$free" -ge 12 ] || { echo "not checked under $torch: it needs 12 GB of disk and $free GB are free"; exit; }
work=$(mktemp -d "${TMPDIR:-/tmp}/pglcl-cuda-torch.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$built/bin/python" -m venv "$work/venv"
# --isolated: a user's settings may prefer a wheel of this torch without CUDA.
"$work/venv/bin/pip" --isolated install --quiet --no-cache-dir "$torch" numpy scipy pytest hypothesis psutil ||
  { echo "not checked under $torch: pip finds no wheel"; exit; }
cuda=$("$work/venv/bin/python" -c "import torch; print(torch.version.cuda or '')")
[ -n "$cuda" ] || { echo "not checked under $torch: its wheel here is one without CUDA"; exit; }
site=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
cp -r "$built"/lib/python3*/site-packages/pglcl_ext{,-*.dist-info} "$site"
mkdir "$work/core"  # without the sources of the package, which would be imported in its place
cp -r tests benchmarks pyproject.toml "$work/core"
tests=$(make -s op-tests)
cd "$work/core"
"$work/venv/bin/python" -m pytest -p no:cacheprovider -k "not memory" --draw 200 $tests
"$work/venv/bin/python" - <<'PY'
import pglcl_ext

info = pglcl_ext.build_info()
assert info["cuda_built"] and info["torch_built"] != info["torch_running"], info
print(f"with CUDA, built against torch {info['torch_built']}, passes under {info['torch_running']}")
PY
