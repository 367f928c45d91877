"""The Gaussian loss against the authors' formulas, rewritten in eager PyTorch: values, time and memory of both."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import Calls, cell, find, markdown, measure, passes, ratio, times
from pglcl_ext import EmbeddingQueue, gaussian_contrast_loss, reference

TEMPERATURE, SCALE, WEIGHT = 0.2, 4.0, 4096.0  # the defaults of gaussian_contrast_loss
CLASSES = 4
VALUES_AT = (TEMPERATURE, 0.01)
CONTENDERS = ("pglcl_ext", "authors' formulas", "eager reference", "torch.compile")
SIZES = (128, 512, 2048)


def authors(
    anchors: Tensor, y: Tensor, means: Tensor, covariances: Tensor, counts: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """The authors' form of method, section 6: quadratic forms as the diagonal of an N x N product, no log-space."""
    t = anchors.float()
    k = len(counts)
    logits, spreads = [], []
    for j in range(k):
        logits.append(t @ means[j] / temperature)
        spreads.append(torch.diag(t @ covariances[j] @ t.t()) * SCALE / (2 * temperature**2))
    logit, exponent = torch.stack(logits, dim=1), torch.stack(logits, dim=1) + torch.stack(spreads, dim=1)
    own = F.one_hot(y, k).bool()
    weight = torch.where(own, 1.0, WEIGHT / k)
    denominator = (weight * exponent.exp()).sum(dim=1)
    return (denominator.log() - logit[own]).mean()


def problem(N: int, D: int, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Anchors, their labels, and means, covariances and counts of full queues of 4096 embeddings a class."""
    g = torch.Generator().manual_seed(0)
    queue = EmbeddingQueue(CLASSES, D, 4096)
    labels = torch.arange(4096 * CLASSES) % CLASSES
    centres = torch.randn(CLASSES, D, generator=g)
    queue.enqueue(F.normalize(centres[labels] + torch.randn(len(labels), D, generator=g), dim=1), labels)
    anchors = F.normalize(torch.randn(N, D, generator=g), dim=1).to(device, getattr(torch, dtype))
    rest = (torch.randint(0, CLASSES, (N,), generator=g), *queue.statistics(), queue.counts)
    return (anchors, *(x.to(device) for x in rest))  # type: ignore[return-value]


def make(N: int, D: int, dtype: str, device: str) -> Calls:
    anchors, *rest = problem(N, D, dtype, device)
    anchors.requires_grad_()
    eager = reference.gaussian_contrast_loss
    functions = (gaussian_contrast_loss, authors, eager, torch.compile(eager, dynamic=False))
    return {c: passes(f, (anchors, *rest), (anchors,)) for c, f in zip(CONTENDERS, functions, strict=True)}


def run(*, threads: int, device: str = "cpu", sizes: tuple[int, ...] = ()) -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    for n in sizes or SIZES:
        for depth, dtype in ((64, "float32"), (128, "float32"), (256, "float32"), (128, "bfloat16")):
            case = {"N": n, "D": depth, "dtype": dtype, "device": device}
            contenders = CONTENDERS if (depth, dtype) == (128, "float32") else CONTENDERS[:-1]
            rows = measure(make, case, contenders, threads=threads, warm={"N": 64}, repetitions=15)
            inputs = problem(**case)
            for temperature in VALUES_AT:
                values = gaussian_contrast_loss(*inputs, temperature=temperature), authors(*inputs, temperature)
                ours, theirs = (float(v) for v in values)
                # JSON has no infinity and no NaN, so these are saved by name.
                defined = math.isfinite(theirs)
                same = math.isclose(ours, theirs, rel_tol=1e-4) if defined else None
                value = {"temperature": temperature, "value": ours, "authors": theirs if defined else str(theirs)}
                rows[0].setdefault("values", []).append({**value, "same": same})
            results += rows
    return results, table(results)


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for n, depth, dtype in dict.fromkeys((row["N"], row["D"], row["dtype"]) for row in results):
        case = {"N": n, "D": depth, "dtype": dtype}
        row = [f"{n}, {depth}, {dtype}"]
        for which in ("forward", "forward+backward"):
            row.append(cell(find(results, contender="pglcl_ext", passes=which, **case), "seconds"))
            row += [times(ratio(results, c, "pglcl_ext", which, **case)) for c in CONTENDERS[1:]]
            some = [find(results, contender=c, passes=which, **case) for c in CONTENDERS[:2]]
            row.append(" / ".join(cell(x, "bytes") for x in some))
        first = find(results, contender="pglcl_ext", passes="forward", **case)
        assert first is not None
        for found in first["values"]:
            theirs = found["authors"] if isinstance(found["authors"], str) else f"{found['authors']:.4f}"
            row.append(f"{found['value']:.4f} / {theirs}")
        rows.append(row)
    columns = ["{} ms", "authors' / ours", "eager / ours", "compiled / ours", "MiB: ours / authors'"]
    head = [f"N, D (K = {CLASSES})", *(c.format("forward") for c in columns), *(c.format("both") for c in columns)]
    head += [f"value / theirs at temperature {t:g}" for t in VALUES_AT]
    note = "Time with its quartiles, ratios of medians, peak memory beyond the inputs. A value of theirs that is not a "
    return f"{note}finite number is an overflow of their exponentials.\n\n" + markdown(head, rows)
