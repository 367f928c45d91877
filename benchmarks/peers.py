"""The loss beside the alternatives of a user: time and peak memory, forward and with the backward pass.

The table shows a peer that takes over a minute a call, or runs out of memory, as such. It is not tried on more patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import LIMIT_BYTES, Call, Calls, cell, find, markdown, measure, passes
from pglcl_ext import patch_contrast_loss, reference

TEMPERATURE = 0.1
CONTENDERS = (
    "pglcl_ext",
    "eager reference",
    "torch.compile",
    "pytorch-metric-learning",
    "plain SupCon",
    "MONAI",
    "torch.mm alone",
)
# Depth, dtype and sizes. The first is the plot of the README.
GRID: tuple[tuple[int, str, tuple[int, ...]], ...] = (
    (128, "float32", (128, 512, 2048, 8192, 65536)),
    (64, "float32", (128, 512, 4096, 65536)),
    (256, "float32", (128, 512, 4096, 65536)),
    (128, "bfloat16", (128, 512, 4096, 65536)),
)
BLOCK = 1024


def supcon(z: Tensor, y: Tensor) -> Tensor:
    """The supervised contrastive loss in its usual form: all pairs, a mask, a log-softmax."""
    logits = z @ z.t() / TEMPERATURE
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = logits.masked_fill(itself, float("-inf"))
    positives = (y[:, None] == y[None, :]) & ~itself
    log_p = logits - logits.logsumexp(dim=1, keepdim=True)
    count = positives.sum(dim=1)
    losses = -log_p.masked_fill(~positives, 0).sum(dim=1) / count.clamp(min=1)
    return losses.sum() / (count > 0).sum()


def products(anchors: Tensor, keys: Tensor | None = None) -> dict[str, Call]:
    """Only the matrix products of the loss, by torch.mm on blocks.

    The forward pass has the similarities. In the backward pass, each block stands for the weights of its pairs and is
    multiplied with both sides. If the anchors are the keys, only blocks on and above the diagonal are computed, since
    their mirror images hold the same numbers.
    """
    mine = keys is None
    rows, columns = anchors.split(BLOCK), (anchors if keys is None else keys).split(BLOCK)
    buffer = anchors.new_empty(len(rows[0]), len(columns[0]))

    def call(to_rows: Sequence[Tensor], to_columns: Sequence[Tensor]) -> None:
        for i, z in enumerate(rows):
            for j in range(i if mine else 0, len(columns)):
                k = columns[j]
                weights = torch.mm(z, k.t(), out=buffer[: len(z), : len(k)])
                if to_rows:
                    to_rows[i].addmm_(weights, k)
                    if not mine or j > i:
                        to_columns[j].addmm_(weights.t(), z)

    def both() -> None:
        to_anchors = torch.zeros_like(anchors).split(BLOCK)
        call(to_anchors, to_anchors if keys is None else torch.zeros_like(keys).split(BLOCK))

    return {"forward": lambda: call((), ()), "forward+backward": both}


def make(N: int, D: int, dtype: str) -> Calls:
    from monai.losses import ContrastiveLoss
    from pytorch_metric_learning.losses import SupConLoss

    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(N, D, generator=g), dim=1).to(getattr(torch, dtype)).requires_grad_()
    y = torch.randint(0, 4, (N,), generator=g)
    monai = ContrastiveLoss(temperature=TEMPERATURE)

    def guided(z: Tensor, y: Tensor) -> Tensor:
        return reference.patch_contrast_loss(z, y, temperature=TEMPERATURE)

    def views(z: Tensor, y: Tensor) -> Tensor:
        # MONAI's loss knows two views of each sample and no labels: half of the patches against the other half.
        return monai(z[: N // 2], z[N // 2 :])

    return {
        "pglcl_ext": passes(patch_contrast_loss, (z, y), (z,), temperature=TEMPERATURE),
        "eager reference": passes(guided, (z, y), (z,)),
        "torch.compile": passes(torch.compile(guided, dynamic=False), (z, y), (z,)),
        "pytorch-metric-learning": passes(SupConLoss(temperature=TEMPERATURE), (z, y), (z,)),
        "plain SupCon": passes(supcon, (z, y), (z,)),
        "MONAI": passes(views, (z, y), (z,)),
        "torch.mm alone": products(z.detach()),
    }


def run(*, threads: int, sizes: tuple[int, ...] = ()) -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    for depth, dtype, usual in GRID:
        beaten: set[str] = set()
        for n in sizes or usual:
            left = [c for c in CONTENDERS if c not in beaten]
            if (depth, dtype) != GRID[0][:2] and not sizes:
                # Left out of the other tables to save time: most compilations, and the largest products.
                left = [c for c in left if c != "torch.compile" or n == 4096]
                left = [c for c in left if c != "torch.mm alone" or n <= 4096]
            rows = measure(make, {"N": n, "D": depth, "dtype": dtype}, left, threads=threads, warm={"N": 64})
            beaten |= {row["contender"] for row in rows if "problem" in row}
            results += rows
    return results, table(results)


def table(results: list[dict[str, Any]]) -> str:
    texts = [
        f"Milliseconds, with the quartiles; memory in MiB beyond the inputs, of at most {LIMIT_BYTES / 2**30:.0f} GiB. "
        "`-`: fewer patches were already too many, or, for torch.compile and torch.mm, not measured."
    ]
    for depth, dtype, _ in GRID:
        own = [row for row in results if row["D"] == depth and row["dtype"] == dtype]
        for what, title in (("seconds", "ms"), ("bytes", "peak memory, MiB")):
            for which in ("forward", "forward+backward"):
                body = [
                    [str(n), *(cell(find(own, N=n, contender=c, passes=which), what) for c in CONTENDERS)]
                    for n in dict.fromkeys(row["N"] for row in own)
                ]
                texts.append(f"D = {depth}, {dtype}, {which}, {title}\n\n" + markdown(["N", *CONTENDERS], body))
    return "\n\n".join(texts)
