"""The guided loss against the eager reference, eager and compiled, and against the matrix products it cannot avoid."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import products
from benchmarks.runner import Calls, cell, find, markdown, measure, passes, ratio, times
from pglcl_ext import patch_contrast_loss, reference

OPTIONS = {"max_positive_disparity": 0.5, "min_negative_disparity": 0.1}  # of descriptors uniform in [0, 1]
CONTENDERS = ("pglcl_ext", "eager reference", "torch.compile", "torch.mm alone")
SIZES = (128, 1024, 4096, 16384)


def make(N: int, D: int, keys: bool, dtype: str, device: str) -> Calls:
    g = torch.Generator().manual_seed(0)

    def side() -> tuple[Tensor, Tensor, Tensor]:
        z = F.normalize(torch.randn(N, D, generator=g), dim=1).to(device, getattr(torch, dtype)).requires_grad_()
        return z, torch.randint(0, 4, (N,), generator=g).to(device), torch.rand(N, generator=g).to(device)

    anchors = side()
    inputs, options = [anchors[0]], dict[str, Any](OPTIONS)
    if keys:
        options["keys"], options["key_labels"], options["key_descriptors"] = side()
        inputs.append(options["keys"])
    eager = reference.patch_contrast_loss
    return {
        "pglcl_ext": passes(patch_contrast_loss, anchors, inputs, **options),
        "eager reference": passes(eager, anchors, inputs, **options),
        "torch.compile": passes(torch.compile(eager, dynamic=False), anchors, inputs, **options),
        "torch.mm alone": products(*(x.detach() for x in inputs)),
    }


def run(*, threads: int, sizes: tuple[int, ...] = (), device: str = "cpu", depth: int = 128) -> tuple[list[dict], str]:
    sizes = sizes or SIZES
    cases = [(n, False, dtype) for dtype in ("float32", "bfloat16") for n in sizes]
    cases += [(n, True, "float32") for n in sizes if n == 4096]
    results: list[dict[str, Any]] = []
    for n, keys, dtype in cases:
        case = {"N": n, "D": depth, "keys": keys, "dtype": dtype, "device": device}
        # For more patches, their N x N matrices take many GiB; `peers` shows how many.
        contenders = [c for c in CONTENDERS if n <= 4096 or c not in ("eager reference", "torch.compile")]
        results += measure(make, case, contenders, threads=threads, warm={"N": 64})
    return results, table(results)


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    cases = dict.fromkeys((row["N"], row["keys"], row["dtype"]) for row in results)
    for n, keys, dtype in cases:
        case = {"N": n, "keys": keys, "dtype": dtype}
        row = [f"{n}{f' x {n} keys' if keys else ''}, {dtype}"]
        for which in ("forward", "forward+backward"):
            ours = find(results, contender="pglcl_ext", passes=which, **case)
            against = [ratio(results, c, "pglcl_ext", which, **case) for c in CONTENDERS[1:]]
            row += [cell(ours, "seconds"), *(times(r) for r in against), cell(ours, "bytes")]
            row.append(cell(find(results, contender="eager reference", passes=which, **case), "bytes"))
        rows.append(row)
    columns = ["{} ms", "eager / ours", "compiled / ours", "torch.mm / ours", "MiB", "eager's MiB"]
    head = ["N, dtype", *(c.format("forward") for c in columns), *(c.format("both passes") for c in columns)]
    note = "Time with its quartiles, ratios of medians, peak memory beyond the inputs; `-`: not measured."
    return f"{note}\n\n" + markdown(head, rows)
