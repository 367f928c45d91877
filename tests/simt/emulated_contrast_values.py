"""The contrastive loss of large, infinite and undefined numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pglcl_ext import reference
from pglcl_ext._arguments import Side
from tests.problems import TOLERANCE, ContrastProblem, contrast_arguments
from tests.simt import calls
from tests.simt.contrast_cases import TF32, TILED_DTYPES, every_path, padded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nan_spreads_to_the_losses_that_depend_on_it(dtype: torch.dtype) -> None:
    problem = ContrastProblem.random(40, 8, classes=2, ignored=False, max_positive_disparity=0.5, reduction="none")
    for bad in (math.nan, math.inf):
        z, d = problem.anchors.to(dtype), problem.descriptors.clone()
        d[3] = bad
        loss, grads = calls.patch_contrast(z, problem.labels, d, **problem.options)
        assert torch.isnan(loss).all()
        assert torch.isnan(grads[0]).all()
        z = z.clone()
        z[3] = bad
        loss, _ = calls.patch_contrast(z, problem.labels, problem.descriptors, **problem.options)
        assert torch.isnan(loss[3])


@every_path
@pytest.mark.parametrize("upstream", [1.0, 65536.0])
def test_large_logits_have_the_gradient_of_their_loss(
    dtype: torch.dtype, device: dict[str, Any], upstream: float
) -> None:
    # The positive is far larger than the negative, so loss and gradient are 0.
    z = padded([[300.0, 30], [300, 90], [210, 300]], dtype)
    up = torch.tensor(upstream)
    loss, (grad,) = calls.patch_contrast(z, torch.tensor([0, 0, 1]), temperature=0.1, upstream=up, **device)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    loss, (grad,) = calls.patch_contrast(z * 100, torch.tensor([0, 0, 1]), temperature=0.1, upstream=up, **device)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@every_path
def test_a_gradient_scaler_and_heavy_negatives_stay_finite(dtype: torch.dtype, device: dict[str, Any]) -> None:
    z = padded([[1.0, 0], [-1, 0], [-1, 0]], dtype)
    labels = torch.tensor([0, 0, 1])
    for weight, scale in ((1.0, 65536.0), (1e7, 1.0), (1e-30, 1.0), (1e30, 1.0), (1e7, 65536.0 / 64)):
        oracle = z.double().requires_grad_()
        expected = reference.patch_contrast_loss(oracle, labels, temperature=0.0254, negative_weight=weight)
        (want,) = torch.autograd.grad(expected, oracle, torch.tensor(scale, dtype=torch.float64))
        if dtype == torch.float16 and want.abs().max() > 6e4:
            continue  # the true gradient is beyond the type
        loss, (grad,) = calls.patch_contrast(
            z, labels, temperature=0.0254, negative_weight=weight, upstream=torch.tensor(scale), **device
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 1e-2)
        torch.testing.assert_close(grad.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@every_path
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_number_spoils_only_what_uses_it(
    dtype: torch.dtype, device: dict[str, Any], bad: float
) -> None:
    problem = ContrastProblem.random(40, 8, classes=3, ignored=False, max_positive_disparity=0.5, reduction="none")
    z, labels, descriptors = problem.anchors.to(dtype), problem.labels.clone(), problem.descriptors
    # Patch 5 is ignored. No patch is close enough to patch 7, the only one of its class, so it uses all and all use it.
    labels[5] = -1
    spoiled = z.clone()
    spoiled[5] = bad
    clean, (want,) = calls.patch_contrast(z, labels, descriptors, **problem.options, **device)
    loss, (grad,) = calls.patch_contrast(spoiled, labels, descriptors, **problem.options, **device)
    torch.testing.assert_close(loss, clean, rtol=0, atol=0)
    torch.testing.assert_close(grad, want, rtol=0, atol=0)
    # A key of class 0 counts only for anchors of class 0, since no disparity from other classes is large enough.
    options = {**problem.options, "min_negative_disparity": 2.0, "max_positive_disparity": 2.0}
    spoiled = z.clone()
    row = int((labels == 0).nonzero()[0])
    spoiled[row, 3] = bad
    loss, (grad,) = calls.patch_contrast(spoiled, labels, descriptors, **options, **device)
    used = labels == 0
    assert not torch.isfinite(loss[used]).any()
    assert torch.isfinite(loss[~used]).all()
    assert not torch.isfinite(grad[used]).all(dim=1).any()
    assert torch.isfinite(grad[~used]).all()


@every_path
def test_a_row_that_is_no_number_leaves_the_gradients_of_others_alone(
    dtype: torch.dtype, device: dict[str, Any]
) -> None:
    z, y, h = torch.randn(9, 8).to(dtype), torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 0]), torch.zeros(9)
    options = {"min_negative_disparity": 1.0, "reduction": "none", "temperature": 1.0}  # no negatives
    _, (want,) = calls.patch_contrast(z, y, h, **options, **device)
    z[3, 5] = math.nan
    _, (grad,) = calls.patch_contrast(z, y, h, **options, **device)
    assert torch.isnan(grad[0]).any()
    torch.testing.assert_close(grad[y == 1], want[y == 1], rtol=1e-3, atol=1e-3)


def test_an_ignored_key_of_nan_changes_no_gradient() -> None:
    """All four warps have weights in most tiles. In one tile, 32 threads find a NaN, of a key that is ignored."""
    generator = torch.Generator().manual_seed(0)
    z, k = torch.randn(32, 8, generator=generator), torch.randn(288, 8, generator=generator)
    y, key_y = torch.arange(32) % 2, torch.arange(288) % 2
    key_y[256:258] = torch.tensor([-1, 0])
    options = {"key_labels": key_y, "temperature": 1.0}
    _, wanted = calls.patch_contrast(z, y, keys=k, **options)
    k[256] = math.nan
    _, grads = calls.patch_contrast(z, y, keys=k, **options)
    for got, want in zip(grads, wanted, strict=True):
        assert torch.equal(got, want)


@every_path
@pytest.mark.parametrize("weight", [2.0**-10, 1e7])
def test_the_weight_of_negatives_does_not_drown_in_large_logits(
    dtype: torch.dtype, device: dict[str, Any], weight: float
) -> None:
    """Embeddings are whole numbers, so logits are exact in every type, and many are equal."""
    g = torch.Generator().manual_seed(1)
    z = torch.randint(-2, 3, (70, 8), generator=g).double() * 2.0**13
    y = torch.randint(0, 3, (70,), generator=g)
    oracle = z.clone().requires_grad_()
    expected = reference.patch_contrast_loss(oracle, y, temperature=2.0**-4, negative_weight=weight)
    (want,) = torch.autograd.grad(expected, oracle)
    options = {"temperature": 2.0**-4, "negative_weight": weight, "upstream": torch.tensor(1.0)}
    loss, (grad,) = calls.patch_contrast(z.to(dtype), y, **options, **device)
    torch.testing.assert_close(loss.double(), expected, rtol=4e-6, atol=4e-6)
    epsilon = max(torch.finfo(dtype).eps, 1e-3 if device.get("allow_tf32") else 4e-6)
    torch.testing.assert_close(grad.double(), want, rtol=2 * epsilon, atol=epsilon * float(want.abs().max()))


@every_path
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_logit_that_is_infinite(dtype: torch.dtype, device: dict[str, Any], sign: float) -> None:
    """Anchors 0 and 1 are a pair whose logit is beyond the type; all other logits are 0.

    Beyond float32, the loss is right, or infinite if it does not fit; beyond float64, it is NaN.
    """
    z = torch.zeros(40, 8, dtype=dtype)
    length, temperature = (4e110, 1e-100) if dtype == torch.float64 else (4, 1e-38)
    z[0, 0], z[1, 0] = length, sign * length
    y = torch.ones(40, dtype=torch.long)
    y[:2] = 0
    upstream = torch.ones(40).index_fill(0, torch.tensor([0, 1]), 0)
    options = {"temperature": temperature, "reduction": "none", "upstream": upstream}
    loss, (grad,) = calls.patch_contrast(z, y, **options, **device)
    # log(37 positives and 2 negatives, all of logit 0); the positive itself is far above, or below.
    torch.testing.assert_close(loss[2:].double(), torch.full((38,), math.log(39)).double(), rtol=1e-5, atol=1e-5)
    if dtype == torch.float64:
        assert (torch.isnan(loss[:2]) if sign > 0 else loss[:2] == math.inf).all()
    else:
        assert loss[:2].tolist() == [0.0 if sign > 0 else math.inf] * 2
    # The losses of the two are left out.
    assert torch.isfinite(grad).all() or dtype == torch.float16  # whose gradients are beyond the type


@every_path
def test_no_share_is_above_one_whatever_the_rounding(dtype: torch.dtype, device: dict[str, Any]) -> None:
    """A product in the backward pass that exceeds the largest one of the forward pass counts as the largest."""
    z, y = torch.eye(2, 8).to(dtype) + 0.5, torch.tensor([0, 0])
    with calls.device(**device):
        x = contrast_arguments(Side(z, y))
        out = calls.contrast_outputs(x)
        out = out._replace(max_logit=out.max_logit - 0.5)
        grad, _ = calls.contrast_gradients(torch.ones((), dtype=out.log_sum.dtype), out, x, needs_keys=False)
    assert torch.equal(grad, torch.zeros_like(grad))


@every_path
def test_an_anchor_without_pairs_is_not_undecided(dtype: torch.dtype, device: dict[str, Any]) -> None:
    z, h = torch.randn(5, 8).to(dtype), torch.rand(5)
    h[0] = math.nan
    bounds = torch.tensor([math.nan, 1.0, 1.0, 1.0, 1.0])
    for y in (torch.tensor([0, -1, -1, -1, -1]), torch.tensor([-1, -1, 0, 1, 1])):
        loss, (grad,) = calls.patch_contrast(z, y, h, max_positive_disparity=bounds, reduction="none", **device)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(grad).all()
        assert loss[0] == 0


@every_path
@pytest.mark.parametrize("sign", [1, -1])
def test_only_descriptors_whose_difference_overflows_give_nan(
    dtype: torch.dtype, device: dict[str, Any], sign: int
) -> None:
    huge = sign * (1.5e308 if dtype == torch.float64 else 3e38)
    z, y = torch.randn(6, 8).to(dtype), torch.tensor([0, 0, 1, 1, 0, 0])
    h = torch.full((6,), huge, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss, _ = calls.patch_contrast(z, y, h, reduction="none", **device)
    assert torch.isfinite(loss).all()
    h[5] = -huge  # infinitely far from all others
    loss, _ = calls.patch_contrast(z, y, h, max_positive_disparity=1.0, reduction="none", **device)
    assert torch.isnan(loss).all()


@every_path
@pytest.mark.parametrize("place", [1, 2, 7])
def test_one_key_of_unknown_channels_spoils_every_anchor(
    dtype: torch.dtype, device: dict[str, Any], place: int
) -> None:
    problem = ContrastProblem.random(5, 8, m=9, channels=3, ignored=False, max_positive_disparity=0.5, reduction="none")
    h = problem.key_descriptors.clone()
    h[place, 1] = math.nan
    keys = {"keys": problem.keys.to(dtype), "key_labels": problem.key_labels, "key_descriptors": h}
    arguments = (problem.anchors.to(dtype), problem.labels, problem.descriptors)
    loss, _ = calls.patch_contrast(*arguments, **keys, **problem.options, **device)
    assert torch.isnan(loss).all()


@pytest.mark.parametrize("place", [0, 33])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_descriptors_of_nan_give_nan_for_long_rows(dtype: torch.dtype, channels: int, place: int) -> None:
    """Rows of more than 256 columns are read in chunks, but the descriptors of keys only once."""
    options = {"max_positive_disparity": 0.5, "reduction": "none"}
    problem = ContrastProblem.random(5, 272, m=34, classes=2, channels=channels, **options)
    labels, keys = problem.labels, {"keys": problem.keys.to(dtype), "key_labels": problem.key_labels.abs()}
    arguments = (problem.anchors.to(dtype), labels.clone().index_fill(0, torch.tensor([1]), -1))
    for bad in (math.nan, math.inf):
        h = problem.key_descriptors.clone()
        h[place] = bad
        loss, (of_anchors, _) = calls.patch_contrast(
            *arguments, problem.descriptors, **keys, key_descriptors=h, **options
        )
        assert torch.equal(loss.isnan(), arguments[1] != -1)
        assert torch.equal(of_anchors.isnan().all(1), arguments[1] != -1)
        h = problem.descriptors.clone()
        h[2] = bad
        loss, (of_anchors, _) = calls.patch_contrast(
            *arguments, h, **keys, key_descriptors=problem.key_descriptors, **options
        )
        assert loss.isnan().tolist() == [False, False, labels[2] != -1, False, False]
        assert torch.equal(of_anchors.isnan().any(1), loss.isnan())
        keys["key_labels"][place] = -1  # the descriptor of an ignored key does not count
        h = problem.key_descriptors.clone()
        h[place] = bad
        loss, _ = calls.patch_contrast(*arguments, problem.descriptors, **keys, key_descriptors=h, **options)
        assert loss.isfinite().all()
        keys["key_labels"][place] = 0


@pytest.mark.parametrize("dtype", [torch.float64, *TILED_DTYPES], ids=str)
def test_a_bound_of_nan_gives_nan_for_its_anchor_only(dtype: torch.dtype) -> None:
    problem = ContrastProblem.random(20, 8, classes=2, ignored=False, reduction="none")
    bounds = torch.full((20,), 0.5)
    bounds[4] = math.nan
    loss, _ = calls.patch_contrast(
        problem.anchors.to(dtype), problem.labels, problem.descriptors, max_positive_disparity=bounds, reduction="none"
    )
    assert torch.isnan(loss[4])
    assert torch.isfinite(loss[torch.arange(20) != 4]).all()


@every_path
def test_a_product_with_a_part_beyond_the_range_is_right_or_nan(dtype: torch.dtype, device: dict[str, Any]) -> None:
    """The sum is minus infinity in order, and stays there. As a negative, it must not count as a share of 0."""
    if dtype == torch.float16:
        return  # its products reach at most 4e9 a column
    far = 4e153 if dtype == torch.float64 else 6e18
    anchors, keys = torch.zeros(1, 40, dtype=dtype), torch.zeros(2, 40, dtype=dtype)
    anchors[0, :32], keys[1, :16], keys[1, 16:32] = far, -far, far  # the second product is 0, as the first is
    y, key_y = torch.tensor([0]), torch.tensor([0, 1])
    loss, _ = calls.patch_contrast(anchors, y, keys=keys, key_labels=key_y, reduction="none", temperature=1.0, **device)
    assert loss.isnan() or torch.allclose(loss.double(), torch.tensor(2.0).double().log())


@every_path
def test_negatives_of_minus_infinity_make_the_loss_nan(dtype: torch.dtype, device: dict[str, Any]) -> None:
    anchors, y, key_y = torch.ones(2, 8, dtype=dtype), torch.tensor([0, 1]), torch.tensor([0, 0, 1])
    keys = torch.zeros(3, 8, dtype=dtype)
    keys[2] = -math.inf  # the negative of the first anchor, the positive of the second
    loss, _ = calls.patch_contrast(anchors, y, keys=keys, key_labels=key_y, reduction="none", **device)
    assert loss.isnan().tolist() == [True, False]
    assert loss[1] == math.inf
    loss, _ = calls.patch_contrast(
        anchors, y, keys=keys, key_labels=key_y, reduction="none", negative_weight=0.0, **device
    )
    torch.testing.assert_close(loss[0].double(), torch.tensor(2.0).double().log())


@every_path
def test_logits_at_the_lower_end_of_the_range_give_the_right_loss(dtype: torch.dtype, device: dict[str, Any]) -> None:
    """Pairs that do not count must still be below them."""
    if dtype == torch.float16:
        return
    lowest, y, key_y = -1.0 * 2.0 ** (1023 if dtype == torch.float64 else 127), torch.tensor([0]), torch.arange(9) % 2
    anchors, keys = torch.zeros(1, 8, dtype=dtype), torch.zeros(9, 8, dtype=dtype)
    anchors[0, 0], keys[:, 0] = 1, lowest
    key_y[5:] = -1
    loss, _ = calls.patch_contrast(anchors, y, keys=keys, key_labels=key_y, reduction="none", temperature=1.0, **device)
    torch.testing.assert_close(loss.double(), torch.tensor([math.log(5)]).double(), rtol=1e-6, atol=0)


def test_weights_that_float16_holds_by_their_scale_are_right() -> None:
    """Weights of pairs are rounded to float16, so the largest coefficient scales them, whichever warp reads it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(100) % 2
    y[98:] = 2  # the one positive of each other: the weight of their pair is the whole coefficient
    z = (torch.randn(100, 8, generator=generator) / 50).half()
    upstream = torch.full((100,), 1e-3)
    upstream[99] = 4000.0  # read by the last warp; over a temperature of 0.05, 80000
    options = {"temperature": 0.05, "reduction": "none"}
    oracle = z.double().requires_grad_()
    want = reference.patch_contrast_loss(oracle, y, **options)
    (wanted,) = torch.autograd.grad(want, oracle, upstream.double())
    _, (grad,) = calls.patch_contrast(z, y, upstream=upstream, **options)
    torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=4e-3 * float(wanted.abs().max()))
    # Each of patches 0 and 2 is the other's whole share: a weight of twice the coefficient, just below a power of two.
    z = torch.zeros(4, 8).half()
    z[:, 0] = torch.tensor([4.0, -4, 4, -4])
    _, (grad,) = calls.patch_contrast(
        z, torch.tensor([0, 0, 1, 1]), temperature=1.0, reduction="sum", upstream=torch.tensor(1.9999)
    )
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize(("upstream", "valid", "temperature"), [(1e-8, 1, 1e-3), (0.16, 16384, 1.0)])
def test_float16_keeps_small_weights_at_a_small_upstream_gradient_and_over_many_anchors(
    upstream: float, valid: int, temperature: float
) -> None:
    """600 equal weights of 1.7e-8, less than the smallest number of float16."""
    anchor, keys, labels = torch.zeros(1, 8).half(), torch.zeros(601, 8).half(), torch.ones(601, dtype=torch.int64)
    anchor[0, 0] = keys[0, 1] = keys[1:, 2] = 1  # no products, so that all keys have the same share
    labels[0] = 0
    sides = Side(anchor, labels[:1].clone()), Side(keys, labels)
    with calls.device():
        x = contrast_arguments(*sides, temperature=temperature)
        out = calls.contrast_outputs(x)._replace(num_valid=torch.tensor(valid))
        grad, _ = calls.contrast_gradients(torch.tensor(upstream), out, x)
    want = upstream / valid / temperature * 600 / 601
    torch.testing.assert_close(
        grad[0, 1:3].double(), torch.tensor([-want, want], dtype=torch.float64), rtol=0, atol=1e-7
    )


