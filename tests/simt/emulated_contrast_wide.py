"""The contrastive loss of anchors whose logits leave the range of float32, which the last kernel computes again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pglcl_ext import reference
from tests.problems import ContrastProblem
from tests.simt import calls
from tests.simt.contrast_cases import PATHS, TILED_DTYPES


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
        for a, b in zip(got.double() * room, wanted * room, strict=True):  # rows differ in size
            torch.testing.assert_close(a, b, rtol=epsilon, atol=epsilon * float(b.abs().max()))


wide_path = pytest.mark.parametrize(
    ("dtype", "device"),
    [pair for pair in PATHS.values() if pair[0] in TILED_DTYPES],
    ids=[name for name, pair in PATHS.items() if pair[0] in TILED_DTYPES],
)


@wide_path
@pytest.mark.parametrize("m", [None, 11], ids=["self", "keys"])
@pytest.mark.parametrize("weight", [0.0, 30.0])
def test_wide_anchors_match_the_reference(
    dtype: torch.dtype, device: dict[str, Any], m: int | None, weight: float
) -> None:
    assert_wide_contrast(beyond_float32(m, temperature=2.0**-8, negative_weight=weight), dtype, **device)


@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_wide_anchors_chosen_by_rules_match_the_reference(dtype: torch.dtype) -> None:
    bounds = {"max_positive_disparity": 0.6, "min_negative_disparity": 0.1}
    assert_wide_contrast(beyond_float32(None, channels=3, temperature=0.01, **bounds), dtype)
    masks = {"positive_mask": torch.rand(13, 11) < 0.4, "negative_mask": torch.rand(13, 11) < 0.4}
    assert_wide_contrast(beyond_float32(11, temperature=0.01, **masks), dtype)


@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
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
        for a, b in zip(got.double(), right, strict=True):
            torch.testing.assert_close(a, b, rtol=epsilon, atol=epsilon * float(b.abs().max()))


@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
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
