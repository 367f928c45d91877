"""Tests of faults that the tests of emulated_kernels.py do not notice: only a test here notices a planted fault.

They run like those: ``pytest --emulated 80 tests/simt/emulated_edges.py``. All are small, so that `make mutants` can
run them against many faults.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pglcl_ext import reference
from pglcl_ext._library import allow_tf32, ops
from tests.problems import ContrastProblem, gaussian_problem
from tests.simt import calls, emulator
from tests.simt.emulated_kernels import PATHS, assert_contrast, inside

DTYPES = [torch.float32, torch.bfloat16]


def apart(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, but no two of them adjacent in memory."""
    return torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0]


# --- the loss: host code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_inputs_of_any_strides(dtype: torch.dtype) -> None:
    bounds = {"max_positive_disparity": torch.rand(9) / 2 + 0.2, "min_negative_disparity": torch.rand(9) / 3}
    problem = ContrastProblem.random(9, 8, m=12, classes=2, **bounds)
    arguments = (problem.anchors.to(dtype), problem.labels, problem.descriptors)
    options = {"key_labels": problem.key_labels, "key_descriptors": problem.key_descriptors, **bounds}
    want, wanted = calls.patch_contrast(*arguments, keys=problem.keys.to(dtype), **options)
    got, grads = calls.patch_contrast(
        *map(apart, arguments), keys=apart(problem.keys.to(dtype)), **{k: apart(v) for k, v in options.items()}
    )
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("m", [None, 12], ids=["self", "keys"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_of_a_few_anchors(dtype: torch.dtype, m: int | None) -> None:
    bounds = {"max_positive_disparity": torch.rand(9) / 2 + 0.2, "min_negative_disparity": torch.rand(9) / 2}
    assert_contrast(ContrastProblem.random(9, 8, m=m, classes=2, ignored=False, **bounds), dtype)


@pytest.mark.parametrize("m", [None, 12], ids=["self", "keys"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_of_a_few_anchors(dtype: torch.dtype, m: int | None) -> None:
    options = {"max_positive_disparity": 0.4, "min_negative_disparity": 0.3}
    assert_contrast(ContrastProblem.random(9, 8, m=m, channels=3, **options), dtype)


def test_gradient_of_the_sum_of_losses() -> None:
    problem = ContrastProblem.random(9, 8, classes=2, ignored=False).cast(torch.float32)
    expanded = torch.tensor(1.5).expand(9)
    _, (grad,) = calls.patch_contrast(problem.anchors, problem.labels, reduction="none", upstream=expanded)
    _, (want,) = calls.patch_contrast(problem.anchors, problem.labels, reduction="none", upstream=expanded.clone())
    assert torch.equal(grad, want)


def raw_arguments(z: torch.Tensor, y: torch.Tensor, temperature: float = 0.1, weight: float = 1.0) -> tuple[Any, ...]:
    """The arguments of ops.patch_contrast for a mean, without keys or descriptors."""
    return (z, y, None, None, None, *[None] * 5, temperature, math.inf, 0.0, weight, -1, -1, 1, allow_tf32())


def test_backward_takes_saved_outputs_of_any_strides_and_gives_no_gradient_of_keys_that_are_anchors() -> None:
    z, y = torch.randn(9, 8), torch.randint(0, 2, (9,))
    arguments = raw_arguments(z, y)
    _, max_logit, log_sum, _, num_positives, num_valid = ops.patch_contrast(*arguments)
    saved = (torch.tensor(1.0), max_logit, log_sum, num_positives, num_valid)
    strided = (saved[0], *map(apart, saved[1:4]), num_valid)
    want, of_keys = ops.patch_contrast_backward(*saved, *arguments, True, True)
    got, _ = ops.patch_contrast_backward(*strided, *arguments, True, False)
    assert of_keys.shape == (0,)
    assert torch.equal(got, want)


def test_rows_are_copied_only_where_vectors_need_it() -> None:
    z, y = torch.randn(10, 8).bfloat16(), torch.randint(0, 2, (10,))
    moved = torch.cat([z.flatten()[:1], z.flatten()])[1:].view(10, 8)
    odd = torch.randn(10, 7).double()
    for rows, copies in ((z, set()), (moved, {"aten::clone"}), (odd, set()), (odd.float(), {"aten::constant_pad_nd"})):
        emulator.take_launches()
        asked, _ = inside("patch_contrast", lambda rows=rows: ops.patch_contrast(*raw_arguments(rows, y)))
        assert set(asked) & {"aten::clone", "aten::constant_pad_nd"} == copies
        kernel = {2: "contrast_forward_mma", 4: "contrast_forward_tiles", 8: "contrast_forward_plain"}
        assert emulator.take_launches()[0] == kernel[rows.element_size()]


# --- the loss: kernels ------------------------------------------------------------------------------------------------

every_path = pytest.mark.parametrize(("dtype", "device"), PATHS.values(), ids=PATHS)


@every_path
def test_what_the_forward_pass_says_of_each_anchor(dtype: torch.dtype, device: dict[str, Any]) -> None:
    z = (torch.randn(12, 8, generator=torch.Generator().manual_seed(1)) / 3).to(dtype)
    y = torch.tensor([0, 0, 0, 1, 1, 2, -1, 0, 1, 3, 3, -1])  # 5 has no positive, 6 and 11 have no pair
    temperature, weight = 0.5, 3.0
    with calls.device(**device):
        out = ops.patch_contrast(*raw_arguments(z, y, temperature, weight))
    _, max_logit, log_sum, positive_logit, num_positives, num_valid = (t.double() for t in out)
    counts = (y != -1)[:, None] & (y != -1) & ~torch.eye(12, dtype=torch.bool)
    positive, negative = counts & (y[:, None] == y), counts & (y[:, None] != y)
    logits = z.double() @ z.double().T / temperature
    close = {"rtol": 0, "atol": 4e-3 if device.get("allow_tf32") else 1e-5}
    torch.testing.assert_close(max_logit, logits.masked_fill(~counts, -math.inf).max(1).values, **close)
    logits = torch.where(negative, logits + math.log(weight), logits).masked_fill(~counts, -math.inf)
    torch.testing.assert_close((max_logit + log_sum).exp(), logits.exp().sum(1), rtol=1e-2, atol=0)
    mean = torch.where(positive, logits, 0).sum(1) / positive.sum(1).clamp(min=1)
    torch.testing.assert_close(positive_logit, mean, **close)
    assert num_positives.tolist() == positive.sum(1).tolist()
    assert int(num_valid) == int((positive.sum(1) > 0).sum())


@every_path
def test_no_share_is_above_one_whatever_the_rounding(dtype: torch.dtype, device: dict[str, Any]) -> None:
    """A product in the backward pass that exceeds the largest one of the forward pass counts as the largest."""
    z, y = torch.eye(2, 8).to(dtype) + 0.5, torch.tensor([0, 0])
    with calls.device(**device):
        arguments = raw_arguments(z, y)
        _, max_logit, log_sum, _, num_positives, num_valid = ops.patch_contrast(*arguments)
        saved = (torch.ones((), dtype=log_sum.dtype), max_logit - 0.5, log_sum, num_positives, num_valid)
        grad, _ = ops.patch_contrast_backward(*saved, *arguments, True, False)
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
def test_descriptors_whose_difference_overflows(dtype: torch.dtype, device: dict[str, Any], sign: int) -> None:
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_descriptors_that_are_no_numbers_of_long_rows(dtype: torch.dtype, channels: int, place: int) -> None:
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


def with_own_keys(
    z: torch.Tensor, y: torch.Tensor, rows: slice, bound: float | torch.Tensor = math.inf
) -> tuple[Any, ...]:
    """The arguments of ops.patch_contrast for anchors that are among the keys, with a loss for each anchor."""
    bounds = bound if isinstance(bound, torch.Tensor) else None
    scalar = math.inf if bounds is not None else bound
    arguments = (z[rows].contiguous(), y[rows].contiguous(), None, z, y, None, bounds, None, None, None)
    return (*arguments, 0.1, scalar, 0.0, 1.0, -1, rows.start, 0, allow_tf32())


@every_path
def test_gradients_of_anchors_that_are_later_keys(dtype: torch.dtype, device: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(80, 8, generator=generator), dim=1).to(dtype)
    y, rows = torch.randint(0, 3, (80,), generator=generator), slice(70, 78)
    with calls.device(**device):
        arguments = with_own_keys(z, y, rows)
        losses, max_logit, log_sum, _, num_positives, num_valid = ops.patch_contrast(*arguments)
        saved = (torch.ones_like(losses), max_logit, log_sum, num_positives, num_valid)
        grads = ops.patch_contrast_backward(*saved, *arguments, True, True)
    anchors, keys = z[rows].double().requires_grad_(), z.double().requires_grad_()
    others = torch.arange(80) != torch.arange(80)[rows, None]
    masks = {"positive_mask": (y[rows, None] == y) & others, "negative_mask": y[rows, None] != y}
    want = reference.patch_contrast_loss(anchors, y[rows], keys=keys, key_labels=y, reduction="none", **masks)
    tolerance = 4e-3 if device.get("allow_tf32") else {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    torch.testing.assert_close(losses.double(), want, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(grads, torch.autograd.grad(want.sum(), (anchors, keys)), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


@every_path
def test_an_anchor_that_has_only_itself_among_later_keys(dtype: torch.dtype, device: dict[str, Any]) -> None:
    z, y = torch.randn(6, 8).to(dtype), torch.tensor([-1, -1, -1, 0, -1, -1])
    unknown = torch.tensor([math.nan], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with calls.device(**device):
        losses, *_ = ops.patch_contrast(*with_own_keys(z, y, slice(3, 4), unknown))
    assert losses.tolist() == [0.0]


@every_path
def test_a_product_of_which_a_part_leaves_the_range(dtype: torch.dtype, device: dict[str, Any]) -> None:
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
def test_negatives_of_minus_infinity_make_the_loss_no_number(dtype: torch.dtype, device: dict[str, Any]) -> None:
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
def test_logits_at_the_lower_end_of_the_range(dtype: torch.dtype, device: dict[str, Any]) -> None:
    """Pairs that do not count must still be below them."""
    if dtype == torch.float16:
        return
    lowest, y, key_y = -1.0 * 2.0 ** (1023 if dtype == torch.float64 else 127), torch.tensor([0]), torch.arange(9) % 2
    anchors, keys = torch.zeros(1, 8, dtype=dtype), torch.zeros(9, 8, dtype=dtype)
    anchors[0, 0], keys[:, 0] = 1, lowest
    key_y[5:] = -1
    loss, _ = calls.patch_contrast(anchors, y, keys=keys, key_labels=key_y, reduction="none", temperature=1.0, **device)
    torch.testing.assert_close(loss.double(), torch.tensor([math.log(5)]).double(), rtol=1e-6, atol=0)


def test_weights_that_float16_holds_by_their_scale() -> None:
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


# --- the loss: anchors whose logits leave the range of float32 --------------------------------------------------------


def beyond_float32(m: int | None, **options: Any) -> ContrastProblem:
    """Rows of 2^62, every third of which has a length of about 1: some anchors are wide, the others moderate."""
    problem = ContrastProblem.random(13, 8, m=m, classes=3, reduction="none", **options)
    for rows in (problem.anchors, problem.keys):
        if rows is not None:
            rows.mul_(2.0**62)
            rows[::3].div_(2.0**62)
    return problem


def assert_wide_contrast(problem: ContrastProblem, dtype: torch.dtype, **device: Any) -> None:
    """Compares with float64 on the same numbers: right, or infinite where the type cannot hold the value."""
    p = problem.cast(dtype)
    options = {"reduction": "none", **p.options}
    if p.keys is not None:
        options.update(keys=p.keys.detach(), key_labels=p.key_labels, key_descriptors=p.key_descriptors)
    loss, grads = calls.patch_contrast(p.anchors.detach(), p.labels, p.descriptors, **options, **device)
    oracle = p.cast(torch.float64)
    want = oracle.loss(reference.patch_contrast_loss)
    largest = torch.finfo(torch.float32).max
    assert (want > largest).any()
    rounding = 2e-3 if device.get("allow_tf32") else 1e-5  # of moderate anchors, whose products are TF32
    torch.testing.assert_close(loss.double(), want.where(want <= largest, math.inf), rtol=rounding, atol=rounding)
    epsilon = 4 * max(torch.finfo(dtype).eps, rounding)
    for got, wanted in zip(grads, oracle.gradients(want, torch.linspace(0.5, 1.5, 13).double()), strict=True):
        room = wanted.abs() < torch.finfo(dtype).max
        assert got[~room].isinf().all()
        for a, b in zip(got.double() * room, wanted * room):  # rows differ in size
            torch.testing.assert_close(a, b, rtol=epsilon, atol=epsilon * float(b.abs().max()))


wide_path = pytest.mark.parametrize(
    ("dtype", "device"),
    [pair for pair in PATHS.values() if pair[0] in DTYPES],
    ids=[name for name, pair in PATHS.items() if pair[0] in DTYPES],
)


@wide_path
@pytest.mark.parametrize("m", [None, 11], ids=["self", "keys"])
@pytest.mark.parametrize("weight", [0.0, 30.0])
def test_wide_anchors(dtype: torch.dtype, device: dict[str, Any], m: int | None, weight: float) -> None:
    assert_wide_contrast(beyond_float32(m, temperature=2.0**-8, negative_weight=weight), dtype, **device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_anchors_by_rules(dtype: torch.dtype) -> None:
    bounds = {"max_positive_disparity": 0.6, "min_negative_disparity": 0.1}
    assert_wide_contrast(beyond_float32(None, channels=3, temperature=0.01, **bounds), dtype)
    masks = {"positive_mask": torch.rand(13, 11) < 0.4, "negative_mask": torch.rand(13, 11) < 0.4}
    assert_wide_contrast(beyond_float32(11, temperature=0.01, **masks), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_anchors_behind_the_first_warp(dtype: torch.dtype) -> None:
    """More anchors than rows in a block of the last kernel, keys split over blocks, and rows of over 32 columns."""
    problem = ContrastProblem.random(140, 40, m=300, classes=3, temperature=0.5, ignored=False, reduction="none")
    problem.anchors[[0, 33, 139]] *= 2.0**120
    problem.keys *= 2.0**10
    p = problem.cast(dtype)
    keys = {"keys": p.keys.detach(), "key_labels": p.key_labels, "key_descriptors": p.key_descriptors}
    loss, grads = calls.patch_contrast(
        p.anchors.detach(), p.labels, p.descriptors, **keys, **p.options, multiprocessors=60
    )
    oracle = p.cast(torch.float64)
    want = oracle.loss(reference.patch_contrast_loss)
    wanted = oracle.gradients(want, torch.linspace(0.5, 1.5, 140).double())
    torch.testing.assert_close(loss.double(), want.float().double(), rtol=1e-4, atol=1e-4)
    epsilon = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for got, right in zip(grads, wanted, strict=True):
        for a, b in zip(got.double(), right):
            torch.testing.assert_close(a, b, rtol=epsilon, atol=epsilon * float(b.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_of_negatives_of_a_wide_anchor(dtype: torch.dtype) -> None:
    """Its positive and its negative are the same vector, so their logits are equal, though beyond float32."""
    anchors, keys = torch.zeros(1, 8, dtype=dtype), torch.zeros(2, 8, dtype=dtype)
    anchors[0, 0], keys[:, 0] = 2.0**100, 2.0**40
    loss, grads = calls.patch_contrast(
        anchors,
        torch.tensor([0]),
        keys=keys,
        key_labels=torch.tensor([0, 1]),
        temperature=1.0,
        negative_weight=3.0,
        upstream=torch.tensor(1.0),
    )
    torch.testing.assert_close(loss, torch.tensor(4.0).log())
    assert grads[0].abs().max() < 2.0**40 * 1e-6  # the shares of two equal keys cancel
    torch.testing.assert_close(grads[1][:, 0].float() / 2.0**100, torch.tensor([-0.75, 0.75]), rtol=1e-2, atol=0)


def test_a_temperature_that_float32_has_no_room_for() -> None:
    z = torch.eye(4, 8) * 1e-20 + 1e-21
    y = torch.tensor([0, 0, 1, 1])
    loss, (grad,) = calls.patch_contrast(z, y, temperature=1e-40, reduction="none")
    oracle = z.double().requires_grad_()
    want = reference.patch_contrast_loss(oracle, y, temperature=1e-40, reduction="none")
    (wanted,) = torch.autograd.grad(want, oracle, torch.linspace(0.5, 1.5, 4).double())
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_the_spread_of_positives_leaves_the_range() -> None:
    """The logits are finite. The sum of the distances of 60 positives from the highest leaves float32, the mean not."""
    z = torch.zeros(62, 8)
    z[0, 0], z[1, 0], z[2:, 0] = 1.0, 1e38, -1e38
    y = torch.zeros(62, dtype=torch.long)
    loss, _ = calls.patch_contrast(z[:1], y[:1], keys=z[1:], key_labels=y[1:], temperature=1.0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([2e38 * 60 / 61]), rtol=1e-5, atol=0)


# --- the loss: which kernel, and what its launch asks for -------------------------------------------------------------


def launched(dtype: torch.dtype, n: int, m: int, depth: int, **device: int) -> dict[str, int]:
    """Checks a forward and a backward pass. Returns their kernels, and the number of blocks of each in y."""
    emulator.take_launches()
    assert_contrast(ContrastProblem.random(n, depth, m=m, classes=2), dtype, **device)
    blocks: dict[str, int] = {}
    for name, _, y in emulator.take_grids():
        blocks[name] = max(y, blocks.get(name, 0))
    return blocks


# Bytes that one stage takes for 16 columns in float32, and for up to 128 in 16 bits (the backward pass).
ONE_STAGE = {torch.float32: 18256, torch.bfloat16: 28736}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_stage_where_two_do_not_fit(dtype: torch.dtype) -> None:
    kind = "tiles" if dtype == torch.float32 else "mma"
    for n, m in ((5, 9), (5, 0), (70, 100)):
        kernels = launched(dtype, n, m, 16, shared_bytes=ONE_STAGE[dtype])
        assert [f"contrast_{way}_{kind}" in kernels for way in ("forward", "backward")] == [True, True]
    kernels = launched(dtype, 5, 9, 16, shared_bytes=ONE_STAGE[dtype] - 1)
    assert "contrast_forward_plain" in kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_48_kib_are_asked_for(dtype: torch.dtype) -> None:
    kernels = launched(dtype, 3, 4, 256)
    assert "contrast_forward_plain" not in kernels  # nor are rows of 256 long ones
    assert_contrast(ContrastProblem.random(3, 256, m=4, channels=3, max_positive_disparity=0.4), dtype)


def test_keys_are_shared_out_four_tiles_to_a_block() -> None:
    for m, parts in ((20, 1), (300, 1), (512, 2)):
        kernels = launched(torch.bfloat16, 3, m, 8, multiprocessors=2)
        assert kernels["contrast_forward_mma"] == parts


def test_rows_that_begin_at_16_bytes_are_not_copied() -> None:
    problem = ContrastProblem.random(5, 8).cast(torch.float32)
    called, _ = inside("patch_contrast", lambda: problem.loss())
    assert "aten::clone" not in called


@pytest.mark.parametrize(("depth", "kernel"), [(4, "mma"), (128, "mma"), (132, "mma"), (256, "mma"), (260, "tiles")])
def test_tf32_keeps_products_of_rows_up_to_256_in_registers(depth: int, kernel: str) -> None:
    for channels in (1, 3):
        problem = ContrastProblem.random(70, depth, m=37, channels=channels, classes=3, max_positive_disparity=0.4)
        emulator.take_launches()
        assert_contrast(problem, torch.float32, allow_tf32=True)
        ways = ("forward", "backward", "backward")
        assert [n for n in emulator.take_launches() if "ward" in n] == [f"contrast_{way}_{kernel}" for way in ways]


def test_tf32_rows_are_shared_out_among_blocks() -> None:
    problem = ContrastProblem.random(70, 16, m=300, classes=3, max_positive_disparity=0.5)
    emulator.take_grids()
    assert_contrast(problem, torch.float32, allow_tf32=True, multiprocessors=6)
    assert all(y == 2 for name, _, y in emulator.take_grids() if "forward_mma" in name)


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_rows_that_do_not_fit_pass_in_chunks(allow_tf32: bool) -> None:
    """64 KiB, as on sm_75, have no room for rows of 240 in float32, and room for chunks of 128."""
    blocks = launched(torch.float32, 70, 40, 240, shared_bytes=64 * 1024, allow_tf32=allow_tf32)
    assert blocks["contrast_backward_tiles"] == 2  # of 128 and 112
    assert "contrast_forward_tiles" in blocks


@pytest.mark.parametrize("device", [{}, {"allow_tf32": True}, {"capability": 75}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_of_more_than_31_bits(dtype: torch.dtype, device: dict[str, Any]) -> None:
    """Some are alike in 32 bits, some are those of no anchor, and some are what others are coded as in a block."""
    names = torch.tensor([5, 5 + 2**32, 2**30 - 1, 2**30, 2**30 + 1, -(2**30), -(2**30) - 1, 2**62, -(2**63)])
    p = ContrastProblem.random(70, 8, m=81, max_positive_disparity=0.6)
    p.labels, p.key_labels = names[torch.arange(70) % 7], names[torch.arange(81) % 9]
    assert_contrast(p, dtype, **device)
    p.keys = p.key_labels = p.key_descriptors = None
    assert_contrast(p, dtype, **device)


def test_long_rows_where_no_chunk_fits() -> None:
    kernels = launched(torch.float32, 3, 4, 300, shared_bytes=16 * 1024)
    assert "contrast_forward_plain" in kernels


def test_columns_are_shared_out_from_two_times_four_tiles_on() -> None:
    kernels = launched(torch.bfloat16, 1, 512, 8, multiprocessors=2)
    assert kernels["contrast_forward_mma"] == 2
    for m, parts in ((255, 1), (256, 2)):  # tiles of 32 columns in the backward pass
        kernels = launched(torch.bfloat16, 3, m, 8, multiprocessors=2)
        assert kernels["contrast_backward_mma"] == parts


def test_columns_of_rows_longer_than_128_are_not_shared_out() -> None:
    kernels = launched(torch.bfloat16, 3, 300, 136, multiprocessors=6)
    assert kernels["contrast_backward_mma"] == 1


def test_parts_of_more_anchors_than_keys() -> None:
    kernels = launched(torch.bfloat16, 300, 280, 8, multiprocessors=60)
    assert kernels["contrast_backward_mma"] > 1


def test_weights_of_two_in_one_lane() -> None:
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


def test_anchors_whose_warp_is_not_the_first() -> None:
    for dtype in DTYPES:
        problem = ContrastProblem.random(12, 8, ignored=False)
        problem.labels[:9] = -1
        problem.labels[9:] = torch.tensor([0, 0, 1])
        assert_contrast(problem, dtype)


def test_a_key_that_is_no_number_behind_many_tiles() -> None:
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


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_embeddings_of_no_depth_and_no_anchors(dtype: torch.dtype) -> None:
    y = torch.tensor([0, 0, 1, 1, 1])
    loss, (grad,) = calls.patch_contrast(torch.empty(5, 0, dtype=dtype), y)
    torch.testing.assert_close(loss.double(), torch.tensor(4.0).double().log(), rtol=1e-6, atol=0)
    assert grad.shape == (5, 0)
    keys = {"keys": torch.randn(5, 8).to(dtype), "key_labels": y}
    loss, grads = calls.patch_contrast(torch.empty(0, 8, dtype=dtype), y[:0], **keys)
    assert loss == 0
    assert torch.equal(grads[1], torch.zeros(5, 8, dtype=dtype))


@every_path
def test_gradients_near_the_end_of_the_range(dtype: torch.dtype, device: dict[str, Any]) -> None:
    if dtype in (torch.float16, torch.float64):
        return  # gradients of float16 end at 65504; float64 has a far wider range
    z = (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) / 8).to(dtype)
    y, upstream = torch.tensor([0, 0, 1, 1]), 2.0e38
    options = {"temperature": 1.0, "reduction": "sum"}
    _, (want,) = calls.patch_contrast(z, y, upstream=torch.tensor(1.0), **options, **device)
    _, (grad,) = calls.patch_contrast(z, y, upstream=torch.tensor(upstream), **options, **device)
    torch.testing.assert_close(grad / upstream, want, rtol=2e-2, atol=1e-3)


# --- the Gaussian loss ------------------------------------------------------------------------------------------------


def test_gaussian_rows_that_do_not_fit() -> None:
    anchors, *rest = gaussian_problem(3, 200)
    rest = [rest[0], *(t.float() for t in rest[1:3]), rest[3]]
    calls.gaussian_contrast(anchors.float(), *rest, shared_bytes=11 * 1024)
    with pytest.raises(RuntimeError, match="fit the shared memory of the GPU, 11264 bytes, ten times; got rows of 200"):
        calls.gaussian_contrast(anchors, *rest, shared_bytes=11 * 1024)


def test_gaussian_rows_that_take_all_shared_memory() -> None:
    """The kernel that computes in float64 what float32 had no room for asks for more than 48 KiB here."""
    anchors, *rest = gaussian_problem(2, 2048)
    want = reference.gaussian_contrast_loss(anchors, *rest, reduction="none")
    loss, _, _ = calls.gaussian_contrast(anchors.float(), *rest, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pairwise", [False, True])
def test_gaussian_blocks_of_fewer_rows(pairwise: bool) -> None:
    anchors, *rest = gaussian_problem(7, 40, pairwise=pairwise)
    want = reference.gaussian_contrast_loss(anchors, *rest, reduction="none")
    # Eight anchors, and products and gradients of three; in float32.
    loss, _, _ = calls.gaussian_contrast(anchors.float(), *rest, shared_bytes=14 * 160 + 272, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-4)


def test_gaussian_logits_far_below_zero() -> None:
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


def test_gaussian_exponents_of_which_a_part_leaves_the_range() -> None:
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


def test_gaussian_rows_of_more_than_48_kib() -> None:
    anchors, labels, *tables = gaussian_problem(1, 264, classes=1)
    loss, _, _ = calls.gaussian_contrast(anchors, labels * 0, *tables)
    torch.testing.assert_close(loss, reference.gaussian_contrast_loss(anchors, labels * 0, *tables))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairwise", [False, True])
def test_gaussian_anchors_beyond_float32(pairwise: bool, dtype: torch.dtype) -> None:
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
    for a, b in zip(gradients.double(), wanted.float().double()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b[b.isfinite()].abs().max()))


def test_gaussian_gradients_alone_beyond_float32() -> None:
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


def test_gaussian_weight_and_covariances_at_the_end_of_the_range() -> None:
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


# --- patch statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 9])
@pytest.mark.parametrize("patch", [(12, 3), (40, 1), (4, 11), (12, 12)], ids=str)
def test_patches_whose_width_does_not_divide_a_warp(patch: tuple[int, int], classes: int) -> None:
    """Lanes go over them in steps of 32 pixels, or of groups of four: several rows, and a rest."""
    x = torch.randn(1, classes, *patch)
    got, _ = calls.patch_statistics(x, list(patch), list(patch), None, probabilities=False, normalize=False)
    for a, b in zip(got, reference.patch_statistics(x.double(), patch, patch), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_entropy_is_at_most_one_where_it_is_normalized() -> None:
    """With rounding, the logarithm of the number of classes divided by itself may exceed 1."""
    for classes in (2, 6, 36):
        (h, _, of_classes), _ = calls.patch_statistics(
            torch.zeros(1, classes, 1, 2), [1, 2], [1, 2], None, probabilities=False, normalize=True
        )
        assert h.max() <= 1
        assert of_classes.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [3, 11])
def test_statistics_of_logits_of_minus_infinity(classes: int, dtype: torch.dtype) -> None:
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
def test_statistics_of_a_pixel_without_probabilities(classes: int) -> None:
    for bad, which in ((-math.inf, slice(None)), (math.inf, 0), (math.inf, 1), (math.nan, 0), (math.nan, classes - 1)):
        x = torch.randn(1, classes, 2, 6)
        x[0, which, 1, 1] = bad
        for t in calls.patch_statistics(x, [2, 3], [2, 3], None)[0]:
            assert t[..., 0].isnan().all()
            assert t[..., 1].isfinite().all()


# --- bounds of disparity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("positives", [True, False])
def test_bounds_to_the_last_bit(positives: bool, channels: int, dtype: torch.dtype) -> None:
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
