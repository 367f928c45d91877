"""The CUDA code as real threads run it, under ThreadSanitizer, against brute force; a barrier left out is noticed."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest

from tests import native
from tests.witness import translate

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow

FAMILIES = ["patch_contrast", "patch_statistics", "semantic_disparity", "gaussian_contrast"]


@functools.cache
def program(architecture: int) -> Path:
    """The compiled witness of an architecture (750, 800), built once for the sources as they are."""
    inputs = [*HERE.glob("*.*"), Path(native.__file__), *native.CSRC.glob("*.*"), *native.CSRC.glob("shared/*")]
    inputs += [path for path in native.CSRC.glob("cuda/**/*") if path.is_file()]
    folder = native.cache(f"witness_{architecture}_{native.digest(inputs)}")
    target = folder / "witness"
    if not target.exists():
        translate.write_sources(folder / "csrc")
        ops = sorted((folder / "csrc" / "cuda").glob("*.cu"))
        schemas = folder / "schemas.cpp"
        schemas.write_text(native.schemas(native.CSRC))
        sources = [*ops, schemas, HERE / "witness.cpp"]
        # torch's headers first: they must not see the words of CUDA that the shim defines.
        prefix = native.torch_includes([*sources, *(folder / "csrc").rglob("*.h")]) + '#include "ptx.h"\n'
        flags = ["-O1", "-fsanitize=thread", f"-DWITNESS_ARCHITECTURE={architecture}", f"-I{HERE}"]
        flags += [f"-I{folder}/csrc", "-pthread"]
        native.build(folder / "objects", sources, target, prefix=prefix, flags=flags, shared=False)
    return target


def run(architecture: int, family: str, *barrier: int, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    command = [str(program(architecture)), family, *map(str, barrier)]
    environment = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.parametrize("architecture", [750, 800])
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_agree_with_brute_force(family: str, architecture: int) -> None:
    done = run(architecture, family)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.parametrize("barrier", translate.all_barriers(), ids=lambda b: f"{Path(b.file).name}:{b.line}")
def test_a_barrier_left_out_is_noticed(barrier: translate.Barrier) -> None:
    family = next(name for name in FAMILIES if Path(barrier.file).name.startswith(name))
    done = run(800, family, barrier.number)
    assert done.returncode != 0, f"nobody misses {barrier.text} in {barrier.file}:{barrier.line}"


def test_asm_that_touches_memory_must_say_so() -> None:
    silent = 'asm volatile("cp.async.commit_group;\\n" ::);'
    with pytest.raises(ValueError, match=r"without a .memory. clobber: cp\.async\.commit_group"):
        translate.translate(silent)
    assert (
        translate.translate(silent.replace("::", '::: "memory"'))
        == '::witness::Ptx("cp.async.commit_group;\\n").run();'
    )
