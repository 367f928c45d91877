"""Products that count rows, places or pixels have 64 bits. Their types show it, which tests of small sizes cannot.

clang-tidy checks the CUDA branch of the kernels by the rule in products.clang-tidy, in the programs of the witness,
which use all kernels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.witness import translate
from tests.witness.witness_tests import FAMILIES, HERE

pytestmark = pytest.mark.slow

# Factors that are small for any sizes of tensors: numbers of threads and lanes, of a tile's rows, columns and steps, of
# stages of a pipeline, of multiprocessors, and bytes of shared memory.
SMALL = {
    "if (bytes <= 48 * 1024) return;",
    "const int64_t bytes = kContrastThreads / 32 * kPlainDepth * sizeof(scalar_t) + WeightScale<scalar_t>::bytes();",
    "const int64_t bytes = kContrastThreads / 32 * kPlainDepth * sizeof(double) + WeightScale<float>::bytes();",
    "return (kHeld ? 0 : kMmaRows * row) + stages * kMmaColumns<kDepth, kHeld> * row + "
    "MmaSide<kDepth, kHeld>::bytes() +",
    "if (s % 2 == 0 && kStep * s >= depth) break;",
    "index[r] = first_row + thread_index() / 32 * 16 + lane / 4 + 8 * r;",
    "return rounded_to_16(kTurns * kCount * sizeof(int32_t)) +",
    "rounded_to_16(kNumbers * kTurns * kCount * sizeof(float)) + rounded_to_16(kTurns * kCount * sizeof(int));",
    "static constexpr int64_t bytes() { return 2 * rounded_to_16(2 * kWarps * sizeof(float)); }",
    "if (lane + 32 * c < depth) write_one(row + r, lane + 32 * c, sums[r][c]);",
    "constexpr int64_t kStatisticsShared = kStatisticsWarps * 3 * kChunkPixels * int64_t(sizeof(scalar_t));",
    "kGaussianThreads / 32 * kAnchors * 2 * int64_t(sizeof(number_t));",
}
WARNING = re.compile(r"/csrc/(\S+):(\d+):\d+: warning: ")


def clang_tidy() -> str:
    beside = Path(sys.executable).with_name("clang-tidy")  # the environment's own one, which may not be on the path
    found = str(beside) if beside.exists() else shutil.which("clang-tidy")
    if found is None:
        pytest.skip("needs clang-tidy, which the extra `test` installs")
    return found


def narrow_products(folder: Path) -> set[tuple[str, int, str]]:
    """(file, line, text) of each product that does not have 64 bits, in the translated sources of `folder`."""

    def look(family: str) -> str:
        command = [clang_tidy(), "--experimental-custom-checks", f"--config-file={HERE / 'products.clang-tidy'}"]
        command += ["--quiet", "--header-filter=.*/csrc/.*", str(HERE / f"{family}.cpp"), "--", "-std=c++20"]
        command += ["-DWITNESS_ARCHITECTURE=800", f"-I{HERE}", f"-I{folder / 'csrc'}", "-Wno-unknown-pragmas"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "error" not in done.stdout + done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        found = {match for output in pool.map(look, FAMILIES) for match in WARNING.findall(output)}
    texts = {file: (folder / "csrc" / file).read_text().splitlines() for file, _ in found}
    return {(file, int(line), texts[file][int(line) - 1].strip()) for file, line in found}


def test_products_are_made_in_64_bits(tmp_path: Path) -> None:
    translate.write_sources(tmp_path / "csrc")
    found = narrow_products(tmp_path)
    assert sorted(f"{file}:{line}: {text}" for file, line, text in found if text not in SMALL) == []
    assert SMALL - {text for _, _, text in found} == set(), "these are no longer found"


def planted(text: str, fault: Callable[[str], str]) -> tuple[str, set[int]]:
    """The text of a file with a fault in each line where `fault` can put one, and the numbers of these lines."""
    lines = text.splitlines(keepends=True)
    changed = [fault(line) for line in lines]
    return "".join(changed), {i for i, (a, b) in enumerate(zip(lines, changed, strict=True), 1) if a != b}


def without_width(line: str) -> str:
    """Leaves out the words that make the first product of a line 64 bits wide."""
    if "constexpr" in line or "sizeof" in line:
        return line
    return re.sub(r"\bint64_t\((block_index(?:_y)?\(\)|z|chunk|g\.patch\[0\])\) \*", r"\1 *", line)


def test_products_that_lost_their_width_are_noticed(tmp_path: Path) -> None:
    translate.write_sources(tmp_path / "csrc")
    wanted = set()
    for path in translate.kernels():
        name = str(path.relative_to(translate.CSRC))
        target = tmp_path / "csrc" / name
        text, lines = planted(target.read_text(), without_width)
        target.write_text(text)
        wanted |= {(name, line) for line in lines}
    assert len(wanted) >= 18
    found = {(file, line) for file, line, text in narrow_products(tmp_path) if text not in SMALL}
    assert found == wanted
