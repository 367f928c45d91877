"""Runs the ops' own tests on csrc/cuda, host and device code, on emulated devices, each in its own process."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests import native
from tests.simt.emulator import DEVICES, TESTS

pytestmark = pytest.mark.slow

# All tests for one device: pytest --emulated 75 FILES; for all devices: make emulated, whose list this is.
OPS = re.search(r"^OPS := (.*)$", (native.ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
FILES = [
    str(path.relative_to(native.ROOT))
    for op in OPS
    for pattern in (f"tests/test_{op}.py", f"tests/test_{op}_*.py")
    for path in sorted(native.ROOT.glob(pattern))
]
DRAWN = 20  # of the tests of the ops, for each device: half a minute


def run_emulated(capability: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulated", str(capability)]
    done = subprocess.run([*command, *arguments], cwd=native.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_cases_of_every_kernel_pass_on_an_emulated_device() -> None:
    run_emulated(80, *TESTS)


@pytest.mark.parametrize("capability", DEVICES)
def test_a_draw_of_the_ops_tests_passes_on_emulated_devices(capability: int) -> None:
    # Without the largest tests, which `make emulated` runs.
    least = "not large_logits and not gradcheck and not extreme_logits"
    run_emulated(capability, "--draw", str(DRAWN), "--draw-seed", str(capability), "-k", least, *FILES)
