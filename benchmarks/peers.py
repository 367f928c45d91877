"""The loss beside what a user would otherwise take, time and peak memory, each peer in a process of its own.

A peer that needs more than `LIMIT_SECONDS` a call, or runs out of memory, is shown as such and not tried on more
patches.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import compare, markdown, median, peak_growth

LIMIT_SECONDS = 60.0
LIMIT_BYTES = 12 * 2**30
TEMPERATURE = 0.1


def supcon(z: Tensor, y: Tensor) -> Tensor:
    """The supervised contrastive loss as its paper's readers write it: all pairs, a mask, a log-softmax."""
    logits = z @ z.t() / TEMPERATURE
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = logits.masked_fill(itself, float("-inf"))
    positives = (y[:, None] == y[None, :]) & ~itself
    log_p = logits - logits.logsumexp(dim=1, keepdim=True)
    count = positives.sum(dim=1)
    losses = -log_p.masked_fill(~positives, 0).sum(dim=1) / count.clamp(min=1)
    return losses.sum() / (count > 0).sum()


def monai_contrastive(z: Tensor, y: Tensor) -> Tensor:
    """MONAI's loss knows two views of each sample and no labels: half of the patches against the other half."""
    from monai.losses import ContrastiveLoss

    half = len(z) // 2
    return ContrastiveLoss(temperature=TEMPERATURE)(z[:half], z[half:])


def contenders() -> dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]]:
    """Made when asked for: a peer's imports and compilation are its own."""

    def ours() -> Callable[[Tensor, Tensor], Tensor]:
        from pglcl_ext import patch_contrast_loss

        return lambda z, y: patch_contrast_loss(z, y, temperature=TEMPERATURE)

    def reference() -> Callable[[Tensor, Tensor], Tensor]:
        from pglcl_ext import reference

        return lambda z, y: reference.patch_contrast_loss(z, y, temperature=TEMPERATURE)

    def metric_learning() -> Callable[[Tensor, Tensor], Tensor]:
        from pytorch_metric_learning.losses import SupConLoss

        return SupConLoss(temperature=TEMPERATURE)

    return {
        "pglcl_ext": ours,
        "eager reference": reference,
        "torch.compile": lambda: torch.compile(reference(), dynamic=False),
        "pytorch-metric-learning": metric_learning,
        "plain SupCon": lambda: supcon,
        "MONAI": lambda: monai_contrastive,
        "torch.mm alone": lambda: lambda z, y: (z @ z.t()).sum(),
    }


def patches(n: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(n, depth, generator=g), dim=1).to(dtype).requires_grad_()
    return z, torch.randint(0, 4, (n,), generator=g)


def measure_here(name: str, n: int, depth: int, dtype: str, threads: int, repetitions: int) -> dict[str, Any]:
    """In this process: seconds of the forward and of both passes, and bytes by which memory grew at most."""
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    z, y = patches(n, depth, getattr(torch, dtype))
    small_z, small_y = patches(64, depth, getattr(torch, dtype))
    function = contenders()[name]()
    if name != "torch.compile":  # which compiles for each size
        torch.autograd.grad(function(small_z, small_y), small_z)

    def forward() -> Any:
        with torch.no_grad():
            return function(z, y)

    def both() -> Any:
        return torch.autograd.grad(function(z, y), z)

    start = time.perf_counter()
    grown = peak_growth(both)
    first = time.perf_counter() - start
    if first > LIMIT_SECONDS and name != "torch.compile":
        return {"seconds": {"forward+backward": [first]}, "bytes": grown, "problem": "over a minute"}
    few = max(1, min(repetitions, int(4 / max(first, 1e-4))))
    return {"seconds": compare({"forward": forward, "forward+backward": both}, repetitions=few), "bytes": grown}


def measure(name: str, n: int, depth: int, dtype: str, threads: int, repetitions: int) -> dict[str, Any]:
    arguments = json.dumps([name, n, depth, dtype, threads, repetitions])
    code = "import json, sys; from benchmarks.peers import measure_here; "
    code += "print(json.dumps(measure_here(*json.loads(sys.argv[1]))))"
    case = {"peer": name, "N": n, "D": depth, "dtype": dtype}
    try:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, arguments], capture_output=True, text=True, timeout=150
        )
    except subprocess.TimeoutExpired:
        return {**case, "problem": "over a minute"}
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["killed"]
        memory = "memory" in last[0].lower() or "alloc" in last[0].lower() or result.returncode < 0
        return {**case, "problem": "out of memory" if memory else last[0][:200]}
    return {**case, **json.loads(result.stdout.strip().splitlines()[-1])}


def run(
    *, sizes: list[int], depths: list[int], dtypes: list[str], threads: int, repetitions: int = 9
) -> tuple[list[dict], str]:
    results: list[dict] = []
    rows = []
    beaten: set[tuple[str, int, str]] = set()
    for dtype in dtypes:
        for depth in depths:
            for n in sizes:
                case: dict[str, dict] = {}
                for name in contenders():
                    if (name, depth, dtype) in beaten or (name == "torch.compile" and (depth != 128 or n > 4096)):
                        continue
                    case[name] = measure(name, n, depth, dtype, threads, repetitions)
                    results.append(case[name])
                    if "problem" in case[name]:
                        beaten.add((name, depth, dtype))
                rows.append([f"{n}, {depth}, {dtype}", *(_cell(case.get(name)) for name in contenders())])
    head = ["N, D, dtype", *contenders()]
    return results, "forward+backward in ms; memory beyond the inputs in MiB\n\n" + markdown(head, rows)


def _cell(case: dict | None) -> str:
    if case is None:
        return "-"
    if "problem" in case:
        return case["problem"]
    return f"{1e3 * median(case['seconds']['forward+backward']):.3g} ms, {case['bytes'] / 2**20:.0f}"
