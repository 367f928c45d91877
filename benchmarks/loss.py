"""The fused contrastive loss against the eager reference and against the matrix product that cannot be avoided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import compare, markdown, median, milliseconds
from pglcl_ext import patch_contrast_loss, reference

OPTIONS = {"max_positive_disparity": 0.5, "min_negative_disparity": 0.1}  # of descriptors uniform in [0, 1]


def run(*, sizes: list[int], depth: int = 128, device: str = "cpu", repetitions: int = 15) -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    rows = []
    cases = [(n, False, torch.float32) for n in sizes] + [(n, False, torch.bfloat16) for n in sizes]
    cases += [(n, True, torch.float32) for n in sizes if n >= 4096]
    for n, with_keys, dtype in cases:
        samples = measure(n, depth, with_keys, dtype, device, repetitions if n < 16384 else 3)
        results.append({"N": n, "D": depth, "keys": with_keys, "dtype": str(dtype), "seconds": samples})
        ours, eager = samples["fused forward"], samples.get("eager forward")
        ours_both, eager_both = samples["fused forward+backward"], samples.get("eager forward+backward")
        mm = median(samples["torch.mm"])
        rows.append(
            [
                f"{n}{' x ' + str(n) + ' keys' if with_keys else ''}, {str(dtype).removeprefix('torch.')}",
                milliseconds(ours),
                milliseconds(ours_both),
                f"{median(eager) / median(ours):.1f}x" if eager else "-",
                f"{median(eager_both) / median(ours_both):.1f}x" if eager_both else "-",
                f"{median(ours) / mm:.2f}",
                f"{median(ours_both) / mm:.2f}",
            ]
        )
    head = ["N, dtype", "forward ms", "forward+backward ms", "vs eager, forward", "vs eager, both"]
    return results, markdown([*head, "in torch.mm, forward", "in torch.mm, both"], rows)


def measure(
    n: int, depth: int, with_keys: bool, dtype: torch.dtype, device: str, repetitions: int
) -> dict[str, list[float]]:
    g = torch.Generator().manual_seed(0)

    def side() -> tuple[Tensor, Tensor, Tensor]:
        z = F.normalize(torch.randn(n, depth, generator=g), dim=1).to(device, dtype).requires_grad_()
        return z, torch.randint(0, 4, (n,), generator=g).to(device), torch.rand(n, generator=g).to(device)

    z, y, d = side()
    options: dict[str, Any] = dict(OPTIONS)
    inputs = [z]
    if with_keys:
        k, key_labels, key_descriptors = side()
        options.update(keys=k, key_labels=key_labels, key_descriptors=key_descriptors)
        inputs.append(k)

    def forward(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return function(z, y, d, **options)

        return call

    def both(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(z, y, d, **options), inputs)

    plain = z.detach().float()
    contenders: dict[str, Callable[[], Any]] = {
        "fused forward": forward(patch_contrast_loss),
        "fused forward+backward": both(patch_contrast_loss),
        "torch.mm": lambda: torch.mm(plain, plain.t()),
    }
    if n <= 8192:  # beyond, its N x N matrices take many GiB
        contenders["eager forward"] = forward(reference.patch_contrast_loss)
        contenders["eager forward+backward"] = both(reference.patch_contrast_loss)
    return compare(contenders, repetitions=repetitions)
