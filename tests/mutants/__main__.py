"""Plants faults into the CUDA code and counts the tests that notice: ``python -m tests.mutants [--draw 40]``.

All faults are compiled into one library for the emulated device. Each gets a process of its own, forked from one that
has loaded everything, in which it is switched on and the tests of its op run until one fails. The last line reads
``planted A, killed B, equivalent C, survivors D``; survivors are listed with file and line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests import native
from tests.mutants.plant import Fault, plant
from tests.simt import emulator

HERE = Path(__file__).parent
SECONDS = 900  # a fault that makes a loop endless is noticed after so long
# The quickest first. What they share, patch_contrast.cuh and the launches, is tested by the loss.
TESTS = {
    "patch_statistics": [("tests/simt/emulated_kernels.py", "statistics"), ("tests/test_patch_statistics.py", "")],
    "semantic_disparity": [
        ("tests/simt/emulated_kernels.py", "disparity or bounds"),
        ("tests/test_semantic_disparity.py", "not citizenship"),
    ],
    "gaussian_contrast": [("tests/simt/emulated_kernels.py", "gaussian"), ("tests/test_gaussian_contrast.py", "")],
    "patch_contrast": [("tests/simt/emulated_kernels.py", "not statistics and not gaussian and not test_disparity")],
}


def equivalents() -> dict[str, str]:
    """The faults that change nothing, by their key, with the proof; from equivalent.txt."""
    found: dict[str, str] = {}
    reason = ""
    for line in (HERE / "equivalent.txt").read_text().splitlines():
        if line.startswith("# "):
            reason = line[2:]
        elif line.strip():
            found[line.strip()] = reason
    return found


def build() -> list[Fault]:
    """Loads the library with all faults in it, and returns them."""
    texts, faults = plant()
    folder = native.cache("mutants") / "csrc"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(native.CSRC, folder)
    for name, text in texts.items():
        (folder / name).write_text(text)
    emulator.load(folder)
    return faults


def family(fault: Fault) -> str:
    return next(name for name in TESTS if Path(fault.file).name.startswith(name))


def run_tests(fault: Fault) -> bool:
    """Whether all tests of the fault's op pass with it; runs in the forked process."""
    import pytest

    emulator.plant(fault.number)
    for file, selection in TESTS[family(fault)]:
        command = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "--emulated", "80", file]
        if pytest.main([*command, *(["-k", selection] if selection else [])]) != 0:
            return False
    return True


def start(fault: Fault) -> int:
    """The number of a process that ends with 0 when the tests pass in spite of the fault."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    code = 1
    with contextlib.suppress(BaseException):
        code = 0 if run_tests(fault) else 1
    os._exit(code)


def survivors(faults: list[Fault], processes: int) -> Iterator[tuple[Fault, bool]]:
    """Each fault with whether it survived, in the order in which they end."""
    waiting, running = list(faults), {}
    while waiting or running:
        while waiting and len(running) < processes:
            fault = waiting.pop(0)
            running[start(fault)] = (fault, time.monotonic())
        for process, (fault, began) in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                del running[process]
                yield fault, status == 0
            elif time.monotonic() - began > SECONDS:
                os.killpg(process, signal.SIGKILL)
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", type=int, help="so many faults, drawn by --seed; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose file holds this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # forked processes have no threads of the first one
    faults = [fault for fault in build() if arguments.only in fault.file]
    if arguments.draw is not None:
        faults = sorted(random.Random(arguments.seed).sample(faults, min(arguments.draw, len(faults))), key=str)
    proved = equivalents()
    counted = [fault for fault in faults if fault.key not in proved]
    alive: list[Fault] = []
    for done, (fault, survived) in enumerate(survivors(counted, arguments.processes), 1):
        if survived:
            alive.append(fault)
            print(f"SURVIVES {fault.file}:{fault.line} {fault.rule}\n  {fault.key}", flush=True)
        elif done % 20 == 0:
            print(f"{done} of {len(counted)}", flush=True)
    killed = len(counted) - len(alive)
    print(f"planted {len(faults)}, killed {killed}, equivalent {len(faults) - len(counted)}, survivors {len(alive)}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
