"""semantic_disparity, and the bounds that follow from counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pglcl_ext import reference, semantic_disparity
from pglcl_ext._arguments import BoundsArguments
from pglcl_ext.semantic_disparity import disparity_bounds
from tests.problems import DTYPES

ops = torch.ops.pglcl_ext


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "channels"), [(1, 1, 1), (33, 20, 1), (20, 129, 3), (0, 5, 1), (5, 0, 2)])
def test_matches_reference(n: int, m: int, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    def side(count: int) -> torch.Tensor:
        t = torch.rand(count, channels).mul(16).round().div(16)  # ties occur
        return (t.squeeze(1) if channels == 1 else t).to(device, dtype).requires_grad_()

    a, b = side(n), side(m)
    oracle = [t.detach().double().cpu().requires_grad_() for t in (a, b)]
    got, want = semantic_disparity(a, b), reference.semantic_disparity(*oracle)
    assert got.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got.double().cpu(), want, atol=tolerance, rtol=tolerance)
    weights = torch.randn(n, m, dtype=torch.float64)
    for x, y in zip(
        torch.autograd.grad(got, (a, b), weights.to(device, dtype)),
        torch.autograd.grad(want, oracle, weights),
        strict=False,
    ):
        torch.testing.assert_close(x.double().cpu(), y, atol=max(n, m, 1) * tolerance, rtol=tolerance)


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_of_many_patches_keep_their_digits(channels: int) -> None:
    """The gradients of a mean over all pairs are equal. A sum of a million of them in float32 would be 1 % wrong."""
    a, b = torch.full((2, channels), 2.0, requires_grad=True), torch.rand(500_000, channels, requires_grad=True)
    for x, y in ((a, b), (b, a)):
        (grad,) = torch.autograd.grad(semantic_disparity(x, y).mean(), a)
        torch.testing.assert_close(grad, torch.full((2, channels), 1 / (2 * channels)), rtol=1e-6, atol=0)


def test_disparity_with_itself_is_symmetric_with_a_zero_diagonal(device: torch.device) -> None:
    a = torch.rand(50, 2, device=device, requires_grad=True)
    d = semantic_disparity(a)
    assert torch.equal(d, d.t())
    assert torch.all(d.diagonal() == 0)
    (grad,) = torch.autograd.grad(d[0].sum(), a)
    (want,) = torch.autograd.grad(reference.semantic_disparity(a)[0].sum(), a)
    torch.testing.assert_close(grad, want)


def test_opcheck_derivatives_and_compilation_pass(device: torch.device) -> None:
    a = torch.rand(7, 2, device=device, dtype=torch.float64, requires_grad=True)
    b = torch.rand(5, 2, device=device, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.semantic_disparity.default, (a, b))
    grad = torch.randn(7, 5, device=device, dtype=torch.float64)
    torch.library.opcheck(ops.semantic_disparity_backward.default, (grad, a.detach(), b.detach(), True, False))
    y = torch.randint(0, 2, (7,), device=device)
    torch.library.opcheck(ops.disparity_bounds.default, (a.detach(), y, b.detach(), y[:5], 2, True, -1, -1))
    assert torch.autograd.gradcheck(semantic_disparity, (a, b))
    compiled = torch.compile(semantic_disparity, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), semantic_disparity(a, b))
    (grad,) = torch.autograd.grad(semantic_disparity(a, b).sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="semantic_disparity cannot be differentiated twice"):
        grad.sum().backward()


@given(data=st.data())
def test_bounds_are_the_nth_disparity(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    channels, count = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 8))
    positives, itself = data.draw(st.booleans()), data.draw(st.booleans())
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    m = n if itself else m
    a = torch.rand(n, channels, generator=g).mul(10).round().div(10)
    b = a if itself else torch.rand(m, channels, generator=g).mul(10).round().div(10)
    y = torch.randint(-1, 3, (n,), generator=g)
    z = y if itself else torch.randint(-1, 3, (m,), generator=g)
    bounds = disparity_bounds(BoundsArguments(a, y, b, z, count, positives, -1, 0 if itself else -1))
    d = (a[:, None] - b[None]).abs().mean(2)
    for i in range(n):
        values = [
            float(d[i, j])
            for j in range(m)
            if y[i] >= 0 and z[j] >= 0 and (y[i] == z[j]) == positives and not (itself and i == j)
        ]
        values.sort(reverse=not positives)
        none = math.inf if positives else 0.0
        expected = values[count - 1] if len(values) > count else none
        assert float(bounds[i]) == pytest.approx(expected, abs=1e-7)


BAD_CALLS = [
    ("a must be float64", TypeError, (torch.zeros(3, dtype=torch.long),)),
    ("a must have shape", ValueError, (torch.zeros(3, 2, 2),)),
    ("a must have shape", ValueError, (torch.tensor(1.0),)),
    ("as many channels", ValueError, (torch.zeros(3, 2), torch.zeros(3, 1))),
    ("dtype of a", TypeError, (torch.zeros(3), torch.zeros(3).double())),
]


@pytest.mark.parametrize(("message", "error", "arguments"), BAD_CALLS)
def test_bad_input_is_refused_by_name(message: str, error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match=message):
        semantic_disparity(*arguments)
