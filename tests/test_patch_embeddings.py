"""patch_embeddings against the sum patch by patch, and the selection of its rows."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from pglcl_ext import (
    CoverageThreshold,
    PatchBatch,
    PatchContrastLoss,
    PatchRows,
    class_patches,
    patch_embeddings,
    patch_statistics,
)


def direct(features: Tensor, weights: Tensor, patch: list[int], step: list[int]) -> list[tuple]:
    """method, section 8, patch by patch: (embedding, entropy, coverage, index) of every class of every patch."""
    rows = []
    cells = [range((s - p) // t + 1) for s, p, t in zip(features.shape[2:], patch, step, strict=True)]
    for b in range(len(features)):
        for cell in itertools.product(*cells):
            place = tuple(slice(c * t, c * t + p) for c, p, t in zip(cell, patch, step, strict=True))
            f, w = features[(b, slice(None), *place)].flatten(1), weights[(b, slice(None), *place)].flatten(1)
            h = -torch.special.xlogy(w, w).sum(dim=0)
            for k in range(len(w)):
                mass = w[k].sum()
                embedding = (f * w[k]).sum(dim=1) / mass if mass > 0 else torch.zeros(len(f), dtype=f.dtype)
                entropy = (h * w[k]).sum() / mass if mass > 0 else h.new_zeros(())
                rows.append((embedding, entropy, w[k].mean(), torch.tensor([b, *cell]), k))
    return rows


CASES = [((2, 3, 12, 13), [4, 4], None), ((1, 5, 11, 9), [5, 3], [2, 3]), ((2, 2, 6, 7, 8), [3, 2, 4], [2, 2, 4])]


@pytest.mark.parametrize(("shape", "patch", "step"), CASES)
def test_matches_the_sum_patch_by_patch(shape, patch: list[int], step: list[int] | None, device: torch.device) -> None:
    features = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(shape[0], 3, *shape[2:], dtype=torch.float64, device=device).mul(3).softmax(1)
    weights = torch.where(weights < 0.05, 0, weights)
    batch = patch_embeddings(features, weights, patch, step, coverage=0.3)
    rows = direct(features.cpu(), weights.cpu(), patch, step or patch)
    assert len(batch.labels) == len(rows)
    torch.testing.assert_close(batch.embeddings.cpu(), torch.stack([r[0] for r in rows]))
    torch.testing.assert_close(batch.entropy.cpu(), torch.stack([r[1] for r in rows]))
    torch.testing.assert_close(batch.coverage.cpu(), torch.stack([r[2] for r in rows]))
    assert torch.equal(batch.index.cpu(), torch.stack([r[3] for r in rows]))
    assert batch.labels.tolist() == [r[4] if r[2] > 0.3 else -1 for r in rows]
    compact = batch.compact()
    assert torch.equal(compact.labels, batch.labels[batch.labels >= 0])
    grads = torch.randn_like(batch.embeddings)
    (got,) = torch.autograd.grad(batch.embeddings, features, grads)
    (want,) = torch.autograd.grad(torch.stack([r[0] for r in rows]).to(device), features, grads)
    torch.testing.assert_close(got, want)


def test_entropy_is_that_of_the_prediction_if_one_is_given(device: torch.device) -> None:
    labels = torch.randint(0, 3, (2, 8, 8), device=device)
    one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    prediction = torch.randn(2, 3, 8, 8, device=device).softmax(1)
    features = torch.randn(2, 5, 8, 8, device=device)
    assert torch.all(patch_embeddings(features, one_hot, 4).entropy == 0)
    batch = patch_embeddings(features, one_hot, 4, prediction=prediction)
    h = -(prediction * prediction.log()).sum(dim=1)
    for row in range(len(batch.labels)):
        b, y, x = batch.index[row].tolist()
        place = (b, slice(4 * y, 4 * y + 4), slice(4 * x, 4 * x + 4))
        inside = labels[place] == row % 3
        expected = h[place][inside].mean() if inside.any() else h.new_zeros(())
        torch.testing.assert_close(batch.entropy[row], expected)


@pytest.mark.parametrize("per_class", [0, 1, 5, 100])
def test_limited_keeps_the_first_of_each_class(per_class: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 4, (90,), generator=g)
    priority = torch.randint(0, 12, (90,), generator=g).float()  # with ties
    rows = torch.arange(90)
    batch = PatchBatch(rows[:, None].float(), labels, priority, priority, rows[:, None])
    batch = PatchBatch(*(t.to(device) for t in batch))
    kept = batch.limited(per_class, priority.to(device))
    for k in range(4):
        own = sorted(rows[labels == k].tolist(), key=lambda i: (-priority[i], i))
        assert sorted(own[:per_class]) == rows[kept.labels.cpu() == k].tolist()
    assert kept.embeddings is batch.embeddings
    assert len(PatchBatch(*(t[:0] for t in batch)).limited(per_class, priority[:0].to(device)).labels) == 0
    with pytest.raises(ValueError, match=r"priority must have shape \(N,\) = \(90,\), got \(3,\)"):
        batch.limited(1, priority[:3])
    with pytest.raises(ValueError, match="per_class must be at least 0, got -1"):
        batch.limited(-1, priority.to(device))


@pytest.mark.parametrize(("shape", "patch", "step"), CASES)
def test_selected_rows_alone_are_pooled(shape, patch: list[int], step: list[int] | None, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(*shape, generator=g, dtype=torch.float64).to(device).requires_grad_()
    weights = torch.randn(shape[0], 3, *shape[2:], generator=g, dtype=torch.float64).softmax(1).to(device)

    def select(rows: PatchRows) -> PatchRows:
        assert isinstance(rows, PatchRows)
        return rows.limited(2, rows.entropy)

    for compact in (False, True):
        some = patch_embeddings(
            features,
            weights,
            patch,
            step,
            coverage=0.3,
            select=lambda r, c=compact: select(r).compact() if c else select(r),
        )
        every = patch_embeddings(features, weights, patch, step, coverage=0.3)
        every = every.limited(2, every.entropy)
        known = every.labels >= 0
        assert 3 < known.sum() <= 6
        if compact:
            every = every.compact()
        else:
            assert torch.all(some.embeddings[~known] == 0)
            every = every._replace(embeddings=torch.where(known[:, None], every.embeddings, 0))
        for a, b in zip(some, every, strict=True):
            torch.testing.assert_close(a, b)
        v = torch.randn(every.embeddings.shape, generator=g, dtype=torch.float64).to(device)
        got, want = (torch.autograd.grad((b.embeddings * v).sum(), features)[0] for b in (some, every))
        torch.testing.assert_close(got, want)
    none = patch_embeddings(features, weights, patch, step, select=lambda rows: rows.limited(0, rows.entropy).compact())
    assert none.embeddings.shape == (0, shape[1])


def test_no_copy_of_the_features_is_made_for_each_class() -> None:
    """There are no copies of the feature map for each class, with which memory would grow."""
    shape = (4, 64, 64, 64)
    features = torch.randn(shape, requires_grad=True)
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.untyped_storage().nbytes())
        return t

    for k in (2, 16):
        sizes.clear()
        weights = torch.randn(4, k, 64, 64).softmax(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            patch_embeddings(features, weights, 8)
        saved = sum(sizes) - weights.nbytes
        assert saved < 2.5 * features.nbytes


def test_a_ring_two_pixels_wide_yields_patches(device: torch.device) -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    radius = ((y - 31.5) ** 2 + (x - 31.5) ** 2).sqrt()
    labels = (((radius > 18) & (radius < 20)).long() + 2 * (radius <= 18)).to(device)[None]
    weights = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    image = torch.randn(1, 4, 64, 64, device=device)
    batch = patch_embeddings(image, weights, 16)
    ring = batch.labels == 1
    assert ring.sum() >= 8
    assert batch.coverage[ring].max() < 0.5  # a threshold of one half would leave none
    threshold = CoverageThreshold(3).to(device)
    for _ in range(200):
        threshold.update(*threshold.coverage_and_classes(batch))
    assert (patch_embeddings(image, weights, 16, coverage=threshold.value).labels == 1).sum() >= 0.6 * ring.sum()
    crops = class_patches(image, labels, 16, 3)
    assert (crops.labels == 1).sum() == ring.sum()


def test_soft_weights_stay_soft_and_empty_patches_are_none() -> None:
    weights = torch.zeros(1, 2, 8, 8)
    weights[:, 0] = 0.4  # cast to an integer mask, nothing would be left
    batch = patch_embeddings(torch.randn(1, 3, 8, 8), weights, 4)
    assert batch.labels.tolist() == [0, -1] * 4
    assert torch.all(batch.embeddings[1::2] == 0)


@pytest.mark.parametrize("count", [0, 1])
def test_one_patch_and_no_patch_reach_the_loss(count: int) -> None:
    features = torch.randn(1, 3, 4, 4, requires_grad=True)
    weights = torch.zeros(1, 2, 4, 4)
    weights[:, 0] = count
    batch = patch_embeddings(features, weights, 4)
    loss = PatchContrastLoss()(batch.embeddings, batch.labels, batch.entropy)
    loss.backward()
    assert loss == 0
    assert torch.all(features.grad == 0)
    assert len(class_patches(features.detach(), weights, 4, 2).labels) == count


def test_compiles_without_graph_breaks() -> None:
    features, weights = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 16, 16).softmax(1)
    for select in (None, lambda rows: rows.limited(2, rows.entropy)):

        def function(f: Tensor, w: Tensor, select=select) -> PatchBatch:
            return patch_embeddings(f, w, 8, coverage=0.3, select=select)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(features, weights), function(features, weights), strict=True):
            torch.testing.assert_close(a, b)


def test_coverage_is_that_of_the_statistics() -> None:
    weights = torch.randn(2, 3, 16, 16).softmax(1)
    batch = patch_embeddings(torch.randn(2, 4, 16, 16), weights, 8)
    confidence = patch_statistics(weights, 8, probabilities=True).confidence
    assert torch.equal(batch.coverage, confidence.movedim(1, -1).flatten())


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("weights must have the batch and space of features", {"weights": torch.zeros(2, 3, 8, 9)}),
        ("weights must have the batch and space of features", {"weights": torch.zeros(1, 3, 8, 8)}),
        ("prediction must have the batch", {"prediction": torch.zeros(2, 3, 4, 4)}),
        ("weights must have at least two classes", {"weights": torch.ones(2, 1, 8, 8)}),
        ("patch_size must not exceed the image", {"patch_size": 9}),
        ("coverage must be a number or have shape", {"coverage": torch.zeros(4)}),
        ("coverage must be a number, got str", {"coverage": "0.1"}),
        ("coverage must be a number, got nan", {"coverage": math.nan}),
        ("coverage must be on the device of the images, cpu, got meta", {"coverage": torch.tensor(0.3, device="meta")}),
        ("features must be a tensor, got list", {"features": [0.0]}),
        ("features must have shape", {"features": torch.zeros(8, 8)}),
        ("features must be float64", {"features": torch.zeros(2, 4, 8, 8, dtype=torch.int64)}),
        ("weights must be float64", {"weights": torch.ones(2, 3, 8, 8, dtype=torch.bool)}),
        ("weights must be on the device of features, cpu, got meta", {"weights": torch.ones(2, 3, 8, 8).to("meta")}),
        ("prediction must be a tensor", {"prediction": 1.0}),
        ("ignore_index must be an int", {"ignore_index": None}),
        ("select must be a function of PatchRows, or None, got int", {"select": 3}),
    ],
)
def test_bad_input_is_refused_by_name(message: str, change: dict) -> None:
    call = {"features": torch.zeros(2, 4, 8, 8), "weights": torch.ones(2, 3, 8, 8), "patch_size": 4, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        patch_embeddings(**call)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("select", [None, lambda rows: rows])
def test_sums_over_large_patches_do_not_overflow_16_bits(autocast: bool, select, device: torch.device) -> None:
    features = torch.full((1, 3, 64, 64, 64), 300.0, device=device)
    weights = torch.full((1, 2, 64, 64, 64), 0.5, device=device)
    if not autocast:
        features, weights = features.half(), weights.half()
    with torch.autocast(device.type, torch.float16, enabled=autocast):
        batch = patch_embeddings(features, weights, 64, prediction=weights, select=select)
    assert torch.all(batch.embeddings == 300)
    assert torch.all(batch.coverage == 0.5)
    torch.testing.assert_close(batch.entropy.double(), batch.entropy.new_full((2,), math.log(2)).double())


def test_pools_in_32_bits_under_autocast(device: torch.device) -> None:
    features, weights = torch.randn(1, 3, 8, 8, device=device), torch.rand(1, 2, 8, 8, device=device)
    expected = patch_embeddings(features, weights, 4)
    with torch.autocast(device.type, torch.bfloat16):
        for a, b in zip(patch_embeddings(features, weights, 4), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("select", [None, lambda rows: rows])
def test_embeddings_of_a_class_of_hardly_any_weight_are_exact(select, device: torch.device) -> None:
    features = torch.rand(1, 3, 4, 4, device=device)
    hardly = torch.rand(1, 1, 4, 4, device=device) * 1e-41
    weights, prediction = torch.cat([1 - hardly, hardly], dim=1), torch.rand(1, 2, 4, 4, device=device) / 2
    got = patch_embeddings(features, weights, 4, prediction=prediction, select=select)
    want = patch_embeddings(features.double(), weights.double(), 4, prediction=prediction.double())
    assert got.labels.tolist() == [0, 1]
    torch.testing.assert_close(got.embeddings.double(), want.embeddings, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=1e-5, atol=1e-6)


def test_a_priority_that_is_not_a_number_is_the_lowest(device: torch.device) -> None:
    entropy = torch.tensor([0.5, math.nan, 0.7, math.nan, 0.1], device=device)
    zeros = torch.zeros(5, device=device)
    rows = PatchRows(zeros.long(), entropy, zeros, zeros.long()[:, None])
    assert rows.limited(2, rows.entropy).labels.tolist() == [0, -1, 0, -1, -1]
    assert rows.limited(4, rows.entropy).labels.tolist() == [0, 0, 0, -1, 0]
    with pytest.raises(TypeError, match="priority must be a tensor, got list"):
        rows.limited(1, [1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="priority must be real numbers, got complex64"):
        rows.limited(1, rows.entropy + 0j)
    with pytest.raises(ValueError, match=r"priority must be on the device of labels, .*, got meta"):
        rows.limited(1, rows.entropy.to("meta"))
    for ignore_index in (None, -1.0, "none"):
        with pytest.raises(TypeError, match="ignore_index must be an int"):
            rows.limited(1, rows.entropy, ignore_index)
        with pytest.raises(TypeError, match="ignore_index must be an int"):
            rows.compact(ignore_index)


@pytest.mark.parametrize(
    ("error", "message", "select"),
    [
        (TypeError, "select must return PatchRows, got NoneType", lambda rows: None),
        (ValueError, r"select must return .* number of rows, got labels \(2,\), entropy \(24,\)",
         lambda rows: rows._replace(labels=rows.labels[:2])),
        (TypeError, "coverage of select must be a tensor, got float", lambda rows: rows._replace(coverage=0.5)),
        (TypeError, "labels of select must be int64, got float32",
         lambda rows: rows._replace(labels=rows.labels.float())),
        (ValueError, r"labels of select must have shape \(N,\) = \(24,\), got \(24, 1\)",
         lambda rows: rows._replace(labels=rows.labels[:, None])),
        (TypeError, "index of select must be int64, got int32", lambda rows: rows._replace(index=rows.index.int())),
        (ValueError, r"index of select must have shape \(N, 3\), got \(24, 2\)",
         lambda rows: rows._replace(index=rows.index[:, :2])),
        (ValueError, r"labels must lie in \[0, K\) = \[0, 3\) or be ignore_index = -1, got 3 at index 2",
         lambda rows: rows._replace(labels=rows.labels + 1)),
        (ValueError, r"index of select must lie in the grid of patches, \[2, 2, 2\], got \[-1, -1, -1\]",
         lambda rows: rows._replace(index=rows.index - 1)),
        (ValueError, r"index of select must lie in the grid of patches, \[2, 2, 2\], got \[2, 0, 0\]",
         lambda rows: rows._replace(index=rows.index + torch.tensor([1, 0, 0]))),
    ],
)  # fmt: skip
def test_the_result_of_select_is_checked(error: type[Exception], message: str, select) -> None:
    with pytest.raises(error, match=message):
        patch_embeddings(torch.zeros(2, 4, 8, 8), torch.ones(2, 3, 8, 8), 4, select=select)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("select", [None, lambda rows: rows])
def test_empty_features_give_empty_embeddings(batch: int, channels: int, select) -> None:
    pooled = patch_embeddings(torch.zeros(batch, channels, 8, 8), torch.ones(batch, 2, 8, 8), 4, select=select)
    assert pooled.embeddings.shape == (batch * 8, channels)


def test_rows_without_their_class_get_an_embedding_of_0(device: torch.device) -> None:
    features = torch.randn(1, 3, 8, 8, device=device, requires_grad=True)
    weights = torch.zeros(1, 2, 8, 8, device=device)
    weights[:, 0] = 1
    every = torch.arange(2, device=device).repeat(4)
    pooled = patch_embeddings(features, weights, 4, select=lambda rows: rows._replace(labels=every))
    assert torch.all(pooled.embeddings[1::2] == 0)
    assert torch.autograd.grad(pooled.embeddings.sum(), features)[0].isfinite().all()


def test_the_threshold_finds_the_classes_of_rows_before_and_after_compact(device: torch.device) -> None:
    weights = torch.rand(2, 3, 8, 8, device=device)
    batch = patch_embeddings(torch.randn(2, 4, 8, 8, device=device), weights, 4, coverage=0.5)
    threshold = CoverageThreshold(3).to(device)
    coverage, classes = threshold.coverage_and_classes(batch)
    assert torch.equal(coverage, batch.coverage)
    assert classes.tolist() == [0, 1, 2] * 8
    chosen = batch.compact()
    coverage, classes = threshold.coverage_and_classes(chosen)
    assert torch.equal(coverage, chosen.coverage)
    assert torch.equal(classes, chosen.labels)


@pytest.mark.parametrize("coverage", [Fraction(1, 4), np.float32(0.25), 2**70, -(2**70), math.inf])
def test_numpy_numbers_count_as_numbers(coverage) -> None:
    features, weights = torch.randn(1, 2, 8, 8), torch.rand(1, 3, 8, 8).softmax(1)
    want = patch_embeddings(features, weights, 2, coverage=float(coverage))
    got = patch_embeddings(features, weights, np.uint8(2), coverage=coverage, ignore_index=np.int8(-1))
    assert torch.equal(got.labels, want.labels)
    labels = weights.argmax(1)
    want, got = (class_patches(features, labels, 2, 3, coverage=c).index for c in (float(coverage), coverage))
    assert torch.equal(got, want)