@every_path
def test_gradients_are_no_nan_where_upstream_gradient_and_temperature_overflow_together(
    dtype: torch.dtype, device: dict[str, Any]
) -> None:
    keys = padded([[1.0, 1, 0], [1, 0, 1]], dtype)  # of the same product with the anchor
    options = {"keys": keys, "key_labels": torch.tensor([0, 1]), "reduction": "none"}
    options |= {"upstream": torch.tensor([1e30]), "temperature": 1e-18}
    _, grads = calls.patch_contrast(padded([[1.0]], dtype), torch.tensor([0]), **options, **device)
    largest = math.inf if dtype != torch.float64 else 5e47
    want = torch.tensor([0, -largest, largest], dtype=torch.float64)
    torch.testing.assert_close(grads[0][0, :3].double(), want, rtol=1e-6, atol=0)


@every_path
@pytest.mark.parametrize("depth", [8, 264], ids=["short", "long"])
def test_gradients_are_no_nan_at_an_upstream_gradient_near_the_largest_number(
    dtype: torch.dtype, device: dict[str, Any], depth: int
) -> None:
    """Gradients are right, or infinite where their dtype has no room for them, also when blocks leave parts of them."""
    temperature = 0.1 if depth == 8 else 0.02  # numbers of long rows are small
    problem = ContrastProblem.random(20, depth, m=300, temperature=temperature, negative_weight=3.0, reduction="none")
    problem = problem.cast(dtype)
    largest = torch.finfo(dtype).max
    upstream = torch.linspace(-1, 1, 20, dtype=torch.float64).pow(3)  # of both signs and many sizes
    upstream *= 1.7e308 if dtype == torch.float64 else 3e38
    oracle = problem.cast(torch.float64)
    part = 1e-4  # of the gradients, for which float64 has room
    want = oracle.gradients(oracle.loss(reference.patch_contrast_loss), upstream * part)
    _, got = calls.patch_contrast(
        problem.anchors.detach(),
        problem.labels,
        problem.descriptors,
        keys=problem.keys.detach(),
        key_labels=problem.key_labels,
        key_descriptors=problem.key_descriptors,
        upstream=upstream,
        **problem.options,
        **device,
    )
    for ours, right in zip(got, want, strict=True):
        assert not ours.isnan().any()
        error = (TOLERANCE[dtype] + (TF32 if "allow_tf32" in device else 0)) * right.abs().max()
        fits, beyond = right.abs() + error < largest * part, right.abs() - error > largest * part
        assert beyond.any()
        assert torch.equal(ours[beyond].double(), math.inf * right[beyond].sign())
        if dtype != torch.float16:  # of these numbers, float16 has no room for any that is larger than the error
            assert fits.any()
        torch.testing.assert_close(ours[fits].double() * part, right[fits], rtol=0, atol=float(error))


