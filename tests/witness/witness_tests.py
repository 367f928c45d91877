"""Runs the CUDA kernels with real threads under ThreadSanitizer, against plain loops; a missing barrier is noticed.

Each family of kernels has a program, compiled once for each architecture, which runs small cases.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import native
from tests.witness import translate

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow

FAMILIES = ["patch_contrast", "patch_statistics", "semantic_disparity", "gaussian_contrast"]
ARCHITECTURES = [750, 800]
# The case of a family's program that quickly reaches the barriers of a file.
CASES = {
    "patch_contrast.cuh": ("patch_contrast", 0),
    "patch_contrast_tiles.cuh": ("patch_contrast", 1),
    "patch_contrast_mma.cuh": ("patch_contrast", 6),
    "patch_statistics.cuh": ("patch_statistics", 4),
    "semantic_disparity.cuh": ("semantic_disparity", 0),
    "gaussian_contrast.cuh": ("gaussian_contrast", 0),
}


@functools.cache
def programs(architecture: int) -> dict[str, Path]:
    """The compiled program of each family, built once for the present sources."""
    inputs = [*HERE.glob("*.h"), *HERE.glob("*.cpp"), HERE / "translate.py", *native.CSRC.glob("shared/*")]
    inputs += [path for path in native.CSRC.glob("cuda/kernels/*") if path.is_file()]
    folder = native.cache(f"witness_{architecture}_{native.digest(inputs)}")
    translate.write_sources(folder / "csrc")
    command = [native.compiler(), "-std=c++20", "-O1", "-fsanitize=thread", "-pthread", "-Wno-unknown-pragmas"]
    command += [f"-DWITNESS_ARCHITECTURE={architecture}", f"-I{HERE}", f"-I{folder}/csrc"]

    def compile_one(family: str) -> Path:
        target = folder / family
        if not target.exists():
            partial = folder / f"{family}.{os.getpid()}"
            subprocess.run([*command, str(HERE / f"{family}.cpp"), "-o", str(partial)], check=True)
            partial.rename(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAMILIES, pool.map(compile_one, FAMILIES), strict=True))


Done = subprocess.CompletedProcess[str]


def run(architecture: int, family: str, *arguments: int, seconds: float = 600) -> Done:
    command = [str(programs(architecture)[family]), *map(str, arguments)]
    environment = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)


def arguments_of(parameters: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of `run` for a test."""
    if "barrier" not in parameters:
        return parameters["architecture"], parameters["family"]
    barrier = parameters["barrier"]
    family, case = CASES[Path(barrier.file).name]
    before = "\n".join((native.CSRC / barrier.file).read_text().splitlines()[: barrier.line])
    for function, its_case in (("void stream_chunks(", 8), ("PGLCL_KERNEL contrast_finish(", 9)):
        if before.rfind(function) > before.rfind("\n}\n"):
            case = its_case  # rows that pass in chunks; wide anchors
    return 800, family, case, barrier.number


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[tuple[Any, ...], Future[Done]]]:
    """The runs that the chosen tests need, as many at the same time as there are processors."""
    chosen = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        calls = dict.fromkeys(arguments_of(item.callspec.params) for item in chosen)
        for architecture in dict.fromkeys(call[0] for call in calls):
            programs(architecture)
        yield {call: pool.submit(run, *call) for call in calls}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_agree_with_brute_force(family: str, architecture: int, runs: Any) -> None:
    done = runs[arguments_of({"family": family, "architecture": architecture})].result()
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.parametrize("barrier", translate.all_barriers(), ids=lambda b: f"{Path(b.file).name}:{b.line}")
def test_a_barrier_left_out_is_noticed(barrier: translate.Barrier, runs: Any) -> None:
    done = runs[arguments_of({"barrier": barrier})].result()
    assert done.returncode != 0, f"nobody misses {barrier.text} in {barrier.file}:{barrier.line}"


def test_asm_that_touches_memory_must_say_so() -> None:
    silent = 'asm volatile("cp.async.commit_group;\\n" ::);'
    with pytest.raises(ValueError, match=r"without a .memory. clobber: cp\.async\.commit_group"):
        translate.translate(silent)
    assert (
        translate.translate(silent.replace("::", '::: "memory"'))
        == '::witness::Ptx("cp.async.commit_group;\\n").run();'
    )
