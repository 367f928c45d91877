"""Configures, compiles and installs the native module with CMake, whatever the state of the build folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from find_torch import NoTorch, find_torch, torch_versions

OLDEST_CMAKE = (3, 25)
FLAGS = ("CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "CFLAGS", "CXXFLAGS", "CUDAFLAGS", "CPPFLAGS", "LDFLAGS")


def build(root: Path, target: Path) -> None:
    """Puts the compiled module and `_build_config.py` into `target`.

    There is a build folder for each interpreter and torch, which is kept and used again. It is emptied if it was made
    for another source folder, interpreter, torch or compiler, for example after a checkout was moved.

    Args:
        root: the source folder, which holds CMakeLists.txt.
        target: the folder that receives the module.

    Raises:
        SystemExit: with one line that says what is missing, or which step failed.
    """
    torch = find_torch(os.environ.get("PGLCL_TORCH_DIR"))
    if torch is None:
        raise NoTorch("pglcl-ext: no torch to build against; install torch first, then this package")
    _check_compiler()
    cmake, ninja = _cmake(), _tool("ninja")
    version, _ = torch_versions(torch)
    folder = root / "build" / f"{sys.implementation.cache_tag}-torch-{version}"
    _begin_anew_unless_fit(folder, root, torch)
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,  # every isolated build has another folder for these three
        "pybind11_DIR": _pybind11(),
        "Python_EXECUTABLE": sys.executable,
        "PGLCL_TORCH_DIR": str(torch),
        "PGLCL_CUDA": os.environ.get("PGLCL_CUDA", "AUTO"),
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";"),
        "PGLCL_INSTALL_DIR": str(target),
    }
    given = [f"-D{name}={value}" for name, value in options.items()]
    _run("configure", [cmake, "-S", str(root), "-B", str(folder), "-G", "Ninja", *given])
    _run("compile", [cmake, "--build", str(folder)])
    _run("install", [cmake, "--install", str(folder)])


def _begin_anew_unless_fit(folder: Path, root: Path, torch: Path) -> None:
    """Empties the build folder unless it was made for the same paths and tools, which CMake's cache never forgets."""
    made_for = {
        "sources": str(root),
        "folder": str(folder),
        "python": [os.path.realpath(sys.executable), sys.prefix, sys.version],
        "torch": [str(torch), *torch_versions(torch)],
        "compiler": [shutil.which(name) for name in ("c++", "g++", "clang++", "nvcc")],
        "variables": {name: os.environ.get(name) for name in FLAGS},
    }
    note = folder / "made_for.json"
    try:
        fits = json.loads(note.read_text()) == made_for
    except (OSError, ValueError):
        fits = False
    if not fits:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        note.write_text(json.dumps(made_for, indent=2))


def _check_compiler() -> None:
    named = os.environ.get("CXX", "").split()
    if named and not shutil.which(named[0]):
        raise SystemExit(
            f"pglcl-ext: CXX={os.environ['CXX']} names no program; set it to a C++20 compiler, or unset it"
        )
    if not named and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise SystemExit(
            "pglcl-ext: no C++ compiler found (c++, g++ or clang++ on PATH, or CXX); on Debian: apt install g++"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise SystemExit(
            f"pglcl-ext: Python's headers are missing ({headers}/Python.h); on Debian: apt install python3-dev"
        )


def _candidates(name: str) -> Iterator[str]:
    """Programs of that name on PATH, and beside the interpreter, whose environment may not be activated."""
    for places in (os.environ.get("PATH"), sysconfig.get_path("scripts")):
        found = shutil.which(name, path=places)
        if found:
            yield found


def _tool(name: str) -> str:
    found = next(_candidates(name), None)
    if found is None:
        raise SystemExit(f"pglcl-ext: {name} not found on PATH; pip install {name}, or leave out --no-build-isolation")
    return found


def _cmake() -> str:
    old = []
    for path in _candidates("cmake"):
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"(\d+)\.(\d+)(\.\d+)?", said)
        if match and (int(match[1]), int(match[2])) >= OLDEST_CMAKE:
            return path
        old.append(f"{path} is {match[0] if match else 'of no known version'}")
    wanted = ".".join(map(str, OLDEST_CMAKE))
    found = "; ".join(old) or "none found on PATH"
    raise SystemExit(f"pglcl-ext: needs cmake >= {wanted} ({found}); pip install 'cmake>={wanted}'")


def _pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise SystemExit(
            "pglcl-ext: pybind11 not found; pip install pybind11, or leave out --no-build-isolation"
        ) from None
    return pybind11.get_cmake_dir()


def _run(step: str, command: list[str]) -> None:
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(
            f"pglcl-ext: CMake could not {step} the native module (exit status {code}); its own message is above"
        )