@every_path
def test_many_equal_terms_are_summed_without_drift(dtype: torch.dtype, device: dict[str, Any]) -> None:
    """Added one by one, 10000 equal terms would all be rounded to the same side, in float32 by 4e-5 of the sum."""
    count = 10000
    z = padded([[1.0]], dtype)
    keys = z.expand(count, -1) * 0.75
    keys[0] = keys[100] = z  # the only positive, and a negative: the largest logits
    labels = torch.ones(count, dtype=torch.int64)
    labels[0] = 0
    options = {"keys": keys, "key_labels": labels, "temperature": 0.7, "reduction": "none"}
    loss, _ = calls.patch_contrast(z, torch.tensor([0]), **options, **device)
    want = math.log(2 + (count - 2) * math.exp(-0.25 / 0.7))
    tolerance = 1e-11 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(loss.double(), torch.tensor([want], dtype=torch.float64), rtol=0, atol=tolerance)


def test_two_weights_in_one_lane_give_exact_gradients() -> None:
    """A weight of exactly 2 has a single bit; the anchor and both keys are in the first lane."""
    anchor, keys = torch.zeros(1, 8).bfloat16(), torch.zeros(2, 8).bfloat16()
    anchor[0, 0], keys[0, 0], keys[1, 0] = 16, -16, 16  # the positive has no share of the denominator
    _, grads = calls.patch_contrast(
        anchor,
        torch.tensor([0]),
        keys=keys,
        key_labels=torch.tensor([0, 1]),
        temperature=0.5,
        reduction="sum",
        upstream=torch.tensor(1.0),
    )
    assert grads[0][0, 0] == 64
    assert grads[1][:, 0].tolist() == [-32, 32]


