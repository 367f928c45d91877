# Sourced by the scripts beside it: $work, a folder that is removed at the end, holds a checkout.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Its build folder is one that no other step has seen. Other steps may be writing bytecode meanwhile, which stays away.
mkdir "$work/checkout"
find . \( -path ./build -o -name '.venv*' -o -name .git -o -name __pycache__ -o -name '.*_cache' -o -name .hypothesis \
  -o -name '*.egg-info' \) -prune -o -type f ! -name '*.so' ! -name _build_config.py -print0 |
  tar -c --null -T - | tar -x -C "$work/checkout"
