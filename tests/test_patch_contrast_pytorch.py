"""patch_contrast_loss in PyTorch: opcheck, gradcheck, compilation, autocast, strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pglcl_ext import PatchContrastLoss, patch_contrast_loss
from pglcl_ext._arguments import Choice, ContrastOutputs, Side
from pglcl_ext._checks import REDUCTIONS
from tests.problems import ContrastProblem, contrast_arguments

ops = torch.ops.pglcl_ext


def op_arguments(device: torch.device, dtype: torch.dtype, *, keys: bool, reduction: str) -> tuple:
    p = ContrastProblem.random(40, 8, m=30 if keys else None).cast(dtype, device)
    other = Side(p.keys, p.key_labels, p.key_descriptors) if keys else None
    choice = Choice(positive_bounds=torch.rand(40, device=device)) if keys else None
    bounds = {"positive_bound": 0.5, "negative_bound": 0.1}
    return contrast_arguments(
        Side(p.anchors, p.labels, p.descriptors), other, choice, reduction=reduction, **bounds
    ).flat()


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck_accepts_both_ops(keys: bool, reduction: str, device: torch.device) -> None:
    arguments = op_arguments(device, torch.float32, keys=keys, reduction=reduction)
    torch.library.opcheck(ops.patch_contrast.default, arguments)
    with torch.no_grad():
        outputs = ContrastOutputs(*ops.patch_contrast(*arguments))
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments)
    backward = (torch.ones_like(outputs.loss), *outputs.for_backward(), *detached, True, keys)
    torch.library.opcheck(ops.patch_contrast_backward.default, backward)


def test_gradients_pass_gradcheck(device: torch.device) -> None:
    for options in ({}, {"max_positive_disparity": 0.5}, {"num_positives": 2}, {"reduction": "none"}):
        for m in (None, 9):
            p = ContrastProblem.random(12, 4, m=m, classes=2, **options).cast(torch.float64, device)

            def loss(anchors: Tensor, keys: Tensor | None = None, p: ContrastProblem = p) -> Tensor:
                side = (p.key_labels, p.key_descriptors)
                return ContrastProblem(anchors, p.labels, p.descriptors, keys, *side, p.options).loss()

            assert torch.autograd.gradcheck(loss, (p.anchors,) if m is None else (p.anchors, p.keys))


def test_double_backward_is_refused(device: torch.device) -> None:
    p = ContrastProblem.random(20, 4).cast(torch.float64, device)
    (grad,) = torch.autograd.grad(p.loss(), p.anchors, create_graph=True)
    with pytest.raises(NotImplementedError, match="patch_contrast_loss cannot be differentiated twice"):
        grad.sum().backward()


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    p = ContrastProblem.random(60, 8, m=50).cast(torch.float32, device)
    q = ContrastProblem.random(60, 8, num_positives=3).cast(torch.float32, device)
    for problem in (p, q):
        compiled = torch.compile(patch_contrast_loss, fullgraph=True, backend="aot_eager")
        loss, expected = problem.loss(compiled), problem.loss()
        torch.testing.assert_close(loss, expected)
        for a, b in zip(problem.gradients(loss), problem.gradients(expected), strict=True):
            torch.testing.assert_close(a, b)
    module = PatchContrastLoss(0.1, max_positive_disparity=0.5)
    compiled_module = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled_module(q.anchors, q.labels, q.descriptors), module(q.anchors, q.labels, q.descriptors)
    )


def test_autocast_gives_the_loss_in_float32(device: torch.device) -> None:
    linear = torch.nn.Linear(8, 8).to(device)
    x, y = torch.randn(50, 8, device=device), torch.randint(0, 3, (50,), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        z = linear(x)
        assert z.dtype == torch.bfloat16
        loss = PatchContrastLoss()(z, y)
        # A teacher's float32 keys with bfloat16 anchors.
        mixed = PatchContrastLoss()(z, y, keys=torch.randn(20, 8, device=device), key_labels=y[:20])
    assert loss.dtype == mixed.dtype == torch.float32
    (loss + mixed).backward()
    assert torch.isfinite(linear.weight.grad).all()


def test_slices_expansions_and_transposes_change_no_result(device: torch.device) -> None:
    wide = torch.randn(70, 40, device=device, dtype=torch.float64)
    y, d = torch.randint(0, 3, (140,), device=device)[::2], torch.rand(70, 3, device=device)[:, 1]
    for z in (wide[:, 5:25], wide[:, ::2], torch.randn(9, 70, device=device).double().t(), wide[:1].expand(70, 40)):
        z = z / 10
        a = patch_contrast_loss(z, y, d, max_positive_disparity=0.4)
        b = patch_contrast_loss(z.contiguous(), y.contiguous(), d.contiguous(), max_positive_disparity=0.4)
        assert torch.equal(a, b)


def test_keys_that_need_no_gradient_get_none(device: torch.device) -> None:
    p = ContrastProblem.random(60, 8, m=50).cast(torch.float32, device)
    p.keys = p.keys.detach()
    p.loss().backward()
    assert p.keys.grad is None
    assert p.anchors.grad is not None
