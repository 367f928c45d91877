"""Cases of the contrastive loss that the emulated tests share: options, the way to each kernel, the comparison."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pglcl_ext import reference
from pglcl_ext._arguments import Choice, ContrastArguments, Side
from tests.problems import (
    TOLERANCE,
    ContrastProblem,
    assert_gradients_match,
    contrast_arguments,
    rising_upstream,
)
from tests.simt import calls

TF32 = 4e-3  # in place of TOLERANCE: operands are rounded to 10 bits of mantissa


TILED_DTYPES = [torch.float32, torch.bfloat16]  # one for each kind of tiles


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bounds": {"max_positive_disparity": 0.5, "min_negative_disparity": 0.1},
    "weighted": {"negative_weight": 30.0, "reduction": "sum"},
    "no negatives": {"negative_weight": 0.0},
    "cold": {"temperature": 1e-3},
    "none": {"reduction": "none", "max_positive_disparity": 0.4},
}


# For every kernel of the loss, the dtype and the options that lead to it.
PATHS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain float64": (torch.float64, {}),
    "plain float32": (torch.float32, {"shared_bytes": 1024}),
    "plain bfloat16": (torch.bfloat16, {"shared_bytes": 1024}),
    "FFMA float32": (torch.float32, {}),
    "FFMA float32 in parts": (torch.float32, {"multiprocessors": 6}),
    "FFMA bfloat16": (torch.bfloat16, {"capability": 75}),
    "FFMA float16": (torch.float16, {"capability": 75}),
    "TF32": (torch.float32, {"allow_tf32": True}),
    "mma bfloat16": (torch.bfloat16, {}),
    "mma float16": (torch.float16, {}),
    "mma bfloat16 in parts": (torch.bfloat16, {"multiprocessors": 6}),
}


every_path = pytest.mark.parametrize(("dtype", "device"), PATHS.values(), ids=PATHS)


def padded(rows: list[list[float]], dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(rows, dtype=dtype), (0, 8 - len(rows[0])))


def shifted(t: Tensor) -> Tensor:
    """The same numbers, which begin at the second element of a longer memory."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t


def apart(t: Tensor) -> Tensor:
    """The same numbers, but no two of them adjacent in memory."""
    return torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0]


def assert_contrast(problem: ContrastProblem, dtype: torch.dtype, **device: Any) -> None:
    ours = problem.cast(dtype)
    oracle = ours.cast(torch.float64)
    expected = oracle.loss(reference.patch_contrast_loss)
    want = oracle.gradients(expected, rising_upstream(expected))

    def run(anchors: Tensor, *arguments: Any, **options: Any) -> Tensor:
        nonlocal grads
        options = {k: v.detach() if isinstance(v, Tensor) else v for k, v in options.items()}
        loss, grads = calls.patch_contrast(anchors.detach(), *arguments, **options, **device)
        return loss

    grads: list[Tensor] = []
    loss = ours.loss(run)
    tolerance = TOLERANCE[dtype]
    if dtype != torch.float64:
        tolerance += 2 * torch.finfo(torch.float32).eps / problem.temperature
    if device.get("allow_tf32"):
        tolerance = max(tolerance, TF32 * 0.1 / problem.temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    assert_gradients_match(problem, grads, want, tolerance)


def with_own_keys(
    z: Tensor, y: Tensor, rows: slice, bound: float | Tensor = math.inf, **numbers: Any
) -> ContrastArguments:
    """The arguments of ops.patch_contrast for anchors that are among the keys, with a loss for each anchor."""
    bounds = bound if isinstance(bound, Tensor) else None
    return contrast_arguments(
        Side(z[rows].contiguous(), y[rows].contiguous()),
        Side(z, y),
        Choice(positive_bounds=bounds),
        positive_bound=math.inf if bounds is not None else bound,
        self_offset=rows.start,
        reduction="none",
        **numbers,
    )


def assert_own_keys(z: Tensor, y: Tensor, rows: slice, **device: Any) -> None:
    """The loss and both gradients of anchors that are rows of the keys are those of the reference, which masks them."""
    with calls.device(**device):
        x = with_own_keys(z, y, rows)
        out = calls.contrast_outputs(x)
        grads = calls.contrast_gradients(torch.ones_like(out.loss), out, x)
    anchors, keys = z[rows].double().requires_grad_(), z.double().requires_grad_()
    others = torch.arange(len(z)) != torch.arange(len(z))[rows, None]
    masks = {"positive_mask": (y[rows, None] == y) & others, "negative_mask": y[rows, None] != y}
    want = reference.patch_contrast_loss(anchors, y[rows], keys=keys, key_labels=y, reduction="none", **masks)
    tolerance = 4e-3 if device.get("allow_tf32") else {torch.float64: 1e-10, torch.float32: 1e-4}.get(z.dtype, 3e-2)
    torch.testing.assert_close(out.loss.double(), want, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(grads, torch.autograd.grad(want.sum(), (anchors, keys)), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


# The host code may call these while a graph is captured: they allocate, or run kernels without waiting for the device.
CAPTURABLE = {
    "aten::arange", "aten::argsort", "aten::as_strided", "aten::clone", "aten::contiguous", "aten::copy_", "aten::div",
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::eq", "aten::expand", "aten::fill_", "aten::full",
    "aten::index_select", "aten::logical_not", "aten::masked_fill", "aten::masked_fill_", "aten::reshape",
    "aten::resize_", "aten::scatter", "aten::sort", "aten::sum", "aten::to", "aten::_to_copy", "aten::transpose",
    "aten::view", "aten::add", "aten::_reshape_alias", "aten::_unsafe_view", "aten::slice", "aten::select",
    "aten::unsqueeze", "aten::detach", "aten::alias", "aten::zeros", "aten::zero_", "aten::flip", "aten::new_empty",
    "aten::pad", "aten::constant_pad_nd", "aten::narrow",
}  # fmt: skip


def inside(op: str, call: Any) -> tuple[list[str], int]:
    """The names of the PyTorch functions that the op calls, in order, and how often it allocates memory."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.kineto_results.events()
    spans = [(e.start_ns(), e.end_ns()) for e in events if e.name() == f"pglcl_ext::{op}"]
    assert spans, f"{op} was not called"
    own = [e for e in events if any(first <= e.start_ns() <= last for first, last in spans)]
    called = [e.name() for e in own if e.name().startswith("aten::")]
    return called, sum(e.name() == "[memory]" and e.nbytes() > 0 for e in own)