@every_path
def test_gradients_near_the_end_of_the_range_are_right(dtype: torch.dtype, device: dict[str, Any]) -> None:
    if dtype in (torch.float16, torch.float64):
        return  # gradients of float16 end at 65504; float64 has a far wider range
    z = (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) / 8).to(dtype)
    y, upstream = torch.tensor([0, 0, 1, 1]), 2.0e38
    options = {"temperature": 1.0, "reduction": "sum"}
    _, (want,) = calls.patch_contrast(z, y, upstream=torch.tensor(1.0), **options, **device)
    _, (grad,) = calls.patch_contrast(z, y, upstream=torch.tensor(upstream), **options, **device)
    torch.testing.assert_close(grad / upstream, want, rtol=2e-2, atol=1e-3)


def test_positives_spread_beyond_the_range_give_the_right_loss() -> None:
    """The logits are finite. The sum of the distances of 60 positives from the highest leaves float32, the mean not."""
    z = torch.zeros(62, 8)
    z[0, 0], z[1, 0], z[2:, 0] = 1.0, 1e38, -1e38
    y = torch.zeros(62, dtype=torch.long)
    loss, _ = calls.patch_contrast(z[:1], y[:1], keys=z[1:], key_labels=y[1:], temperature=1.0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([2e38 * 60 / 61]), rtol=1e-5, atol=0)


