"""The kernels against the limits of the machine: its rate of multiply-adds, and the time to read memory.

A ratio to PyTorch depends as much on PyTorch's library for that processor as on our code. So the loss is measured in
GFLOP/s of its products, as a share of the larger of two rates: that of ``torch.mm`` on 2048 x 2048 matrices, and that
of a loop of multiply-adds in registers (fma.c). The statistics are measured in the time of ``input.sum()``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss import OPTIONS
from benchmarks.runner import cell, compare, find, markdown, median, passes, times
from pglcl_ext import patch_contrast_loss, patch_statistics

DEPTH = 128
SIZES = (1024, 4096)
DTYPES = ("float32", "bfloat16", "float16")
SQUARE = 2048  # of torch.mm
ROUNDS = 1_000_000  # of the loop in registers, about 3 ms
# Number of N x N x D products. The backward pass computes the similarities again, since nothing of size N x N is kept.
# If the anchors are the keys, half a product gives all similarities, and one product gives the whole gradient.
PRODUCTS = {(False, "forward"): 0.5, (False, "forward+backward"): 2.0}
PRODUCTS |= {(True, "forward"): 1.0, (True, "forward+backward"): 3.0}
IMAGES = (  # shape, patch, stride
    ((16, 4, 256, 256), 16, 16),
    ((2, 4, 96, 160, 160), 16, 16),
    ((4, 14, 256, 256), 16, 16),
    ((16, 4, 256, 256), 16, 8),
)


def fma(threads: int) -> tuple[Callable[[], Any], float]:
    """A call that does multiply-adds in the registers of `threads` cores, and its number of operations."""
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        source = Path(__file__).with_name("fma.c")
        subprocess.run(
            [compiler, "-O2", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
        )
        loop = ctypes.CDLL(str(library))
    loop.run.restype, loop.run.argtypes = ctypes.c_float, [ctypes.c_long]
    pool = ThreadPoolExecutor(threads)
    operations = ctypes.c_long.in_dll(loop, "operations").value * ROUNDS * threads
    return lambda: list(pool.map(loop.run, [ROUNDS] * threads)), float(operations)


def rates(threads: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """Calls that reach the rates of the machine, and the number of operations of each."""
    a, b = torch.randn(2, SQUARE, SQUARE)
    out = torch.empty(SQUARE, SQUARE)
    return {
        "torch.mm": (lambda: torch.mm(a, b, out=out), 2.0 * SQUARE**3),
        "multiply-adds in registers": fma(threads),
    }


def operations(n: int, depth: int, keys: bool, which: str) -> float:
    return PRODUCTS[keys, which] * 2.0 * n * n * depth


def contrast(n: int, keys: bool, dtype: str) -> dict[str, Callable[[], Any]]:
    """The passes of the guided loss; with `keys`, others than the anchors are given, which need no gradient."""
    g = torch.Generator().manual_seed(0)

    def side() -> tuple[Tensor, Tensor, Tensor]:
        z = F.normalize(torch.randn(n, DEPTH, generator=g), dim=1).to(getattr(torch, dtype))
        return z, torch.randint(0, 4, (n,), generator=g), torch.rand(n, generator=g)

    anchors, options = side(), dict[str, Any](OPTIONS)
    if keys:
        options |= zip(("keys", "key_labels", "key_descriptors"), side(), strict=True)
    return passes(patch_contrast_loss, anchors, (anchors[0].requires_grad_(),), **options)


def run(*, threads: int, sizes: tuple[int, ...] = ()) -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    for n in sizes or SIZES:
        known = rates(threads)
        calls: dict[Any, Callable[[], Any]] = {rate: call for rate, (call, _) in known.items()}
        cases = [(dtype, keys) for dtype in DTYPES for keys in (False, True)]
        for dtype, keys in cases:
            calls |= {(dtype, keys, which): call for which, call in contrast(n, keys, dtype).items()}
        samples = compare(calls, repetitions=15, threads=threads, seconds=40)
        for rate, (_, work) in known.items():
            results.append({"N": n, "contender": rate, "operations": work, "seconds": samples[rate]})
        for dtype, keys in cases:
            for which in ("forward", "forward+backward"):
                row = {"N": n, "D": DEPTH, "keys": keys, "dtype": dtype, "contender": "pglcl_ext", "passes": which}
                work = operations(n, DEPTH, keys, which)
                results.append({**row, "operations": work, "seconds": samples[dtype, keys, which]})
    for shape, patch, stride in IMAGES:
        results += statistics(shape, patch, stride, threads)
    return results, table(results)


def statistics(shape: tuple[int, ...], patch: int, stride: int, threads: int) -> list[dict[str, Any]]:
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for dtype in DTYPES:
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
        calls[dtype, "sum"] = lambda x=logits: x.sum()
        x = logits.clone().requires_grad_()
        calls |= {(dtype, which): call for which, call in passes(patch_statistics, (x, patch, stride), (x,)).items()}
    samples = compare(calls, repetitions=15, threads=threads, seconds=30)
    case = {"shape": shape, "patch": patch, "stride": stride}
    return [{**case, "dtype": dtype, "passes": which, "seconds": s} for (dtype, which), s in samples.items()]


def rate_of(row: dict[str, Any]) -> float:
    """The rate of a row in GFLOP/s."""
    return row["operations"] / median(row["seconds"]) / 1e9


def table(results: list[dict[str, Any]]) -> str:
    products = [row for row in results if "operations" in row]
    blocks = []
    for n in dict.fromkeys(row["N"] for row in products):
        own = [row for row in products if row["N"] == n]
        limits = {row["contender"]: rate_of(row) for row in own if row["contender"] != "pglcl_ext"}
        peak = max(limits.values())
        text = ", ".join(f"{name} {rate:.0f}" for name, rate in limits.items())
        rows = []
        for dtype, keys in dict.fromkeys((row["dtype"], row["keys"]) for row in own if "dtype" in row):
            cells = []
            for which in ("forward", "forward+backward"):
                row = find(own, dtype=dtype, keys=keys, passes=which)
                plain = find(own, dtype="float32", keys=keys, passes=which)
                assert row is not None
                assert plain is not None
                share = f"{rate_of(row):.0f} ({100 * rate_of(row) / peak:.0f} %)"
                cells += [cell(row, "seconds"), share, f"{rate_of(plain) / rate_of(row):.2f}"]
            rows.append([f"{dtype}, {'keys given' if keys else 'anchors = keys'}", *cells])
        columns = ["{} ms", "GFLOP/s (of the peak)", "in the time of float32"]
        head = [f"N = {n}", *(c.format("forward") for c in columns), *(c.format("both passes") for c in columns)]
        blocks.append(f"GFLOP/s: {text}.\n\n{markdown(head, rows)}")
    images = [row for row in results if "shape" in row]
    rows = []
    for shape, patch, stride, dtype in dict.fromkeys(
        (tuple(row["shape"]), row["patch"], row["stride"], row["dtype"]) for row in images
    ):
        own = [r for r in images if (tuple(r["shape"]), r["stride"]) == (shape, stride)]
        found = {which: find(own, dtype=dtype, passes=which) for which in ("sum", "forward", "forward+backward")}
        plain = {which: find(own, dtype="float32", passes=which) for which in found}
        time = {which: median(row["seconds"]) for which, row in found.items() if row}
        of_plain = {which: median(row["seconds"]) for which, row in plain.items() if row}
        cells = [cell(found["sum"], "seconds")]
        for which in ("forward", "forward+backward"):
            cells += [
                cell(found[which], "seconds"),
                times(time[which] / time["sum"]),
                f"{time[which] / of_plain[which]:.2f}",
            ]
        rows.append([f"{'x'.join(map(str, shape))}, patch {patch}, stride {stride}, {dtype}", *cells])
    columns = ["{} ms", "in sums", "in the time of float32"]
    head = ["logits", "sum() ms", *(c.format("forward") for c in columns), *(c.format("both passes") for c in columns)]
    note = "Time with its quartiles, ratios of medians. The peak is the larger of the two rates of its block."
    return "\n\n".join([note, *blocks, markdown(head, rows)])
