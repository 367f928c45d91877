"""Predicted times of the CUDA kernels on A100 and H100, from counts. No GPU is needed.

    python -m benchmarks.roofline [--output file.md]

These are predictions, not measurements. A kernel has a time for each resource that it needs: instruction issue, tensor
cores, exponentials, shared memory, the second-level cache, memory. The longest time is the prediction. It is a lower
bound, since it assumes that the kernel uses all other resources at the same time. Instructions come from the SASS
(results/cuda_counts.json, written by benchmarks.cuda_report), for H100 too, although its own code has up to 5 %
more. The times within a multiprocessor are those of the busiest one, and are longer if it has too few warps to issue an
instruction in every cycle.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cuda_report import CLASSES, EIGHTS, ENTRIES, LOGITS, PAIRS, PATCH, PIXEL, TERMS, Kernel
from benchmarks.runner import markdown

COUNTS = Path(__file__).parent / "results" / "cuda_counts.json"


@dataclass
class Gpu:
    """Values of the data sheet, for dense matrices.

    In each clock, a multiprocessor issues 128 lanes (four schedulers, a warp each), 16 special functions and 128 bytes
    of shared memory (CUDA programming guide).
    """

    name: str
    multiprocessors: int
    clock: float
    tensor: float  # 16-bit operations per second
    memory: float  # bytes per second
    cache: float  # bytes per second; A100: 5120 per clock, from its whitepaper; H100: assumed the same per clock
    shared: int  # bytes of a multiprocessor

    @property
    def cycles(self) -> float:
        """Cycles per second of all multiprocessors together."""
        return self.multiprocessors * self.clock


GPUS = [
    Gpu("A100 SXM 80 GB", 108, 1.41e9, 312e12, 2.04e12, 5120 * 1.41e9, 164 * 1024),
    Gpu("H100 SXM", 132, 1.83e9, 989e12, 3.35e12, 5120 * 1.83e9, 228 * 1024),
]

WARPS_TO_ISSUE = 2  # of a scheduler, to issue every cycle: a result takes 4 cycles, and half of the code waits for none


@dataclass
class Launch:
    """The numbers of a launch that keep a kernel from using every multiprocessor at full rate."""

    blocks: int
    registers: int  # of a thread; blocks have 128 threads
    shared_bytes: int  # of a block

    def stretch(self, gpu: Gpu) -> tuple[float, float]:
        """The factors by which times grow: those within a multiprocessor, and that of instruction issue."""
        waves = math.ceil(self.blocks / gpu.multiprocessors) * gpu.multiprocessors / self.blocks
        resident = min(
            65536 // (math.ceil(self.registers / 8) * 8 * 128), gpu.shared // (self.shared_bytes + 1024), 2048 // 128
        )
        warps = min(resident, math.ceil(self.blocks / gpu.multiprocessors))  # of a scheduler: 4 warps, 4 schedulers
        return waves, waves * max(1.0, WARPS_TO_ISSUE / warps)


ROWS, DEPTH = 64, 128  # of a block; of a row


def part_count(blocks: int, tiles: int, resident: int, gpu: Gpu) -> int:
    """The number of blocks that share the tiles of the other side, as in patch_contrast_launch.cuh."""
    return max(1, min(resident * gpu.multiprocessors // blocks, tiles // 4, 16))


def contrast(counts: dict[str, Any], n: int, gpu: Gpu, *, backward: bool, dtype: str = "BFloat16") -> dict[str, float]:
    """Seconds by resource: D = 128, anchors = keys, one temperature, labels and one descriptor. float: TF32."""
    kernel = counts[
        f"contrast_backward_mma<{dtype}, 128, both, rule>" if backward else f"contrast_forward_mma<{dtype}, 128, rule>"
    ]
    size = 4 if dtype == "float" else 2
    held = size == 2 and not backward  # rows, in registers
    columns = 64 if held else 32
    row = DEPTH * size + 16
    blocks = math.ceil(n / ROWS)
    parts = part_count(blocks, n // columns, 3, gpu)
    blocks *= parts
    launch = Launch(blocks, kernel["registers"], (2 * columns + (0 if held else ROWS)) * row + 80 * columns + 64)
    waves, issue = launch.stretch(gpu)
    pairs = float(n) * n
    # A warp reads each column of a tile once per product for its 16 rows, and these rows again if it cannot hold them.
    matrices = DEPTH * size / 16 * (2 if backward else 1) + (0 if held else DEPTH * size / columns)
    copies = DEPTH * size / ROWS
    side = (4 + 4 * (8 if backward else 1)) * 32 / 4 / 16 / 8  # 8 lanes of a warp read the same column at once
    written_and_read = 2 * parts * n * DEPTH * 4 if backward and parts > 1 else 0
    return {
        "issue": pairs * kernel[PAIRS] / (128 * gpu.cycles) * issue,
        "tensor cores": pairs * 2 * DEPTH * (2 if backward else 1) / (gpu.tensor * 2 / size) * waves,
        "exponentials": pairs * (2 if backward else 1) / (16 * gpu.cycles) * waves,
        "shared memory": pairs * (matrices + copies + side) / (128 * gpu.cycles) * waves,
        "cache": n / ROWS * n * DEPTH * size / gpu.cache,
        "memory": ((2 if backward else 1) * n * DEPTH * size + written_and_read) / gpu.memory,
    }


def statistics(counts: dict[str, Any], batch: int, image: int, gpu: Gpu, *, backward: bool) -> dict[str, float]:
    """Seconds by resource: float32, four classes, patches of 16 x 16 that do not overlap.

    The backward pass computes the sums again, and then each pixel: it has two kernels, whose times are added.
    """
    pixels = float(batch * image * image)
    values, patches = 4 * pixels, batch * (image // 16) ** 2
    sums = counts[f"patch_statistics_{'coefficients' if backward else 'forward'}<float, 4, 4>"]
    waves, issue = Launch(math.ceil(patches / 4), sums["registers"], 0).stretch(gpu)
    times = {
        "issue": (values * sums[LOGITS] + patches * 32 * sums[PATCH]) / (128 * gpu.cycles) * issue,
        "exponentials": pixels * (4 + 2) / (16 * gpu.cycles) * waves,
        "memory": values * 4 / gpu.memory,
    }
    if backward:
        pixel = counts["patch_statistics_backward<float, apart>"]
        waves, issue = Launch(math.ceil(image**2 / 128) * batch, pixel["registers"], 0).stretch(gpu)
        times["issue"] += (values * pixel[CLASSES] + pixels * pixel[PIXEL]) / (128 * gpu.cycles) * issue
        times["exponentials"] += 2 * pixels * (4 + 2) / (16 * gpu.cycles) * waves
        times["memory"] += 2 * values * 4 / gpu.memory
    return times


def tiles(counts: dict[str, Any], n: int, gpu: Gpu, *, backward: bool) -> dict[str, float]:
    """Seconds by resource: float32 without TF32, D = 128, anchors = keys.

    Of the instructions, those of the loops over the depth are counted. Shared memory: for 64 FFMA of a dot, a thread
    reads 8 times 16 bytes, with 128 bytes for a quarter of a warp in each cycle. For 256 FFMA of a gradient, a warp
    reads 32 times up to 128 bytes.
    """
    pairs = float(n) * n
    names = [f"contrast_{way}_tiles<float, FFMA, 128, rule>" for way in ("forward", "backward")]
    eights = sum(counts[name][EIGHTS] for name in (names if backward else names[:1]))
    name = names[backward]
    shared_bytes = Kernel(name, 80, 0, 0, 0).shared_bytes(DEPTH)
    blocks = math.ceil(n / ROWS)
    parts = part_count(blocks, n // 32, min(3, (gpu.shared - 1024) // shared_bytes), gpu)
    waves, issue = Launch(blocks * parts, counts[name]["registers"], shared_bytes).stretch(gpu)
    written_and_read = 2 * parts * n * DEPTH * 4 if backward and parts > 1 else 0
    return {
        "issue": pairs * DEPTH / 8 * eights / (128 * gpu.cycles) * issue,
        "shared memory": pairs * DEPTH * (2.5 if backward else 2) / (128 * gpu.cycles) * waves,
        "exponentials": pairs * (2 if backward else 1) / (16 * gpu.cycles) * waves,
        "cache": n / ROWS * n * DEPTH * 4 / gpu.cache,
        "memory": ((2 if backward else 1) * n * DEPTH * 4 + written_and_read) / gpu.memory,
    }


def gaussian(counts: dict[str, Any], n: int, classes: int, gpu: Gpu) -> dict[str, float]:
    """Seconds by resource: float32, D = 128, loss and gradient, one covariance for each class."""
    kernel, rows = counts["gaussian_contrast_rows<float, float, 8>"], 8
    blocks, row = math.ceil(n / rows), DEPTH * 4
    waves, issue = Launch(blocks, kernel["registers"], 3 * rows * row + 272).stretch(gpu)
    products = float(n) * classes * DEPTH * DEPTH
    return {
        "issue": products / 8 * kernel[EIGHTS] / (128 * gpu.cycles) * issue,
        "multiply-adds": products / (128 * gpu.cycles) * waves,
        "cache": blocks * classes * DEPTH * row / gpu.cache,
        "memory": (2 * n * row + classes * DEPTH * row) / gpu.memory,
    }


def disparity(counts: dict[str, Any], n: int, gpu: Gpu, *, backward: bool) -> dict[str, float]:
    """Seconds by resource: N x N disparities of one channel in float32; backward, the gradients of both sides.

    Backward, a warp has a row of the upstream gradient, or a column. In a column its lanes load from 32 lines of the
    first-level cache, which is assumed to find four lines a cycle, as Volta's does. From each line it takes a sector of
    32 bytes, which serves the four neighbouring columns of the block.
    """
    pairs = float(n) * n
    if not backward:
        kernel = counts["semantic_disparity_forward<float>"]
        rows = 8  # of a thread
        _, issue = Launch(math.ceil(n / 128) * math.ceil(n / rows), kernel["registers"], 0).stretch(gpu)
        return {"issue": pairs * kernel[ENTRIES] / (128 * gpu.cycles) * issue, "memory": 4 * pairs / gpu.memory}
    kernel = counts["semantic_disparity_backward<float>"]
    waves, issue = Launch(math.ceil(n / 4), kernel["registers"], 0).stretch(gpu)
    return {
        "issue": 2 * pairs * kernel[TERMS] / (128 * gpu.cycles) * issue,
        "first-level cache": pairs / 32 * (32 / 4 + 3) / gpu.cycles * waves,
        "cache": (4 + 32 / 4) * pairs / gpu.cache,
        "memory": 2 * 4 * pairs / gpu.memory,
    }


def table(counts: dict[str, Any]) -> str:
    rows = []
    for backward in (False, True):
        name = "backward" if backward else "forward"
        for n in (4096, 65536):
            cells = [_cell(contrast(counts, n, g, backward=backward)) for g in GPUS]
            rows.append([f"contrast {name}, N = {n}, D = 128, bfloat16", *cells])
        cells = [_cell(contrast(counts, 65536, g, backward=backward, dtype="float")) for g in GPUS]
        rows.append([f"contrast {name}, N = 65536, D = 128, TF32", *cells])
        for n in (4096, 65536):
            cells = [_cell(tiles(counts, n, g, backward=backward)) for g in GPUS]
            rows.append([f"contrast {name}, N = {n}, D = 128, float32, at least", *cells])
        for batch, image in ((16, 256), (64, 512)):
            cells = [_cell(statistics(counts, batch, image, g, backward=backward)) for g in GPUS]
            rows.append([f"statistics {name}, {batch}x4x{image}x{image}, float32", *cells])
        cells = [_cell(disparity(counts, 8192, g, backward=backward)) for g in GPUS]
        rows.append([f"disparity {name}, 8192 x 8192, float32", *cells])
    cells = [_cell(gaussian(counts, 4096, 4, g)) for g in GPUS]
    rows.append(["gaussian, both passes, N = 4096, K = 4, D = 128, float32", *cells])
    return markdown(["kernel (predicted, not measured)", *(g.name for g in GPUS)], rows)


def _cell(times: dict[str, float]) -> str:
    """The prediction, the resource that decides it, and the next one."""
    (bound, most), (second, less) = sorted(times.items(), key=lambda x: -x[1])[:2]
    return f"{most * 1e6:.3g} us ({bound}; {second} {less * 1e6:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the Markdown table there")
    arguments = parser.parse_args()
    text = table(json.loads(COUNTS.read_text(encoding="utf-8"))["kernels"])
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
