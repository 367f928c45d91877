"""The kernels of the contrastive loss: options, sizes, devices and layouts, against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pglcl_ext import reference
from pglcl_ext._arguments import ContrastOutputs, Side
from tests.problems import DTYPES, TOLERANCE, ContrastProblem, contrast_arguments
from tests.simt import calls, emulator
from tests.simt.contrast_cases import (
    OPTIONS,
    TILED_DTYPES,
    assert_contrast,
    assert_own_keys,
    every_path,
    with_own_keys,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [None, 70], ids=["self", "keys"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_matches_the_reference(name: str, m: int | None, dtype: torch.dtype) -> None:
    assert_contrast(ContrastProblem.random(67, 24, m=m, classes=3, **OPTIONS[name]), dtype)


@pytest.mark.parametrize("n", [1, 2, 31, 33, 127, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_that_do_not_divide_tiles(n: int, dtype: torch.dtype) -> None:
    assert_contrast(ContrastProblem.random(n, 16, classes=2, max_positive_disparity=0.6), dtype)
    assert_contrast(ContrastProblem.random(33, 8, m=n, classes=2), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [1, 8, 20, 64, 136, 256])
def test_every_depth_matches_the_reference(depth: int, dtype: torch.dtype) -> None:
    assert_contrast(ContrastProblem.random(35, depth, m=66, classes=2), dtype)


@pytest.mark.parametrize("device", [{"capability": 75}, {}, {"allow_tf32": True}], ids=["sm_75", "sm_80", "TF32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("depth", "n", "m"), [(257, 35, None), (300, 34, 40), (512, 5, 33)])
def test_rows_that_pass_in_chunks_match_the_reference(
    depth: int, n: int, m: int | None, dtype: torch.dtype, device: dict[str, Any]
) -> None:
    emulator.take_launches()
    assert_contrast(ContrastProblem.random(n, depth, m=m, classes=2, max_positive_disparity=0.6), dtype, **device)
    assert not [name for name in emulator.take_launches() if "plain" in name]


def test_masks_and_channels_of_rows_in_chunks_match_the_reference() -> None:
    problem = ContrastProblem.random(33, 260, m=20)
    problem.options = {"positive_mask": torch.rand(33, 20) < 0.3, "negative_mask": torch.rand(33, 20) < 0.5}
    assert_contrast(problem, torch.float32)
    assert_contrast(ContrastProblem.random(20, 260, channels=3, max_positive_disparity=0.4), torch.bfloat16)


def test_a_depth_of_2048_matches_the_reference() -> None:
    assert_contrast(ContrastProblem.random(6, 2048, classes=2), torch.bfloat16)


def test_the_plain_kernel_beyond_one_chunk_matches_the_reference() -> None:
    assert_contrast(ContrastProblem.random(6, 1100, classes=2), torch.float64)


@pytest.mark.parametrize(
    "device",
    [
        {"capability": 75, "shared_bytes": 64 * 1024},
        {"capability": 86, "shared_bytes": 99 * 1024},
        {"capability": 80, "allow_tf32": True},
        {"capability": 80, "shared_bytes": 60 * 1024},
    ],
    ids=["sm_75", "sm_86", "TF32", "one stage"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_capability_matches_the_reference(dtype: torch.dtype, device: dict[str, Any]) -> None:
    for m in (None, 100):
        assert_contrast(ContrastProblem.random(70, 96, m=m, max_positive_disparity=0.5), dtype, **device)


def test_bounds_per_anchor_channels_and_masks_match_the_reference() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for m in (None, 50):
            problem = ContrastProblem.random(40, 8, m=m)
            problem.options = {"max_positive_disparity": torch.rand(40), "min_negative_disparity": torch.rand(40) / 2}
            assert_contrast(problem, dtype)
            assert_contrast(ContrastProblem.random(40, 8, m=m, channels=3, max_positive_disparity=0.4), dtype)
            problem = ContrastProblem.random(40, 8, m=m)
            shape = (40, m or 40)
            problem.options = {
                "positive_mask": (torch.rand(shape[::-1]) < 0.2).t(),
                "negative_mask": torch.rand(shape) < 0.5,
            }
            assert_contrast(problem, dtype)


@pytest.mark.parametrize("m", [None, 12], ids=["self", "keys"])
@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_bounds_of_a_few_anchors_match_the_reference(dtype: torch.dtype, m: int | None) -> None:
    bounds = {"max_positive_disparity": torch.rand(9) / 2 + 0.2, "min_negative_disparity": torch.rand(9) / 2}
    assert_contrast(ContrastProblem.random(9, 8, m=m, classes=2, ignored=False, **bounds), dtype)


@pytest.mark.parametrize("m", [None, 12], ids=["self", "keys"])
@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_channels_of_a_few_anchors_match_the_reference(dtype: torch.dtype, m: int | None) -> None:
    options = {"max_positive_disparity": 0.4, "min_negative_disparity": 0.3}
    assert_contrast(ContrastProblem.random(9, 8, m=m, channels=3, **options), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nothing_to_contrast_gives_a_loss_of_0(dtype: torch.dtype) -> None:
    for n, m, label in ((0, None, 0), (5, 0, 0), (40, None, -1), (1, None, 0)):
        keys = {} if m is None else {"keys": torch.randn(m, 8, dtype=dtype), "key_labels": torch.zeros(m).long()}
        loss, grads = calls.patch_contrast(
            torch.randn(n, 8, dtype=dtype), torch.full((n,), label), reduction="mean", **keys
        )
        assert loss.item() == 0
        assert all(torch.all(g == 0) for g in grads)


@pytest.mark.parametrize("dtype", [torch.float64, *TILED_DTYPES], ids=str)
def test_embeddings_of_size_0_and_no_anchors_give_the_right_loss(dtype: torch.dtype) -> None:
    y = torch.tensor([0, 0, 1, 1, 1])
    loss, (grad,) = calls.patch_contrast(torch.empty(5, 0, dtype=dtype), y)
    torch.testing.assert_close(loss.double(), torch.tensor(4.0).double().log(), rtol=1e-6, atol=0)
    assert grad.shape == (5, 0)
    keys = {"keys": torch.randn(5, 8).to(dtype), "key_labels": y}
    loss, grads = calls.patch_contrast(torch.empty(0, 8, dtype=dtype), y[:0], **keys)
    assert loss == 0
    assert torch.equal(grads[1], torch.zeros(5, 8, dtype=dtype))


@pytest.mark.parametrize("n", [300, 600])
def test_the_reduction_takes_more_than_one_round(n: int) -> None:
    for reduction in ("mean", "sum", "none"):
        assert_contrast(ContrastProblem.random(n, 8, m=20, classes=2, reduction=reduction), torch.float32)


def test_an_expanded_upstream_gradient_is_read_like_a_contiguous_one() -> None:
    problem = ContrastProblem.random(9, 8, classes=2, ignored=False).cast(torch.float32)
    expanded = torch.tensor(1.5).expand(9)
    _, (grad,) = calls.patch_contrast(problem.anchors, problem.labels, reduction="none", upstream=expanded)
    _, (want,) = calls.patch_contrast(problem.anchors, problem.labels, reduction="none", upstream=expanded.clone())
    assert torch.equal(grad, want)


@every_path
def test_masks_that_call_a_key_both_count_it_twice(dtype: torch.dtype, device: dict[str, Any]) -> None:
    problem = ContrastProblem.random(40, 8, m=70)
    both = torch.rand(40, 70) < 0.3
    problem.options = {
        "positive_mask": both | (torch.rand(40, 70) < 0.2),
        "negative_mask": both,
        "negative_weight": 3.0,
    }
    assert_contrast(problem, dtype, **device)


@every_path
def test_tiles_of_ignored_patches_add_nothing(dtype: torch.dtype, device: dict[str, Any]) -> None:
    problem = ContrastProblem.random(40, 8, ignored=False, reduction="sum")
    z = torch.nn.functional.pad(problem.anchors.to(dtype), (0, 0, 0, 100), value=math.nan)
    labels = torch.nn.functional.pad(problem.labels, (0, 100), value=-1)
    alone, (want,) = calls.patch_contrast(z[:40], problem.labels, reduction="sum", **device)
    loss, (grad,) = calls.patch_contrast(z, labels, reduction="sum", **device)
    torch.testing.assert_close(loss, alone, rtol=0, atol=0)
    assert torch.equal(grad[:40], want)
    assert torch.all(grad[40:] == 0)


def test_anchors_beyond_the_first_warp_match_the_reference() -> None:
    for dtype in TILED_DTYPES:
        problem = ContrastProblem.random(28, 8, ignored=False)
        problem.labels[:25] = -1
        problem.labels[25:] = torch.tensor([0, 0, 1])
        assert_contrast(problem, dtype)


@every_path
def test_the_outputs_of_each_anchor_equal_their_formulas(dtype: torch.dtype, device: dict[str, Any]) -> None:
    z = (torch.randn(12, 8, generator=torch.Generator().manual_seed(1)) / 3).to(dtype)
    y = torch.tensor([0, 0, 0, 1, 1, 2, -1, 0, 1, 3, 3, -1])  # 5 has no positive, 6 and 11 have no pair
    temperature, weight = 0.5, 3.0
    with calls.device(**device):
        x = contrast_arguments(Side(z, y), temperature=temperature, negative_weight=weight)
        out = ContrastOutputs(*(t.double() for t in calls.contrast_outputs(x)))
    counts = (y != -1)[:, None] & (y != -1) & ~torch.eye(12, dtype=torch.bool)
    positive, negative = counts & (y[:, None] == y), counts & (y[:, None] != y)
    logits = z.double() @ z.double().T / temperature
    close = {"rtol": 0, "atol": 4e-3 if device.get("allow_tf32") else 1e-5}
    torch.testing.assert_close(out.max_logit, logits.masked_fill(~counts, -math.inf).max(1).values, **close)
    logits = torch.where(negative, logits + math.log(weight), logits).masked_fill(~counts, -math.inf)
    torch.testing.assert_close((out.max_logit + out.log_sum).exp(), logits.exp().sum(1), rtol=1e-2, atol=0)
    mean = torch.where(positive, logits, 0).sum(1) / positive.sum(1).clamp(min=1)
    torch.testing.assert_close(out.positive_logit, mean, **close)
    assert out.num_positives.tolist() == positive.sum(1).tolist()
    assert int(out.num_valid) == int((positive.sum(1) > 0).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_anchor_that_is_a_later_key_matches_the_reference(dtype: torch.dtype) -> None:
    z = torch.nn.functional.normalize(torch.randn(90, 16, dtype=torch.float64), dim=1).to(dtype)
    y = torch.randint(0, 3, (90,))
    rows = slice(45, 75)
    losses = calls.contrast_outputs(with_own_keys(z, y, rows, allow_tf32=False)).loss
    whole = reference.patch_contrast_loss(z.double(), y, reduction="none")
    tolerance = 2 * TOLERANCE[dtype] + 1e-5 * (dtype != torch.float64)
    torch.testing.assert_close(losses.double(), whole[rows], rtol=tolerance, atol=tolerance)


@every_path
def test_gradients_of_anchors_that_are_later_keys_match_the_reference(
    dtype: torch.dtype, device: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(80, 8, generator=generator), dim=1).to(dtype)
    y, rows = torch.randint(0, 3, (80,), generator=generator), slice(70, 78)
    assert_own_keys(z, y, rows, **device)


@every_path
def test_an_anchor_with_only_itself_as_key_has_a_loss_of_0(dtype: torch.dtype, device: dict[str, Any]) -> None:
    z, y = torch.randn(6, 8).to(dtype), torch.tensor([-1, -1, -1, 0, -1, -1])
    unknown = torch.tensor([math.nan], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with calls.device(**device):
        out = calls.contrast_outputs(with_own_keys(z, y, slice(3, 4), unknown))
    assert out.loss.tolist() == [0.0]


@pytest.mark.parametrize("device", [{}, {"allow_tf32": True}, {"capability": 75}], ids=str)
@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_labels_of_more_than_31_bits_match_the_reference(dtype: torch.dtype, device: dict[str, Any]) -> None:
    """Some are alike in 32 bits, some are those of no anchor, and some are what others are coded as in a block."""
    names = torch.tensor([5, 5 + 2**32, 2**30 - 1, 2**30, 2**30 + 1, -(2**30), -(2**30) - 1, 2**62, -(2**63)])
    p = ContrastProblem.random(70, 8, m=81, max_positive_disparity=0.6)
    p.labels, p.key_labels = names[torch.arange(70) % 7], names[torch.arange(81) % 9]
    assert_contrast(p, dtype, **device)
    p.keys = p.key_labels = p.key_descriptors = None
    assert_contrast(p, dtype, **device)


def test_float32_is_not_truncated_to_tf32() -> None:
    problem = ContrastProblem.random(40, 32, temperature=0.1)
    exact, _ = calls.patch_contrast(problem.anchors, problem.labels)
    rounded, _ = calls.patch_contrast(problem.anchors.float(), problem.labels)
    tf32, _ = calls.patch_contrast(problem.anchors.float(), problem.labels, allow_tf32=True)
    truncated = (problem.anchors.float().view(torch.int32) & ~0x1FFF).view(torch.float32)
    cut, _ = calls.patch_contrast(truncated.double(), problem.labels)
    assert abs(rounded.double() - exact) < 2e-6 * exact
    assert abs(tf32.double() - exact) < 0.5 * abs(cut - exact)
