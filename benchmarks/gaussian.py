"""The Gaussian loss against the authors' formulas, re-expressed in eager PyTorch: same value, and the time of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import compare, markdown, median, milliseconds
from pglcl_ext import EmbeddingQueue, gaussian_contrast_loss, reference

TEMPERATURE, SCALE, WEIGHT = 0.2, 4.0, 4096.0


def authors(t: Tensor, y: Tensor, means: Tensor, covariances: Tensor, counts: Tensor) -> Tensor:
    """METHOD section 6, the quadratic form as the diagonal of an N x N product, exponentials before the logarithm."""
    k = len(counts)
    logits, spreads = [], []
    for j in range(k):
        logits.append(t @ means[j] / TEMPERATURE)
        spreads.append(torch.diag(t @ covariances[j] @ t.t()) * SCALE / (2 * TEMPERATURE**2))
    logit, exponent = torch.stack(logits, dim=1), torch.stack(logits, dim=1) + torch.stack(spreads, dim=1)
    own = F.one_hot(y, k).bool()
    weight = torch.where(own, 1.0, WEIGHT / k)
    denominator = (weight * exponent.exp()).sum(dim=1)
    return (denominator.log() - logit[own]).mean()


def problem(n: int, depth: int, classes: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    queue = EmbeddingQueue(classes, depth, 4096)
    labels = torch.arange(4096 * classes) % classes
    centres = torch.randn(classes, depth, generator=g)
    queue.enqueue(F.normalize(centres[labels] + torch.randn(len(labels), depth, generator=g), dim=1), labels)
    anchors = F.normalize(torch.randn(n, depth, generator=g), dim=1)
    y = torch.randint(0, classes, (n,), generator=g)
    return tuple(t.to(device) for t in (anchors, y, *queue.statistics(), queue.counts))  # type: ignore[return-value]


def run(
    *, device: str = "cpu", repetitions: int = 15, sizes: tuple[int, ...] = (128, 512, 2048)
) -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    rows = []
    compiled = torch.compile(reference.gaussian_contrast_loss, dynamic=False)
    for n in sizes:
        for depth in (64, 128, 256):
            for dtype in (torch.float32, torch.bfloat16):
                if dtype == torch.bfloat16 and depth != 128:
                    continue
                anchors, *rest = problem(n, depth, 4, device)
                t = anchors.to(dtype).requires_grad_()
                wide = anchors.detach().to(dtype).float().requires_grad_()

                def both(function: Callable[..., Tensor], x: Tensor, rest: Any = rest) -> Callable[[], Any]:
                    return lambda: torch.autograd.grad(function(x, *rest), x)

                value, theirs = gaussian_contrast_loss(t, *rest).item(), authors(wide, *rest).item()
                same = math.isclose(value, theirs, rel_tol=1e-4)
                contenders = {
                    "fused": both(gaussian_contrast_loss, t),
                    "eager": both(reference.gaussian_contrast_loss, t),
                    "authors": both(authors, wide),
                }
                if depth == 128 and dtype == torch.float32:
                    contenders["compiled"] = both(compiled, t)
                samples = compare(contenders, repetitions=repetitions)
                results.append(
                    {
                        "N": n,
                        "D": depth,
                        "K": 4,
                        "dtype": str(dtype),
                        "seconds": samples,
                        "value": value,
                        "authors": theirs,
                        "same": same,
                    }
                )
                ours = median(samples["fused"])
                rows.append(
                    [
                        f"{n}, {depth}, {str(dtype)[6:]}",
                        milliseconds(samples["fused"]),
                        f"{median(samples['authors']) / ours:.1f}x",
                        f"{median(samples['eager']) / ours:.1f}x",
                        f"{median(samples['compiled']) / ours:.1f}x" if "compiled" in samples else "-",
                        f"{value:.4f} / {theirs:.4f}",
                    ]
                )
    head = [
        "N, D (K = 4)",
        "forward+backward ms",
        "vs authors' formulas",
        "vs eager",
        "vs torch.compile",
        "value / theirs",
    ]
    return results, markdown(head, rows)
