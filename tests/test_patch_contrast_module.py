"""PatchContrastLoss: it normalises its embeddings and counts the anchors of its last call."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from pglcl_ext import PatchContrastLoss, patch_contrast_loss, reference
from tests.problems import DTYPES, TOLERANCE


def test_module_counts_anchors(device: torch.device) -> None:
    module = PatchContrastLoss()
    assert module.num_valid is None
    y = torch.tensor([0, 0, 1, 2, -1], device=device)
    module(torch.randn(5, 4, device=device), y)
    assert module.num_valid.item() == 2
    module(torch.randn(5, 4, device=device), torch.arange(5, device=device))
    assert module.num_valid.item() == 0


def test_the_module_normalises_embeddings(device: torch.device) -> None:
    z, y = torch.randn(40, 8, device=device) * 50, torch.randint(0, 3, (40,), device=device)
    expected = patch_contrast_loss(F.normalize(z, dim=1), y, temperature=0.1)
    torch.testing.assert_close(PatchContrastLoss()(z, y), expected)
    assert "temperature=0.1" in repr(PatchContrastLoss())


# Rows whose squares leave the range of their dtype, upwards or downwards.
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
        (torch.float32, 1e25),
        (torch.float32, 1e-25),
        (torch.bfloat16, 1e25),
        (torch.bfloat16, 1e-25),
        (torch.float16, 6e3),
        (torch.float16, 1e-4),
    ],
)
def test_module_normalises_rows_of_any_size(dtype: torch.dtype, size: float, device: torch.device) -> None:
    z = (torch.randn(12, 40, device=device, dtype=torch.float64) * size).to(dtype).requires_grad_()
    y = torch.arange(12, device=device) % 3
    exact = z.detach().double().requires_grad_()
    scaled = exact / exact.detach().abs().amax(dim=1, keepdim=True)
    expected = reference.patch_contrast_loss(scaled / scaled.norm(dim=1, keepdim=True), y)
    loss = PatchContrastLoss()(z, y)
    tolerance = 3 * TOLERANCE[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    (got,), (want,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, exact)
    want = want.to(dtype)  # infinite if the dtype cannot hold it
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want[want.isfinite()].abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_stays_as_it_is(dtype: torch.dtype, device: torch.device) -> None:
    z = torch.randn(6, 4, device=device).to(dtype)
    z[0] = 0
    z.requires_grad_()
    y = torch.arange(6, device=device) % 2
    loss = PatchContrastLoss()(z, y)
    unit = F.normalize(z.detach().double(), dim=1).to(dtype).requires_grad_()
    expected = patch_contrast_loss(unit, y)
    torch.testing.assert_close(loss, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    (got,), (of_unit,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, unit)
    assert got.isfinite().all()
    assert 0 < float(got[0].abs().max()) <= 2 * float(of_unit.abs().max())


def test_the_module_accepts_embeddings_of_size_0(device: torch.device) -> None:
    z = torch.zeros(4, 0, device=device, requires_grad=True)
    loss = PatchContrastLoss()(z, torch.tensor([0, 0, 1, 1], device=device))
    torch.testing.assert_close(loss, torch.full((), math.log(3), device=device))
    assert torch.autograd.grad(loss, z)[0].shape == (4, 0)


def test_transforms_leave_nothing_of_theirs_in_the_module() -> None:
    module, y = PatchContrastLoss(), torch.arange(6) % 2
    z = torch.randn(3, 6, 4)
    module(z[0], y)
    assert module.num_valid == 6
    torch.vmap(lambda t: module(t, y))(z)
    assert copy.deepcopy(module).num_valid is None
    torch.func.grad(lambda t: module(t, y))(z[0])
    assert copy.deepcopy(module).num_valid is None
