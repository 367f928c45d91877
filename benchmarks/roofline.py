"""Predicted times of the CUDA kernels on A100 and H100: bytes and operations over the vendor's peaks. No GPU is needed.

    python -m benchmarks.roofline [--output file.md]

A prediction from counts, not a measurement: the largest of the times that arithmetic, exponentials, the second-level
cache and memory would take alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runner import markdown


@dataclass
class Gpu:
    """Peaks per second: datasheet values, dense; special functions are 16 per clock and multiprocessor."""

    name: str
    ffma: float
    tf32: float
    half: float
    exponentials: float
    memory: float
    cache: float  # A100: 5120 bytes per clock, from its whitepaper; H100: assumed the same per clock


GPUS = [
    Gpu("A100 SXM 80 GB", 19.5e12, 156e12, 312e12, 108 * 16 * 1.41e9, 2.04e12, 5120 * 1.41e9),
    Gpu("H100 SXM", 66.9e12, 494e12, 989e12, 132 * 16 * 1.83e9, 3.35e12, 5120 * 1.83e9),
]

ROWS = 32  # of a block: kRows in patch_contrast_tiles.cuh


def contrast(n: int, d: int, size: int, gpu: Gpu, *, tensor: bool, backward: bool) -> tuple[float, str]:
    """Anchors = keys: every block streams all keys from the second-level cache."""
    dots = 2.0 * n * n * d
    rate = gpu.ffma if not tensor else gpu.half if size == 2 else gpu.tf32
    times = {
        "arithmetic": dots / rate,
        "exponentials": (2.0 if backward else 1.0) * n * n / gpu.exponentials,
        "cache": n / ROWS * n * d * size / gpu.cache,
        "memory": (2 if backward else 1) * n * d * size / gpu.memory,
    }
    if backward:  # the dots again, then weights times keys, through TF32 on tensor cores
        times["arithmetic"] += dots / (gpu.tf32 if tensor else gpu.ffma)
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def statistics(batch: int, classes: int, image: int, size: int, gpu: Gpu, *, backward: bool) -> tuple[float, str]:
    pixels = batch * image * image
    values = pixels * classes
    exponentials = (classes + 2) * pixels * (2 if backward else 1)
    times = {
        "memory": values * size * (2 if backward else 1) / gpu.memory,
        "exponentials": exponentials / gpu.exponentials,
        "arithmetic": 2 * 25.0 * values * (2 if backward else 1) / gpu.ffma,
    }
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def table() -> str:
    rows = []
    for backward in (False, True):
        name = "backward" if backward else "forward"
        for n in (4096, 65536):
            for label, size, tensor in (("float32 FFMA", 4, False), ("float32 TF32", 4, True), ("bfloat16", 2, True)):
                cells = [contrast(n, 128, size, g, tensor=tensor, backward=backward) for g in GPUS]
                rows.append([f"contrast {name}, N = {n}, D = 128, {label}", *(_cell(*c) for c in cells)])
        for batch, image in ((16, 256), (64, 512)):
            cells = [statistics(batch, 4, image, 4, g, backward=backward) for g in GPUS]
            rows.append([f"statistics {name}, {batch}x4x{image}x{image}, float32", *(_cell(*c) for c in cells)])
    return markdown(["kernel", *(g.name for g in GPUS)], rows)


def _cell(seconds: float, bound: str) -> str:
    return f"{seconds * 1e6:.3g} us ({bound})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the Markdown table there")
    arguments = parser.parse_args()
    text = table()
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
