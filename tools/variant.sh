# Builds a module with other options for tests. The scripts of tools/ source this in the folder of the sources.
#
# PYTHON names the interpreter of an environment with torch, cmake, ninja and pybind11 (default: that of .venv).
python=${PYTHON:-$PWD/.venv/bin/python}
export PATH="$(dirname "$python"):$PATH"

configure() {  # folder, CMake options
  local folder=$1
  shift
  mkdir -p "$(dirname "$folder")"
  cmake -S . -B "$folder" -G Ninja -DPGLCL_CUDA=0 -DPython_EXECUTABLE="$python" \
    -DPGLCL_INSTALL_DIR="$PWD/$(dirname "$folder")/tree/pglcl_ext" "$@" >"$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }
}

build_tree() {  # folder, CMake options: puts such a module and a copy of the Python sources into the folder `tree` beside it
  local folder=$1 tree
  tree=$(dirname "$1")/tree
  rm -rf "$tree"
  mkdir -p "$tree"
  # Without bytecode, which other steps may be writing at the same time.
  find pglcl_ext tests benchmarks pyproject.toml -name __pycache__ -prune -o -type f ! -name '_C*.so' -print0 |
    tar -c --null -T - | tar -x -C "$tree"
  configure "$@"
  cmake --build "$folder"
  cmake --install "$folder" >/dev/null
}
