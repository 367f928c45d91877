"""The kernels of the patch statistics, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from pglcl_ext import patch_statistics, reference
from tests.problems import DTYPES, TOLERANCE
from tests.simt import calls
from tests.simt.contrast_cases import shifted

GRIDS = [
    ((2, 3, 20, 23), (5, 5), (5, 5)),
    ((1, 2, 20, 23), (5, 4), (2, 3)),
    ((1, 4, 33, 64), (16, 16), (16, 16)),
    ((1, 4, 32, 32), (16, 16), (8, 8)),
    ((1, 8, 9, 9), (4, 4), (4, 4)),
    ((1, 11, 8, 9), (4, 4), (3, 3)),
    ((1, 19, 8, 9), (4, 4), (3, 3)),
    ((1, 131, 5, 5), (4, 4), (1, 1)),
    ((1, 9, 14, 13), (13, 12), (1, 1)),
    ((1, 4, 20, 36), (18, 18), (2, 6)),
    ((1, 4, 9, 10, 11), (3, 4, 5), (2, 2, 3)),
    ((1, 3, 8, 8, 16), (4, 4, 8), (4, 4, 8)),
    ((1, 3, 7, 9, 8), (2, 4, 4), (3, 5, 4)),
    ((1, 3, 6, 8, 9), (2, 4, 4), (3, 4, 4)),
    ((1, 3, 6, 8, 9), (2, 4, 4), (3, 4, 2)),
    ((1, 3, 6, 8, 9), (2, 4, 4), (1, 5, 4)),
    ((0, 3, 8, 8), (4, 4), (4, 4)),
]


TOLERANCE_OF_STATISTICS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize(("shape", "patch", "stride"), GRIDS)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_gradients_match_the_reference(
    shape, patch, stride, probabilities: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 2
    x = (x.softmax(1) if probabilities else x).to(dtype)
    oracle = x.double().requires_grad_()
    options = {"probabilities": probabilities, "normalize": bool(shape[0] % 2)}
    want = reference.patch_statistics(oracle, patch, stride, **options)
    weights = [
        torch.linspace(-1, 1, max(t.numel(), 1), dtype=torch.float64)[: t.numel()].reshape(t.shape) for t in want
    ]
    got, grad = calls.patch_statistics(x, list(patch), list(stride), [w.to(dtype) for w in weights], **options)
    tolerance = TOLERANCE_OF_STATISTICS[dtype]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=tolerance, atol=tolerance)
    (expected,) = torch.autograd.grad(want, oracle, weights)
    scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=4 * tolerance * scale)


@pytest.mark.parametrize(
    ("shape", "patch"), [((1030, 3, 2), (2, 2)), ((10, 12, 14), (12, 13)), ((9, 18, 17), (17, 17))]
)
def test_more_classes_than_registers_hold_match_the_reference(shape: tuple[int, ...], patch: tuple[int, int]) -> None:
    """Patches of 1, 2 and 3 chunks of 128 pixels."""
    x = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
    want = reference.patch_statistics(x, patch, (1, 1))
    weights = [torch.randn(t.shape, dtype=torch.float64) for t in want]
    got, grad = calls.patch_statistics(x, list(patch), [1, 1], weights, probabilities=False, normalize=False)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(want, x, weights)[0], rtol=1e-10, atol=1e-12)


def test_statistics_do_not_depend_on_strides() -> None:
    """Channels last, slices and expanded gradients are read in place."""
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    grads = [torch.randn(2, 4, 4).double(), torch.tensor(0.5).double().expand(2, 4, 4, 4)]
    grads.append(torch.randn(2, 4, 4, 4).double().transpose(2, 3))
    options = {"probabilities": False, "normalize": True}
    want, expected = calls.patch_statistics(x, [4, 4], [4, 4], [g.contiguous() for g in grads], **options)
    for same in (
        x.to(memory_format=torch.channels_last),
        torch.stack([x, x], dim=-1)[..., 1],
        torch.cat([x, x], dim=3)[..., 16:],
        torch.cat([x, x], dim=3)[..., 1:17].copy_(x),
    ):
        got, grad = calls.patch_statistics(same, [4, 4], [4, 4], grads, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(grad, expected)
        assert grad.stride() == torch.empty_like(same).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "patch", "stride"), [(20, 4, 4), (36, 18, 18), (26, 8, 6), (24, 16, 4), (32, 18, 6)])
def test_widths_that_vectors_do_not_divide_match_the_reference(
    width: int, patch: int, stride: int, dtype: torch.dtype
) -> None:
    x = torch.randn(1, 3, 6, width, dtype=torch.float64).to(dtype)
    got, _ = calls.patch_statistics(x, [3, patch], [3, stride], None, probabilities=False, normalize=False)
    want = reference.patch_statistics(x.double(), (3, patch), (3, stride))
    tolerance = TOLERANCE_OF_STATISTICS[dtype]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("classes", [2, 9])
@pytest.mark.parametrize("patch", [(12, 3), (40, 1), (4, 11), (12, 12)], ids=str)
def test_patch_widths_that_do_not_divide_a_warp_match_the_reference(patch: tuple[int, int], classes: int) -> None:
    """Lanes go over them in steps of 32 pixels, or of groups of four: several rows, and a rest."""
    x = torch.randn(1, classes, *patch)
    got, _ = calls.patch_statistics(x, list(patch), list(patch), None, probabilities=False, normalize=False)
    for a, b in zip(got, reference.patch_statistics(x.double(), patch, patch), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_images_whose_indices_exceed_32_bits_have_the_right_statistics() -> None:
    far = 2**30
    x = torch.empty(1, 2, 1, far + 16, dtype=torch.bfloat16)
    ends = [torch.randn(1, 2, 1, 16).bfloat16() for _ in range(2)]
    x[..., :16], x[..., far:] = ends
    options = {"probabilities": False, "normalize": False}
    got, _ = calls.patch_statistics(x, [1, 16], [1, far], None, **options)
    for end, where in zip(ends, range(2), strict=True):
        want, _ = calls.patch_statistics(end, [1, 16], [1, 16], None, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[..., where], b[..., 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_offsets_do_not_change_statistics(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 8, 16).to(dtype)
    grads = [torch.randn(shape).to(dtype) for shape in ((1, 2, 2), (1, 3, 2, 2), (1, 3, 2, 2))]
    options = {"probabilities": False, "normalize": False}
    want, wanted = calls.patch_statistics(x, [4, 8], [4, 8], grads, **options)
    got, grad = calls.patch_statistics(shifted(x), [4, 8], [4, 8], [shifted(t) for t in grads], **options)
    for a, b in zip((*got, grad), (*want, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("classes", [2, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_confident_logits_match_the_reference(classes: int, dtype: torch.dtype) -> None:
    """A class of subnormal mass has an entropy and a gradient. The gradient does not depend on rounded outputs."""
    g = torch.Generator().manual_seed(0)
    for low in (-6.0, -12.0, -90.0):
        x = (torch.rand(1, classes, 8, 8, generator=g, dtype=torch.float64) + low).to(dtype)
        x[:, : classes // 2] = torch.rand(classes // 2, 8, 8, generator=g).to(dtype)
        oracle = x.double().requires_grad_()
        want = reference.patch_statistics(oracle, 4)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype) for t in want]
        got, grad = calls.patch_statistics(x, [4, 4], [4, 4], weights, probabilities=False, normalize=False)
        eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        torch.testing.assert_close(got[2].double(), want[2].detach(), rtol=2 * eps, atol=2e-6)
        (expected,) = torch.autograd.grad(want, oracle, [w.double() for w in weights])
        scale = max(expected.abs().max().item(), 1e-3)  # upstream gradients of order 1 cancel
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=max(4 * eps, 1e-5) * scale)


def test_gradients_of_probabilities_below_the_normal_range_are_exact() -> None:
    x = torch.tensor([1.0, 1e-42]).reshape(1, 2, 1, 1)
    ones = [torch.ones(1, 1, 1), torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)]
    _, grad = calls.patch_statistics(x, [1, 1], [1, 1], ones, probabilities=True, normalize=False)
    torch.testing.assert_close(grad.flatten(), -(x.double().log() + 1).float().flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 11])
def test_probabilities_of_0_have_class_entropy_0_and_finite_gradients(classes: int, dtype: torch.dtype) -> None:
    p = torch.rand(1, classes, 8, 8, dtype=torch.float64).softmax(1).to(dtype)
    p[:, 2] = 0
    p[0, 0, 3, 3] = 0
    weights = [torch.randn(1, 2, 2), torch.randn(1, classes, 2, 2), torch.zeros(1, classes, 2, 2)]
    weights = [w.to(dtype) for w in weights]
    got, grad = calls.patch_statistics(p, [4, 4], [4, 4], weights, probabilities=True, normalize=False)
    assert torch.all(got[2][:, 2] == 0)
    assert torch.isfinite(grad).all()
    tolerance = TOLERANCE_OF_STATISTICS[dtype]
    for a, b in zip(got, reference.patch_statistics(p.double(), 4, probabilities=True), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_extreme_logits_give_finite_statistics() -> None:
    x = torch.randint(0, 2, (1, 3, 16, 16)) * 2e4 - 1e4
    got, grad = calls.patch_statistics(
        x, [4, 4], [4, 4], [torch.ones(1, 4, 4), *[torch.ones(1, 3, 4, 4)] * 2], probabilities=False, normalize=False
    )
    assert all(torch.isfinite(t).all() for t in (*got, grad))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [3, 11])
def test_logits_of_minus_infinity_match_the_reference(classes: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, classes, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, :2], x[0, 1, 0, 1:4], x[0, :-1, 1, 0], x[0, 1:, 1, 1] = (-math.inf,) * 4
    x[0, 0, 1, 2], x[0, 1, 1, 2] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    ours = x.to(dtype)
    upstream = [
        torch.ones(1, 1, 2),
        torch.linspace(-1, 1, 2 * classes).view(1, classes, 1, 2),
        torch.ones(1, classes, 1, 2),
    ]
    got, grad = calls.patch_statistics(ours, [2, 3], [2, 3], [t.to(dtype) for t in upstream])
    oracle = ours.double().requires_grad_()
    want = reference.patch_statistics(oracle, [2, 3], [2, 3])
    (wanted,) = torch.autograd.grad(want, oracle, [t.double() for t in upstream])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    assert grad is not None
    torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("classes", [3, 11])
def test_a_pixel_without_probabilities_makes_its_patch_nan(classes: int) -> None:
    for bad, which in ((-math.inf, slice(None)), (math.inf, 0), (math.inf, 1), (math.nan, 0), (math.nan, classes - 1)):
        x = torch.randn(1, classes, 2, 6)
        x[0, which, 1, 1] = bad
        for t in calls.patch_statistics(x, [2, 3], [2, 3], None)[0]:
            assert t[..., 0].isnan().all()
            assert t[..., 1].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_a_logit_stays_in_its_patch(bad: float) -> None:
    x = torch.randn(1, 3, 8, 8)
    x[0, 1, 2, 3] = bad
    (h, *_), _ = calls.patch_statistics(x, [4, 4], [4, 4], None, probabilities=False, normalize=False)
    assert torch.isnan(h[0, 0, 0])
    assert torch.isfinite(h.flatten()[1:]).all()


def test_entropy_is_at_most_one_where_it_is_normalized() -> None:
    """With rounding, the logarithm of the number of classes divided by itself may exceed 1."""
    for classes in (2, 6, 36):
        (h, _, of_classes), _ = calls.patch_statistics(
            torch.zeros(1, classes, 1, 2), [1, 2], [1, 2], None, probabilities=False, normalize=True
        )
        assert h.max() <= 1
        assert of_classes.max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_halfway_between_two_numbers_are_rounded_to_the_even_one(dtype: torch.dtype) -> None:
    """The middle one of three pixels gets half of the gradients of both patches that hold it."""
    numbers = torch.arange(0x0001, 0x7B00, 251, dtype=torch.int32).to(torch.int16)
    upstream = torch.stack([numbers.view(dtype), (numbers + 1).view(dtype)], dim=-1).expand(1, 2, -1, -1)
    images = torch.full((*upstream.shape[:3], 3), 0.5, dtype=dtype, requires_grad=True)
    confidence = patch_statistics(images, (1, 2), 1, probabilities=True).confidence
    [gradient] = torch.autograd.grad(confidence, images, upstream)
    assert torch.equal(gradient[..., 1], (upstream.float().sum(dim=-1) / 2).to(dtype))
