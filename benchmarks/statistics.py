"""patch_statistics against softmax, log_softmax and average pooling, eager and compiled: the same three outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.runner import compare, markdown, median, milliseconds
from pglcl_ext import patch_statistics, reference

CASES = [((16, 4, 256, 256), 16, None), ((16, 4, 256, 256), 16, 8), ((2, 4, 64, 64, 64), 8, None)]


def run(*, device: str = "cpu", repetitions: int = 21) -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    rows = []
    compiled = torch.compile(reference.patch_statistics, dynamic=False)
    for shape, patch, stride in CASES:
        # PyTorch has no avg_pool3d of bfloat16 on the CPU.
        for dtype in (torch.float32, torch.bfloat16) if len(shape) == 4 or device != "cpu" else (torch.float32,):
            x = torch.randn(shape).to(device, dtype).requires_grad_()
            grads = [torch.ones_like(t) for t in patch_statistics(x, patch, stride)]

            def forward(function: Any, x: Any = x, patch: Any = patch, stride: Any = stride) -> Callable[[], Any]:
                def call() -> Any:
                    with torch.no_grad():
                        return function(x, patch, stride)

                return call

            def both(
                function: Any, x: Any = x, patch: Any = patch, stride: Any = stride, grads: Any = grads
            ) -> Callable[[], Any]:
                return lambda: torch.autograd.grad(function(x, patch, stride), x, grads)

            samples = compare(
                {
                    "fused forward": forward(patch_statistics),
                    "eager forward": forward(reference.patch_statistics),
                    "fused forward+backward": both(patch_statistics),
                    "eager forward+backward": both(reference.patch_statistics),
                    "compiled forward+backward": both(compiled),
                },
                repetitions=repetitions,
            )
            case = {"shape": shape, "patch": patch, "stride": stride or patch, "dtype": str(dtype), "seconds": samples}
            results.append(case)
            ours = median(samples["fused forward+backward"])
            rows.append(
                [
                    f"{'x'.join(map(str, shape))}, patch {patch}, stride {stride or patch}, {str(dtype)[6:]}",
                    milliseconds(samples["fused forward"]),
                    milliseconds(samples["fused forward+backward"]),
                    f"{median(samples['eager forward']) / median(samples['fused forward']):.1f}x",
                    f"{median(samples['eager forward+backward']) / ours:.1f}x",
                    f"{median(samples['compiled forward+backward']) / ours:.1f}x",
                ]
            )
    head = ["input", "forward ms", "forward+backward ms", "vs eager, forward", "vs eager, both", "vs compiled, both"]
    return results, markdown(head, rows)
