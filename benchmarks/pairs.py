"""The loss with one positive a row, against PyTorch's functions for the same.

Every anchor has one key of its own label, and all other keys are negatives. The loss is then the cross-entropy of a
linear layer whose weights are the keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.runner import Calls, cell, find, markdown, measure, passes, ratio, times
from pglcl_ext import patch_contrast_loss

TEMPERATURE, DEPTH = 0.1, 128
CONTENDERS = (
    "pglcl_ext",
    "cross_entropy",
    "linear_cross_entropy, chunked",
    "torch.compile",
    "torch.compile, max-autotune",
    "torch.mm alone",
)
SIZES = (128, 1024, 4096, 16384)


def problem(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors and keys (N, D), and the index of each anchor's key (N,)."""
    g = torch.Generator().manual_seed(0)
    anchors, keys = (F.normalize(torch.randn(n, DEPTH, generator=g), dim=1).to(dtype).requires_grad_() for _ in "ab")
    return anchors, keys, torch.randperm(n, generator=g)


def ours(anchors: Tensor, keys: Tensor, place: Tensor) -> Tensor:
    own = torch.arange(len(keys))
    return patch_contrast_loss(anchors, place, keys=keys, key_labels=own, temperature=TEMPERATURE)


def plain(anchors: Tensor, keys: Tensor, place: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(anchors / TEMPERATURE, keys), place)


def chunked(anchors: Tensor, keys: Tensor, place: Tensor) -> Tensor:
    return F.linear_cross_entropy(anchors / TEMPERATURE, keys, place, options=nn.LinearCrossEntropyOptions())


def make(N: int, device: str) -> Calls:
    from benchmarks.peers import products

    inputs = problem(N)
    functions = {
        "pglcl_ext": ours,
        "cross_entropy": plain,
        "linear_cross_entropy, chunked": chunked,
        "torch.compile": torch.compile(plain, dynamic=False),
        "torch.compile, max-autotune": torch.compile(plain, dynamic=False, mode="max-autotune"),
    }
    calls = {name: passes(function, inputs, inputs[:2]) for name, function in functions.items()}
    return calls | {"torch.mm alone": products(*(x.detach() for x in inputs[:2]))}


def run(*, threads: int, sizes: tuple[int, ...] = ()) -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    for n in sizes or SIZES:
        left = [c for c in CONTENDERS if n <= 4096 or not c.startswith("torch.compile")]
        results += measure(make, {"N": n, "device": "cpu"}, left, threads=threads, warm={"N": 64})
    return results, table(results)


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for n in dict.fromkeys(row["N"] for row in results):
        for which in ("forward", "forward+backward"):
            own = find(results, contender="pglcl_ext", passes=which, N=n)
            row = [f"{n}, {which}", cell(own, "seconds")]
            row += [times(ratio(results, c, "pglcl_ext", which, N=n)) for c in CONTENDERS[1:]]
            memory = [find(results, contender=c, passes=which, N=n) for c in CONTENDERS]
            rows.append([*row, " / ".join("-" if found is None else cell(found, "bytes") for found in memory)])
    head = ["N, passes", "ours, ms", *(f"{c} / ours" for c in CONTENDERS[1:]), "MiB, in this order"]
    note = (
        f"N anchors and N keys of D = {DEPTH}, float32. Time with its quartiles, ratios of medians, peak memory beyond"
    )
    note += " the inputs; `-`: not measured. A chunked forward pass computes the gradients with it."
    return f"{note}\n\n" + markdown(head, rows)
