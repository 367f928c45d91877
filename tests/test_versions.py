"""The oldest torch and the oldest Python each have one place. Builds read them there, and pages say the same."""

from __future__ import annotations

import re
import sys

import pytest

from pglcl_ext import build_info
from pglcl_ext._library import OLDEST_TORCH
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import find_torch

OLDEST_PYTHON = re.search(r'^requires-python = ">=(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("README.md", r"torch (\S+) or later"),
        ("docs/architecture.md", r"every torch from (\S+) on"),
        ("Makefile", r"^TORCH \?= torch==(\d+\.\d+)"),
        (".ci/run", r"^oldest_torch=\"torch==(\d+\.\d+)"),
    ],
)
def test_every_file_names_the_same_oldest_torch(file: str, pattern: str) -> None:
    found = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found == [OLDEST_TORCH]


def test_the_build_asks_for_the_oldest_torch() -> None:
    assert f"torch>={OLDEST_TORCH}" == find_torch.TORCH_REQUIREMENT
    # As torch/headeronly/version.h numbers versions: a byte each for major, minor and patch, then five for the rest.
    major, minor = map(int, OLDEST_TORCH.split("."))
    assert int(find_torch.TORCH_TARGET_VERSION, 16) == (major << 56) + (minor << 48)
    files = [path for name in ("csrc", "tools", "tests") for path in (ROOT / name).rglob("*") if path.is_file()]
    for path in [ROOT / "CMakeLists.txt", *files]:
        # This file asks for it, and so does what Python compiles it to.
        assert path.stem.startswith("test_versions") or b"TORCH_TARGET_VERSION=0x" not in path.read_bytes(), path


def test_every_file_names_the_same_oldest_python() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"Python (\S+) or later", text) == [OLDEST_PYTHON]
    assert f"with Python {OLDEST_PYTHON}" in text  # that is, tested
    # ruff then takes the version from requires-python, and refuses the syntax of later ones.
    assert "target-version" not in (ROOT / "pyproject.toml").read_text()


def test_every_instruction_set_has_flags() -> None:
    """The sets come from one list (csrc/cpu/instruction_sets.h). Their flags are in CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    flags = re.findall(r"^set\(isa_(\w+)", text, flags=re.MULTILINE)
    listed = re.findall(r"X\((\w+), (?:true|false)\)", (ROOT / "csrc/cpu/instruction_sets.h").read_text())
    assert set(flags) == set(listed)
    assert set(build_info()["cpu_instruction_sets"]) <= set(listed)
