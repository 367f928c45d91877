"""The kernels of the Gaussian loss, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from pglcl_ext import gaussian_contrast_loss, reference
from tests.problems import DTYPES, gaussian_problem
from tests.simt import calls
from tests.simt.contrast_cases import TILED_DTYPES, shifted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize(
    ("n", "depth", "shared"), [(1, 1, 160), (37, 20, 160), (20, 130, 160), (9, 200, 11), (0, 8, 160)]
)
def test_loss_and_gradients_match_the_reference(
    n: int, depth: int, shared: int, pairwise: bool, dtype: torch.dtype
) -> None:
    anchors, *rest = gaussian_problem(n, depth, pairwise=pairwise, empty=(1,))
    ours = anchors.to(dtype)
    shared = shared * 1024 * (2 if dtype == torch.float64 else 1)
    for options in ({}, {"reduction": "none", "negative_weight": 0.0}, {"reduction": "sum", "temperature": 1.0}):
        oracle = ours.double().requires_grad_()
        losses = reference.gaussian_contrast_loss(oracle, *rest, **{**options, "reduction": "none"})
        (want,) = torch.autograd.grad(losses.sum(), oracle)
        expected = reference.gaussian_contrast_loss(oracle.detach(), *rest, **options)
        loss, gradients, num_valid = calls.gaussian_contrast(ours, *rest, shared_bytes=shared, **options)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
        scale = max(want.abs().max().item(), 1e-6) if want.numel() else 1.0
        torch.testing.assert_close(gradients.double(), want, rtol=0, atol=tolerance * scale)
        assert num_valid == ((rest[0] >= 0) & (rest[0] != 1)).sum()


def test_labels_beyond_the_classes_and_an_ignored_class() -> None:
    anchors, labels, means, covariances, counts = gaussian_problem(30, 8)
    labels = labels.clone()
    labels[3], labels[4] = 7, 4  # beyond the four classes
    labels[5] = 2
    loss, gradients, valid = calls.gaussian_contrast(
        anchors, labels, means, covariances, counts, reduction="none", ignore_index=2
    )
    left_out = (labels < 0) | (labels >= 4) | (labels == 2)
    assert torch.all(loss[left_out] == 0)
    assert torch.all(gradients[left_out] == 0)
    assert int(valid) == int((~left_out).sum())
    want = reference.gaussian_contrast_loss(
        anchors[~left_out], labels[~left_out], means, covariances, counts, reduction="none"
    )
    torch.testing.assert_close(loss[~left_out], want)


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_offsets_change_no_bit(dtype: torch.dtype, pairwise: bool) -> None:
    anchors, *rest = gaussian_problem(11, 8, pairwise=pairwise)
    want = calls.gaussian_contrast(anchors.to(dtype), *rest)
    got = calls.gaussian_contrast(shifted(anchors.to(dtype)), *(shifted(t) for t in rest))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_gaussian_rows_that_do_not_fit_are_refused() -> None:
    anchors, *rest = gaussian_problem(3, 200)
    rest = [rest[0], *(t.float() for t in rest[1:3]), rest[3]]
    calls.gaussian_contrast(anchors.float(), *rest, shared_bytes=11 * 1024)
    with calls.device(shared_bytes=11 * 1024):
        gaussian_contrast_loss(*gaussian_problem(3, 134))
        with pytest.raises(ValueError, match=r"^anchors must have at most 134 columns on this GPU, got 200$"):
            gaussian_contrast_loss(anchors, *rest)


def test_gaussian_rows_that_take_all_shared_memory_match_the_reference() -> None:
    """The kernel that computes in float64 what float32 had no room for asks for more than 48 KiB here."""
    anchors, *rest = gaussian_problem(2, 2048)
    want = reference.gaussian_contrast_loss(anchors, *rest, reduction="none")
    loss, _, _ = calls.gaussian_contrast(anchors.float(), *rest, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pairwise", [False, True])
def test_gaussian_blocks_of_fewer_rows_match_the_reference(pairwise: bool) -> None:
    anchors, *rest = gaussian_problem(7, 40, pairwise=pairwise)
    want = reference.gaussian_contrast_loss(anchors, *rest, reduction="none")
    # Eight anchors, and products and gradients of three; in float32.
    loss, _, _ = calls.gaussian_contrast(anchors.float(), *rest, shared_bytes=14 * 160 + 272, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-4)


def test_gaussian_rows_of_more_than_48_kib_match_the_reference() -> None:
    anchors, labels, *tables = gaussian_problem(1, 264, classes=1)
    loss, _, _ = calls.gaussian_contrast(anchors, labels * 0, *tables)
    torch.testing.assert_close(loss, reference.gaussian_contrast_loss(anchors, labels * 0, *tables))


def test_gaussian_logits_far_below_zero_give_the_right_loss() -> None:
    anchors, labels, means, _, counts = gaussian_problem(4, 8)
    labels = labels.abs()
    anchors = anchors.abs() + 1
    means = -means.abs() - 3 - torch.arange(4).double()[:, None]
    rest = (labels, means, torch.zeros(4, 8, 8).double(), counts)
    for temperature in (0.05, 0.01):  # exponentials of 0 in float32, and in float64
        loss, gradients, _ = calls.gaussian_contrast(anchors.float(), *rest, reduction="none", temperature=temperature)
        want = reference.gaussian_contrast_loss(anchors, *rest, reduction="none", temperature=temperature)
        assert torch.isfinite(gradients).all()
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)


def test_gaussian_exponents_with_a_part_beyond_the_range_are_right_or_nan() -> None:
    """A class with an exponent of minus infinity is not left out, unlike a class with a weight of 0."""
    anchors, y, counts = torch.zeros(1, 256), torch.tensor([0]), torch.tensor([1, 1])
    means, covariances = torch.zeros(2, 256), torch.zeros(2, 256, 256)
    anchors[0, :32] = 6e18
    means[1, :16], means[1, 16:32] = -6e18, 6e18  # whose product is 0
    arguments = (anchors, y, means, covariances, counts)
    loss, _, _ = calls.gaussian_contrast(*arguments, reduction="none", temperature=1.0, negative_weight=2.0)
    assert loss.isnan() or torch.allclose(loss, torch.tensor(2.0).log())
    means[1] = -math.inf
    loss, _, _ = calls.gaussian_contrast(*arguments, reduction="none", temperature=1.0, negative_weight=2.0)
    assert loss.isnan()
    loss, gradients, _ = calls.gaussian_contrast(*arguments, reduction="none", temperature=1.0, negative_weight=0.0)
    assert loss == 0
    assert torch.equal(gradients, torch.zeros_like(gradients))


@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
@pytest.mark.parametrize("pairwise", [False, True])
def test_gaussian_anchors_beyond_float32_give_the_right_loss(pairwise: bool, dtype: torch.dtype) -> None:
    """Every third anchor is moderate, the others are wide. float32 cannot hold one of them, and one does not count."""
    anchors, labels, means, covariances, counts = gaussian_problem(9, 140, pairwise=pairwise, empty=(1,))
    labels = torch.tensor([0, 2, 3, 0, -1, 1, 2, 3, 0])
    anchors[::3] /= 1e19
    anchors[7] *= 1e10
    statistics = (means.float(), covariances.float(), counts)
    ours = (anchors * 1e19).to(dtype)
    loss, gradients, num_valid = calls.gaussian_contrast(ours, labels, *statistics, reduction="none")
    oracle = ours.double().requires_grad_()
    double = (means.float().double(), covariances.float().double(), counts)
    want = reference.gaussian_contrast_loss(oracle, labels, *double, temperature=0.2, reduction="none")
    (wanted,) = torch.autograd.grad(want.sum(), oracle)
    assert int(num_valid) == 7
    torch.testing.assert_close(loss.double(), want.float().double(), rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients.double(), wanted.float().double(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b[b.isfinite()].abs().max()))


def test_gaussian_gradients_beyond_float32_are_right_or_infinite() -> None:
    """The loss is finite. Its gradient is the sum of two infinite terms, which is finite or not."""
    anchors, means, covariances = torch.zeros(1, 8), torch.zeros(2, 8), torch.zeros(2, 8, 8)
    anchors[0, 3] = 1.0
    means[1, 5], covariances[1, 3, 5], covariances[1, 5, 3] = -3e38, 1.55e37, 1.55e37
    arguments = (anchors, torch.tensor([0]), means, covariances, torch.tensor([1, 1]))
    options = {"temperature": 0.1, "covariance_scale": 2.0, "negative_weight": 2.0, "reduction": "none"}
    loss, gradients, _ = calls.gaussian_contrast(*arguments, **options)
    torch.testing.assert_close(loss, torch.tensor([2.0]).log())
    want = 0.5 * (10 * means[1, 5].double() + 200 * covariances[1, 3, 5].double())
    torch.testing.assert_close(gradients[0].double(), torch.zeros(8).double().index_fill(0, torch.tensor([5]), want))
    means[1, 5] = 0
    loss, gradients, _ = calls.gaussian_contrast(*arguments, **options)
    torch.testing.assert_close(loss, torch.tensor([2.0]).log())
    assert gradients[0].tolist() == [0, 0, 0, 0, 0, math.inf, 0, 0]


def test_gaussian_numbers_at_the_end_of_the_range_give_the_right_loss() -> None:
    anchors, labels, means, covariances, counts = gaussian_problem(4, 8)
    arguments = (anchors.float(), labels.abs(), means.float())
    loss, _, _ = calls.gaussian_contrast(
        *arguments, covariances.float(), counts, negative_weight=1e300, reduction="none"
    )
    want = reference.gaussian_contrast_loss(
        anchors, labels.abs(), means, covariances, counts, temperature=0.2, negative_weight=1e300, reduction="none"
    )
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    largest = torch.full((1, 8, 8), 3e38)
    tiny = torch.full((1, 8), 1e-21)
    loss, gradients, _ = calls.gaussian_contrast(
        tiny, torch.tensor([0]), torch.zeros(1, 8), largest, torch.tensor([1]), temperature=1.0, reduction="none"
    )
    torch.testing.assert_close(loss, torch.tensor([0.5 * 4 * 64 * 3e-4]), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, torch.full((1, 8), 4 * 8 * 3e17), rtol=1e-5, atol=0)
