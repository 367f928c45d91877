"""The ops on an emulated device, under their public names. Each call takes the device, and returns gradients, too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import pglcl_ext
from pglcl_ext._checks import REDUCTIONS
from pglcl_ext._library import ops
from tests.simt import emulator


@contextmanager
def device(
    capability: int = 80, shared_bytes: int = 160 * 1024, multiprocessors: int = 4, allow_tf32: bool = False
) -> Iterator[None]:
    """The emulated device, and PyTorch's switch for float32 products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        with emulator.on(emulator.Device(capability, capability, shared_bytes, multiprocessors)):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def patch_contrast(
    anchors: Tensor, *arguments: Any, upstream: Tensor | None = None, keys: Tensor | None = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients to anchors and keys, for an upstream gradient that rises from 1/2 to 3/2."""
    limits = {
        name: options.pop(name)
        for name in ("capability", "shared_bytes", "multiprocessors", "allow_tf32")
        if name in options
    }
    leaves = [t.detach().requires_grad_() for t in (anchors, keys) if t is not None]
    with device(**limits):
        if keys is not None:
            options["keys"] = leaves[1]
        loss = pglcl_ext.patch_contrast_loss(leaves[0], *arguments, **options)
        if upstream is None:
            upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=torch.float64)[: loss.numel()]
        grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype).reshape(loss.shape))
    return loss.detach(), list(grads)


def patch_statistics(
    x: Tensor, patch: list[int], stride: list[int], grads: list[Tensor] | None, **options: bool
) -> tuple[list[Tensor], Tensor | None]:
    """(entropy, confidence, class entropy), and the gradient of the input for upstream gradients of all three."""
    leaf = x.detach().requires_grad_()
    out = list(pglcl_ext.patch_statistics(leaf, patch, stride, **options))
    grad = None if grads is None else torch.autograd.grad(out, leaf, grads)[0]
    return [t.detach() for t in out], grad


def semantic_disparity(a: Tensor, b: Tensor) -> Tensor:
    return ops.semantic_disparity(a, b)


def semantic_disparity_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return ops.semantic_disparity_backward(grad, a, b, True, True)


def disparity_bounds(
    a: Tensor, y: Tensor, b: Tensor, z: Tensor, count: int, *, positives: bool, self_offset: int, ignore_index: int = -1
) -> tuple[Tensor, Tensor]:
    """The bounds of the op, and those of a plain loop."""
    got = ops.disparity_bounds(a, y, b, z, count, positives, ignore_index, self_offset)
    want = torch.full((len(a),), math.inf if positives else 0.0, dtype=a.dtype)
    delta = (a[:, None] - b[None]).abs().mean(2)
    for i in range(len(a)):
        candidates = (z != ignore_index) & ((z == y[i]) == positives)
        if self_offset >= 0 and i + self_offset < len(b):
            candidates[i + self_offset] = False
        if y[i] != ignore_index and candidates.sum() > count:
            want[i] = delta[i][candidates].sort(descending=not positives).values[count - 1]
    return got, want


def gaussian_contrast(anchors: Tensor, *statistics: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients of the losses, num_valid)."""
    values = {"temperature": 0.2, "covariance_scale": 4.0, "negative_weight": 4096.0, "ignore_index": -1, **options}
    limits = {name: values.pop(name) for name in ("capability", "shared_bytes") if name in values}
    reduction = REDUCTIONS[values.pop("reduction", "mean")]
    with device(**limits):
        return ops.gaussian_contrast(anchors, *statistics, **values, reduction=reduction, needs_gradients=True)
