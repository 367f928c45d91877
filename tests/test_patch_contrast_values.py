"""patch_contrast_loss at its edges: empty inputs, large logits and gradients, numbers that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pglcl_ext import patch_contrast_loss, reference
from tests.problems import DTYPES, TOLERANCE, ContrastProblem
from tests.test_patch_contrast import OPTIONS


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", ["N=0", "M=0", "all ignored", "all different", "one patch", "D=0"])
def test_nothing_to_contrast_is_zero_and_stays_in_the_graph(case: str, reduction: str, device: torch.device) -> None:
    n, d = (0 if case == "N=0" else 1 if case == "one patch" else 30), (0 if case == "D=0" else 8)
    z = torch.randn(n, d, device=device, requires_grad=True)
    y = torch.arange(n, device=device) if case != "all ignored" else torch.full((n,), -1, device=device)
    keys = {}
    if case == "M=0":
        k = torch.randn(0, d, device=device, requires_grad=True)
        keys = {"keys": k, "key_labels": torch.zeros(0, dtype=torch.long, device=device)}
    loss = patch_contrast_loss(z, y, reduction=reduction, **keys)
    assert loss.shape == ((n,) if reduction == "none" else ())
    assert torch.all(loss == 0)
    loss.sum().backward()
    assert z.grad is not None
    assert torch.all(z.grad == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype, device: torch.device) -> None:
    z = (torch.randn(200, 8, dtype=dtype, device=device) * 100).requires_grad_()
    y = torch.randint(0, 3, (200,), device=device)
    for temperature, weight in ((1.0, 1.0), (1e-3, 1.0), (1e-3, 1e30), (1e-3, 1e-30)):
        loss = patch_contrast_loss(z, y, temperature=temperature, negative_weight=weight)
        (grad,) = torch.autograd.grad(loss, z)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


def integer_problem(scale: float, *, m: int | None, **options: Any) -> ContrastProblem:
    """Embeddings of a few whole numbers times `scale`. If `scale` and temperature are powers of two, logits are exact
    in every dtype, and many of them are equal."""
    p = ContrastProblem.random(150, 5, m=m, classes=3, channels=None, **options)
    g = torch.Generator().manual_seed(1)
    p.anchors = torch.randint(-2, 3, p.anchors.shape, generator=g).double() * scale
    if p.keys is not None:
        p.keys = torch.randint(-2, 3, p.keys.shape, generator=g).double() * scale
    return p


def assert_large_logits_match(problem: ContrastProblem, dtype: torch.dtype) -> None:
    """Compares loss and gradients with the reference, which can hold the logits."""
    ours, oracle = problem.cast(dtype), problem.cast(torch.float64)
    value, expected = ours.loss(), oracle.loss(reference.patch_contrast_loss)
    torch.testing.assert_close(value.double(), expected, rtol=4e-6, atol=4e-6)
    epsilon = max(torch.finfo(dtype).eps, 4e-6)
    for a, b in zip(ours.gradients(value), oracle.gradients(expected), strict=True):
        floor = epsilon * b.abs().max()
        torch.testing.assert_close(a.double(), b.to(dtype).double(), rtol=2 * epsilon, atol=float(floor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [None, 130], ids=["self", "keys"])
def test_large_logits_agree_with_plain_pytorch_in_float64(dtype: torch.dtype, m: int | None, isa: str) -> None:
    for scale in (1.0, 2.0**5, 2.0**13) + (() if dtype == torch.float16 else (2.0**57,)):  # norms up to 3e4, 6e17
        for temperature in (2.0**-4, 1.0, 16.0):
            for weight in (0.0, 2.0**-10, 1.0, 1e7):
                options = {"temperature": temperature, "negative_weight": weight}
                assert_large_logits_match(integer_problem(scale, m=m, **options), dtype)


def gap_problem(n: int, *, near: bool, keys: bool, **options: Any) -> ContrastProblem:
    """All logits of positives are 1 / temperature and those of negatives 0 (`near`). Or those of positives are 0, and
    those of some negatives 1 / temperature."""
    p = ContrastProblem.random(n, 5, m=n if keys else None, classes=3, channels=None, **options)
    axes = torch.eye(5, dtype=torch.float64)
    if near or keys:
        p.anchors = axes[p.labels]
    else:
        p.labels, p.anchors = torch.arange(n) // 5, axes[torch.arange(n) % 5]
    if keys:
        p.keys = axes[p.key_labels if near else (p.key_labels + 1) % 3]
    return p


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [False, True], ids=["self", "keys"])
@pytest.mark.parametrize("near", [True, False], ids=["near positives", "far positives"])
def test_a_weight_far_from_one_leaves_no_share_out(dtype: torch.dtype, keys: bool, near: bool, isa: str) -> None:
    """A share of e^-88 of the largest is below the normal numbers of float32, and may still be most of the sum."""
    for power in (20, 22, 30, 45, 55, 100):
        for gap in (64, 96, 128):
            options = {"temperature": 1 / gap, "negative_weight": 10.0 ** (power if near else -power)}
            p = gap_problem(70, near=near, keys=keys, **options)
            ours, oracle = p.cast(dtype), p.cast(torch.float64)
            value, expected = ours.loss(), oracle.loss(reference.patch_contrast_loss)
            torch.testing.assert_close(value.double(), expected, rtol=4e-6, atol=4e-6)
            epsilon = max(torch.finfo(dtype).eps, 4e-6)
            for a, b in zip(ours.gradients(value), oracle.gradients(expected), strict=True):
                # Each is a difference of numbers as large as gap / 70.
                torch.testing.assert_close(a.double(), b, rtol=2 * epsilon, atol=4e-6 * gap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [None, 50], ids=["self", "keys"])
@pytest.mark.parametrize(("norm", "temperature"), [(1e18, 1e-4), (1e19, 1.0), (1e37, 0.1)])
def test_logits_beyond_float32_give_the_right_loss_or_infinity(
    norm: float, temperature: float, m: int | None, dtype: torch.dtype, isa: str
) -> None:
    """The loss is right, or infinite where its dtype cannot hold it. Every fifth anchor is short, with small logits."""
    for channels, options in ((1, {}), (3, {"num_positives": 3, "num_negatives": 4}), (1, {"negative_weight": 30.0})):
        p = ContrastProblem.random(60, 8, m=m, channels=channels, temperature=temperature, reduction="none", **options)
        with torch.no_grad():
            p.anchors.mul_(norm)
            p.anchors[::5].div_(norm)
            if p.keys is not None:
                p.keys.mul_(norm)
        p = p.cast(dtype)
        exact = p.cast(torch.float64)
        losses, wanted = p.loss(), exact.loss(reference.patch_contrast_loss)
        largest = torch.finfo(torch.float32).max
        assert torch.equal(losses.isinf(), wanted > largest)
        torch.testing.assert_close(losses.double(), wanted.where(wanted <= largest, math.inf), rtol=1e-5, atol=1e-5)
        weights = torch.linspace(0.5, 1.5, 60)
        for got, want in zip(p.gradients(losses, weights), exact.gradients(wanted, weights.double()), strict=True):
            room = want.abs() < torch.finfo(dtype).max
            epsilon = 2 * max(torch.finfo(dtype).eps, 1e-5)
            floor = epsilon * float(want[room].abs().max())
            torch.testing.assert_close(got[room].double(), want[room], rtol=epsilon, atol=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_certain_anchor_has_no_gradient(dtype: torch.dtype, device: torch.device) -> None:
    z = torch.tensor([[300.0, 30], [300, 90], [210, 300]], dtype=dtype, device=device)
    for scale in (1, 100) + (() if dtype == torch.float16 else (1e14,)):
        anchors = (scale * z).requires_grad_()
        loss = patch_contrast_loss(anchors, torch.tensor([0, 0, 1], device=device), temperature=0.1)
        (grad,) = torch.autograd.grad(loss, anchors)
        assert loss == 0
        assert torch.all(grad == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_large_upstream_gradient_gives_the_gradient_of_plain_pytorch(dtype: torch.dtype, isa: str) -> None:
    # All logits are the smallest of unit vectors: e^(logit - largest possible logit) is near the end of float32.
    z = torch.tensor([[1.0, 0], [-1, 0], [-1, 0]])
    for labels in ([0, 0, 0], [0, 0, 1], [0, 1, 1]):
        for weight in (0.0, 1e-6, 1.0, 1e6, 1e7):
            grads = []
            for function, kind in ((patch_contrast_loss, dtype), (reference.patch_contrast_loss, torch.float64)):
                anchors = z.to(kind).requires_grad_()
                loss = function(anchors, torch.tensor(labels), temperature=0.0254, negative_weight=weight)
                (grad,) = torch.autograd.grad(loss * 65536, anchors)
                grads.append(grad.double())
            # A gradient of 0 is the difference of terms of size 65536 / temperature.
            epsilon = max(torch.finfo(dtype).eps, 1e-5)
            torch.testing.assert_close(grads[0], grads[1], rtol=epsilon, atol=epsilon * 65536 / 0.0254)


@pytest.mark.parametrize(
    ("dtype", "upstream"), [(torch.float64, 1e306), (torch.float32, 1e37), (torch.bfloat16, 1e37)], ids=str
)
@pytest.mark.parametrize("m", [None, 30], ids=["self", "keys"])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("weight", [1.0, 1e-30, 1e19, 1e30])
def test_an_upstream_gradient_near_the_largest_number_gives_right_or_infinite_gradients(
    dtype: torch.dtype, upstream: float, m: int | None, temperature: float, weight: float
) -> None:
    """Gradients are right, or infinite where their dtype cannot hold them."""
    options = {"temperature": temperature, "negative_weight": weight, "reduction": "none"}
    problem = ContrastProblem.random(40, 6, m=m, **options).cast(dtype)
    shares = torch.linspace(-1, 1, 40, dtype=torch.float64).pow(3)  # of both signs and many sizes
    ordinary = problem.gradients(problem.loss(), shares)
    for got, small in zip(problem.gradients(problem.loss(), shares * upstream), ordinary, strict=True):
        want = small.double() * upstream
        largest = torch.finfo(dtype).max
        fits = want.abs() < largest * 0.99
        infinite = torch.where(want > 0, math.inf, -math.inf).to(dtype)
        assert torch.equal(got[~fits & (want.abs() > largest * 1.01)], infinite[~fits & (want.abs() > largest * 1.01)])
        tolerance = TOLERANCE[dtype] * min(float(want.abs().max()), largest)
        torch.testing.assert_close(got[fits].double(), want[fits], rtol=TOLERANCE[dtype], atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_of_one_call_does_not_reach_the_next(dtype: torch.dtype, isa: str) -> None:
    """A thread keeps its buffers. Those of 33 and of 34 patches lie at the same places."""
    p, spoiled = (
        ContrastProblem.random(n, 8, classes=2, ignored=False, reduction="none").cast(dtype) for n in (33, 34)
    )
    before = p.gradients(p.loss(), torch.ones(33))
    losses = spoiled.loss()
    spoiled.gradients(losses, torch.full_like(losses, math.nan))
    after = p.gradients(p.loss(), torch.ones(33))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(a).all() for a in after)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("m", [None, 140], ids=["self", "keys"])
def test_nan_spreads_to_the_losses_that_depend_on_it(bad: float, m: int | None, device: torch.device) -> None:
    p = ContrastProblem.random(140, 8, m=m, classes=2, ignored=False, reduction="none").cast(torch.float32, device)
    with torch.no_grad():
        p.anchors[3] = bad
    loss = p.loss()
    assert torch.isnan(loss[3])
    if m is not None:
        assert torch.isfinite(loss[4:]).all()
    p.gradients(loss, torch.ones_like(loss))  # neither crash nor hang
    p = ContrastProblem.random(140, 8, m=m, classes=2, ignored=False, reduction="none", max_positive_disparity=0.5)
    p = p.cast(torch.float32, device)
    p.descriptors[3] = bad
    loss = p.loss()
    assert torch.isnan(loss[3])
    grads = p.gradients(loss, torch.ones_like(loss))
    assert torch.isnan(grads[0][3]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_of_nan_changes_no_other_row(isa: str, masked: bool, dtype: torch.dtype) -> None:
    # Key 0 is a positive of the anchors of its class that are near it, and a negative of the others that are far.
    g = torch.Generator().manual_seed(0)
    z, k = torch.randn(150, 6, generator=g).to(dtype), torch.randn(140, 6, generator=g).to(dtype)
    y, key_y = torch.randint(0, 2, (150,), generator=g), torch.randint(0, 2, (140,), generator=g)
    h, key_h = torch.rand(150, generator=g), torch.rand(140, generator=g)
    positives, negatives, _ = reference.guided_masks(
        y, h, key_y, key_h, max_positive_disparity=0.3, min_negative_disparity=0.5
    )
    k[0] = math.nan
    z.requires_grad_()
    k.requires_grad_()
    if masked:
        options: dict[str, Any] = {"positive_mask": positives, "negative_mask": negatives}
    else:
        options = {"max_positive_disparity": 0.3, "min_negative_disparity": 0.5}
        options.update(descriptors=h, key_descriptors=key_h)
    loss = patch_contrast_loss(z, y, keys=k, key_labels=key_y, reduction="none", **options)
    uses = (positives | negatives)[:, 0] & positives.any(1)
    assert torch.equal(torch.isnan(loss), uses)
    # An anchor whose loss is left out changes no gradient.
    grads = torch.autograd.grad(loss, (z, k), torch.where(uses, 0, 1.0), retain_graph=True)
    for grad in grads:
        assert torch.isfinite(grad).all()
    grad_z, grad_k = torch.autograd.grad(loss, (z, k), torch.ones_like(loss))
    assert torch.equal(torch.isnan(grad_z).any(1), uses)
    met = (positives | negatives)[uses].any(0)
    assert torch.equal(torch.isnan(grad_k).any(1), met)
    # Losses that are not NaN are the same as without that key.
    others = patch_contrast_loss(
        z, y, keys=torch.where(torch.isfinite(k), k, 0), key_labels=key_y, reduction="none", **options
    )
    torch.testing.assert_close(loss[~uses], others[~uses])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["plain", "bounds", "counts", "none"])
@pytest.mark.parametrize("m", [None, 30], ids=["self", "keys"])
def test_the_reference_agrees_on_descriptors_that_are_not_finite(bad: float, name: str, m: int | None) -> None:
    for seed in range(4):
        p = ContrastProblem.random(24, 4, m=m, classes=3, seed=seed, **{**OPTIONS[name], "reduction": "none"})
        p = p.cast(torch.float64)
        for side in (p.descriptors, p.key_descriptors):
            if side is not None:
                side[[3, 7]] = bad
        torch.testing.assert_close(p.loss(), p.loss(reference.patch_contrast_loss), equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("m", [None, 30], ids=["self", "keys"])
def test_descriptors_that_are_not_finite_move_no_bound_of_others(bad: float, channels: int, m: int | None) -> None:
    """The descriptor of an ignored patch changes nothing. That of an anchor that is no key spoils only its own loss."""
    counts = {"num_positives": 3, "num_negatives": 4, "reduction": "none"}
    p = ContrastProblem.random(24, 4, m=m, channels=channels, classes=3, ignored=False, **counts).cast(torch.float64)
    p.labels[5] = -1
    want = p.loss()
    p.descriptors[5] = bad
    if p.key_labels is not None:
        p.key_labels[7] = -1
        want = p.loss()
        p.key_descriptors[7] = bad
        torch.testing.assert_close(p.loss(), want)
        p.descriptors[3] = bad
        want = want.detach().index_fill(0, torch.tensor([3]), math.nan)
    torch.testing.assert_close(p.loss(), want, equal_nan=True)
    torch.testing.assert_close(p.loss(), p.loss(reference.patch_contrast_loss), equal_nan=True)
