"""Freed memory that is kept. test_limits has tests of what is refused."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import mmap, resource
import torch
from pglcl import memory
{before}
block = 256 * 2**20
def page_faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(block, dtype=torch.uint8)[:: mmap.PAGESIZE] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(page_faults_of_a_block() for _ in range(8)))  # the first few blocks may lie in different places
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE
kept = resident()
try:
    memory.require_memory(2**60, "a volume")
except memory.UserError:
    print(kept - resident())
"""


def run(before: str) -> list[int]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [int(line) for line in result.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do what they do")
def test_a_step_finds_its_memory_again_and_a_volume_gets_it_back() -> None:
    faults, given_back = run("")
    assert faults > 1000  # huge pages need 128, where the system is set so
    assert given_back < 2**26
    faults, given_back = run("memory.keep_freed_memory()")
    assert faults < 100
    assert given_back > 2**27
