"""Compiles the host and device code of csrc/cuda with g++ against the torch of this environment, for the tests."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from find_torch import TORCH_TARGET_VERSION

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
# The flags with which CMakeLists.txt compiles csrc. The last one allows names that torch hides and these builds show.
STABLE = ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-Wno-attributes"]


def compiler() -> str:
    """g++, or clang++; without either, the test is skipped."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("needs a C++ compiler: neither g++ nor clang++ is on the path")
    return found


def torch_includes(sources: Iterable[Path]) -> str:
    """The lines that include torch's headers, for a precompiled header that every file includes first."""
    pattern = re.compile(r"^#include <(?:ATen|torch|c10(?!/cuda))/[^>]+>$", re.MULTILINE)
    lines = {line for path in sources for line in pattern.findall(path.read_text())}
    return "".join(f"{line}\n" for line in sorted(lines))


def digest(paths: Iterable[Path], *more: str) -> str:
    """A name for a build: a hash of its files and of `more`."""
    content = hashlib.sha256("\n".join([torch.__version__, *more]).encode())
    for path in sorted(paths):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:16]


def build(
    folder: Path, sources: Sequence[Path], target: Path, *, prefix: str, flags: Sequence[str], shared: bool
) -> None:
    """Compiles `sources` as C++, whatever their suffix, with one precompiled header, and links them to torch.

    Args:
        folder: where objects go.
        sources: the files.
        target: the library or program; written whole or not at all.
        prefix: text of the header that every file includes first.
        flags: of the compiler and the linker.
        shared: a library, or a program.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = [compiler(), "-std=c++20", "-fPIC", "-Wno-unknown-pragmas", *flags]
    common += [f"-isystem{TORCH}/include", f"-isystem{TORCH}/include/torch/csrc/api/include"]
    header = folder / "prefix.h"
    header.write_text(prefix)
    subprocess.run([*common, "-x", "c++-header", str(header), "-o", f"{header}.gch"], check=True)

    def compile_one(source: Path) -> str:
        made = folder / f"{source.name}.o"
        subprocess.run([*common, "-include", str(header), "-x", "c++", "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    link = [*common, *(["-shared"] if shared else []), *objects, f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib"]
    partial = target.with_suffix(f".{os.getpid()}")
    subprocess.run([*link, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(partial)], check=True)
    partial.rename(target)


def cache(name: str) -> Path:
    """The folder in which builds are kept between runs."""
    folder = Path(tempfile.gettempdir()) / f"pglcl_{os.getuid()}" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