def test_a_temperature_below_the_range_of_float32_gives_the_right_loss() -> None:
    z = torch.eye(4, 8) * 1e-20 + 1e-21
    y = torch.tensor([0, 0, 1, 1])
    loss, (grad,) = calls.patch_contrast(z, y, temperature=1e-40, reduction="none")
    oracle = z.double().requires_grad_()
    want = reference.patch_contrast_loss(oracle, y, temperature=1e-40, reduction="none")
    (wanted,) = torch.autograd.grad(want, oracle, torch.linspace(0.5, 1.5, 4).double())
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("device", [{}, {"capability": 75}], ids=str)
@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_an_ignored_infinite_key_gives_finite_gradients(dtype: torch.dtype, device: dict[str, Any]) -> None:
    """As many threads see the key as warps have met weights before it. It is ignored, so no gradient is NaN."""
    problem = ContrastProblem.random(64, 8, m=17 * 64, ignored=False, classes=2)
    anchors, keys, key_labels = problem.anchors.to(dtype), problem.keys.to(dtype), problem.key_labels.clone()
    for place in (16 * 32 + 5, 16 * 64 + 5):  # in float32 and in 16 bits
        keys[place], key_labels[place] = math.inf, -1
    _, grads = calls.patch_contrast(anchors, problem.labels, keys=keys, key_labels=key_labels, **device)
    assert all(grad.isfinite().all() for grad in grads)
