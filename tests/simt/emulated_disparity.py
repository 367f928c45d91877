"""The kernels of the semantic disparity and of its bounds."""

from __future__ import annotations

import pytest
import torch

from pglcl_ext import reference
from tests.problems import DTYPES
from tests.simt import calls
from tests.simt.contrast_cases import shifted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "m", "channels"), [(1, 1, 1), (33, 20, 1), (20, 70, 2), (9, 70, 3), (0, 5, 1)])
def test_disparity_and_gradients_match_the_reference(n: int, m: int, channels: int, dtype: torch.dtype) -> None:
    a, b = (torch.rand(k, channels).mul(8).round().div(8).to(dtype).requires_grad_() for k in (n, m))
    want = reference.semantic_disparity(a, b)
    torch.testing.assert_close(calls.semantic_disparity(a.detach(), b.detach()), want.detach())
    grad = torch.randn(n, m, dtype=dtype)
    got = calls.semantic_disparity_backward(grad, a.detach(), b.detach())
    for x, y in zip(got, torch.autograd.grad(want, (a, b), grad), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_gradients_of_many_patches_keep_their_digits() -> None:
    """A lane has 1563 equal terms, whose sum would be rounded to one side again and again."""
    grad = torch.full((1, 50_000), 1e-3 / 3)
    got, _ = calls.semantic_disparity_backward(grad, torch.ones(1, 1), torch.zeros(50_000, 1))
    torch.testing.assert_close(got, grad.double().sum().float().view(1, 1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("positives", [True, False])
@pytest.mark.parametrize("itself", [True, False])
def test_bounds_match_the_reference(positives: bool, itself: bool, dtype: torch.dtype) -> None:
    for count in (1, 4, 30):
        for channels in (1, 3):
            a, y = torch.rand(40, channels).mul(10).round().div(10).to(dtype), torch.randint(-1, 3, (40,))
            b, z = (a, y) if itself else (torch.rand(55, channels).to(dtype), torch.randint(-1, 3, (55,)))
            offset = 0 if itself else -1
            got, want = calls.disparity_bounds(a, y, b, z, count, positives=positives, self_offset=offset)
            valid = y != -1  # the bound of an ignored anchor is never read
            torch.testing.assert_close(got[valid], want[valid])


@pytest.mark.parametrize("positives", [True, False])
def test_exactly_as_many_keys_as_asked_for(positives: bool) -> None:
    for channels in (1, 2):
        a = torch.rand(9, channels).double()
        y = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
        for count in range(1, 8):
            got, want = calls.disparity_bounds(a, y, a, y, count, positives=positives, self_offset=0)
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("positives", [True, False])
def test_bounds_are_exact_to_the_last_bit(positives: bool, channels: int, dtype: torch.dtype) -> None:
    """Disparities of sixteenths need no rounding. Anchors are the keys from the third on; the last ones are no keys."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randint(0, 9, (12, channels), generator=generator).to(dtype) / 8
    z = torch.randint(0, 2, (12,), generator=generator)
    a, y = torch.cat([b[3:], b[:3]]), torch.cat([z[3:], z[:3]])
    for anchors, count in ((12, 1), (12, 3), (1, 2)):
        got, want = calls.disparity_bounds(a[:anchors], y[:anchors], b, z, count, positives=positives, self_offset=3)
        assert torch.equal(got, want)
    for keys in (0, 1, 2):
        got, want = calls.disparity_bounds(a, y, b[:keys], z[:keys], 1, positives=positives, self_offset=-1)
        assert torch.equal(got, want)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_offsets_of_disparities(dtype: torch.dtype, channels: int) -> None:
    a, b = torch.rand(20, channels).to(dtype), torch.rand(17, channels).to(dtype)
    y, z, grad = torch.randint(-1, 3, (20,)), torch.randint(-1, 3, (17,)), torch.randn(20, 17).to(dtype)
    assert torch.equal(calls.semantic_disparity(shifted(a), shifted(b)), calls.semantic_disparity(a, b))
    moved = calls.semantic_disparity_backward(shifted(grad), shifted(a), shifted(b))
    for got, want in zip(moved, calls.semantic_disparity_backward(grad, a, b), strict=True):
        assert torch.equal(got, want)
    for positives in (True, False):
        options = {"positives": positives, "self_offset": -1}
        want, _ = calls.disparity_bounds(a, y, b, z, 3, **options)
        got, _ = calls.disparity_bounds(*map(shifted, (a, y, b, z)), 3, **options)
        assert torch.equal(got, want)
