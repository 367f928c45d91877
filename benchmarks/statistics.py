"""patch_statistics against softmax, log_softmax and average pooling, eager and compiled: the same three outputs."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.runner import Calls, cell, find, markdown, measure, passes, ratio, times
from pglcl_ext import patch_statistics, reference

CONTENDERS = ("pglcl_ext", "eager reference", "torch.compile")
CASES = (((16, 4, 256, 256), 16, 16), ((16, 4, 256, 256), 16, 8), ((2, 4, 64, 64, 64), 8, 8))


def make(shape: tuple[int, ...], patch: int, stride: int, dtype: str, device: str) -> Calls:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, getattr(torch, dtype))
    logits.requires_grad_()
    eager = reference.patch_statistics
    functions = (patch_statistics, eager, torch.compile(eager, dynamic=False))
    return {c: passes(f, (logits, patch, stride), (logits,)) for c, f in zip(CONTENDERS, functions, strict=True)}


def run(*, threads: int, device: str = "cpu") -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    for shape, patch, stride in CASES:
        for dtype in ("float32", "bfloat16"):
            if dtype == "bfloat16" and len(shape) == 5 and device == "cpu":
                continue  # PyTorch has no avg_pool3d of bfloat16 on the CPU
            case = {"shape": shape, "patch": patch, "stride": stride, "dtype": dtype, "device": device}
            warm = {"shape": (1, 4, *[2 * patch] * (len(shape) - 2))}
            results += measure(make, case, CONTENDERS, threads=threads, warm=warm, repetitions=15)
    return results, table(results)


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for shape, patch, stride, dtype in dict.fromkeys(
        (tuple(row["shape"]), row["patch"], row["stride"], row["dtype"]) for row in results
    ):
        own = [r for r in results if (tuple(r["shape"]), r["stride"], r["dtype"]) == (shape, stride, dtype)]
        row = [f"{'x'.join(map(str, shape))}, patch {patch}, stride {stride}, {dtype}"]
        for which in ("forward", "forward+backward"):
            row.append(cell(find(own, contender="pglcl_ext", passes=which), "seconds"))
            row += [times(ratio(own, c, "pglcl_ext", which)) for c in CONTENDERS[1:]]
            row.append(" / ".join(cell(find(own, contender=c, passes=which), "bytes") for c in CONTENDERS))
        rows.append(row)
    columns = ["{} ms", "eager / ours", "compiled / ours", "MiB: ours / eager / compiled"]
    head = ["logits", *(c.format("forward") for c in columns), *(c.format("both passes") for c in columns)]
    return "Time with its quartiles, ratios of medians, peak memory beyond the inputs.\n\n" + markdown(head, rows)
