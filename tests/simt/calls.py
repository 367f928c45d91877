"""The ops on an emulated device, under their public names. Each call takes the device, and returns gradients, too."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import pglcl_ext
from pglcl_ext._arguments import BoundsArguments, ContrastArguments, ContrastOutputs
from tests.problems import gaussian_arguments, rising_upstream
from tests.simt import emulator

ops = torch.ops.pglcl_ext


@contextmanager
def device(
    capability: int = 80,
    shared_bytes: int = 160 * 1024,
    multiprocessors: int = 4,
    allow_tf32: bool = False,
    compiled_for: int | None = None,
) -> Iterator[None]:
    """The emulated device, and PyTorch's switch for float32 products. compiled_for: default: `capability`."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        with emulator.on(emulator.Device(capability, compiled_for or capability, shared_bytes, multiprocessors)):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def limits_of(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the arguments of :func:`device` out of `options`."""
    return {name: options.pop(name) for name in inspect.signature(device).parameters if name in options}


def patch_contrast(
    anchors: Tensor, *arguments: Any, upstream: Tensor | None = None, keys: Tensor | None = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients to anchors and keys, for an upstream gradient that rises from 1/2 to 3/2."""
    limits = limits_of(options)
    leaves = [t.detach().requires_grad_() for t in (anchors, keys) if t is not None]
    with device(**limits):
        if keys is not None:
            options["keys"] = leaves[1]
        loss = pglcl_ext.patch_contrast_loss(leaves[0], *arguments, **options)
        if upstream is None:
            upstream = rising_upstream(loss)
        grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype).reshape(loss.shape))
    return loss.detach(), list(grads)


def contrast_outputs(x: ContrastArguments) -> ContrastOutputs:
    return ContrastOutputs(*ops.patch_contrast(*x.flat()))


def contrast_gradients(
    upstream: Tensor, out: ContrastOutputs, x: ContrastArguments, *, needs_anchors: bool = True, needs_keys: bool = True
) -> tuple[Tensor, Tensor]:
    """The gradients of anchors and keys; empty where there is none, or it is not needed."""
    return ops.patch_contrast_backward(
        upstream, *out.for_backward(), *x.flat(), needs_anchors=needs_anchors, needs_keys=needs_keys
    )


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
    return ops.semantic_disparity_backward(grad, a, b, needs_a=True, needs_b=True)


def disparity_bounds(
    a: Tensor, y: Tensor, b: Tensor, z: Tensor, count: int, *, positives: bool, self_offset: int, ignore_index: int = -1
) -> tuple[Tensor, Tensor]:
    """The bounds of the op, and those of a plain loop."""
    x = BoundsArguments(
        descriptors=a,
        labels=y,
        key_descriptors=b,
        key_labels=z,
        wanted=count,
        positives=positives,
        ignore_index=ignore_index,
        self_offset=self_offset,
    )
    got = ops.disparity_bounds(*x)
    want = torch.full((len(a),), math.inf if positives else 0.0, dtype=a.dtype)
    delta = (a[:, None] - b[None]).abs().mean(2)
    for i in range(len(a)):
        candidates = (z != ignore_index) & ((z == y[i]) == positives)
        if self_offset >= 0 and i + self_offset < len(b):
            candidates[i + self_offset] = False
        if y[i] != ignore_index and candidates.sum() > count:
            want[i] = delta[i][candidates].sort(descending=not positives).values[count - 1]
    return got, want


def gaussian_contrast(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients of the losses, num_valid)."""
    with device(**limits_of(options)):
        return ops.gaussian_contrast(*gaussian_arguments(*tensors, **options))
