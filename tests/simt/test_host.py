"""The ops' own tests run through csrc/cuda, host and device code, on an emulated device, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import native

pytestmark = pytest.mark.slow

# The ops' own test files run the same way by hand: pytest --emulated 75 tests/test_patch_contrast.py
RUNS = [(80, ["tests/simt/emulated_kernels.py", "tests/simt/emulated_edges.py"])]


@pytest.mark.parametrize(("capability", "arguments"), RUNS, ids=lambda v: str(v if isinstance(v, int) else v[0]))
def test_ops_on_an_emulated_device(capability: int, arguments: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--emulated",
        str(capability),
        *arguments,
    ]
    done = subprocess.run(command, cwd=native.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
