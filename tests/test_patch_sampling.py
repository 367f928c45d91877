"""patch_embeddings, class_patches and CoverageThreshold."""

from __future__ import annotations

import itertools

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
    cells = [range((s - p) // t + 1) for s, p, t in zip(features.shape[2:], patch, step)]
    for b in range(len(features)):
        for cell in itertools.product(*cells):
            place = tuple(slice(c * t, c * t + p) for c, p, t in zip(cell, patch, step))
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


def test_entropy_of_another_prediction(device: torch.device) -> None:
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
        for a, b in zip(some, every):
            torch.testing.assert_close(a, b)
        v = torch.randn(every.embeddings.shape, generator=g, dtype=torch.float64).to(device)
        got, want = (torch.autograd.grad((b.embeddings * v).sum(), features)[0] for b in (some, every))
        torch.testing.assert_close(got, want)
    none = patch_embeddings(features, weights, patch, step, select=lambda rows: rows.limited(0, rows.entropy).compact())
    assert none.embeddings.shape == (0, shape[1])


def test_one_pass_over_the_features() -> None:
    """Memory does not grow with the number of classes by copies of the feature map."""
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


def test_compiles_whole() -> None:
    features, weights = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 16, 16).softmax(1)
    for select in (None, lambda rows: rows.limited(2, rows.entropy)):

        def function(f: Tensor, w: Tensor, select=select) -> PatchBatch:
            return patch_embeddings(f, w, 8, coverage=0.3, select=select)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(features, weights), function(features, weights)):
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
        ("patch_size must not exceed the image", {"patch_size": 9}),
        ("coverage must be a number or have shape", {"coverage": torch.zeros(4)}),
    ],
)
def test_bad_input(message: str, change: dict) -> None:
    call = {"features": torch.zeros(2, 4, 8, 8), "weights": torch.ones(2, 3, 8, 8), "patch_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        patch_embeddings(**call)


# --- crops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 3, 5, 8, 11, [3, 7], [11, 4]])
@pytest.mark.parametrize("stride", [None, 1, 2])
def test_every_border_position_is_cut_at_its_place(patch, stride: int | None) -> None:
    size = [patch] * 2 if isinstance(patch, int) else patch
    if stride and stride > min(size):
        pytest.skip("pixels would be left out")
    image = torch.arange(1.0, 11 * 12 + 1).reshape(1, 1, 11, 12)
    for corner in itertools.product((0, 5, 10), (0, 6, 11)):
        labels = torch.full((1, 11, 12), -1)
        labels[0, corner[0], corner[1]] = 1
        found = class_patches(image, labels, patch, 2, stride=stride)
        assert len(found.labels) >= 1
        assert found.labels.unique().tolist() == [1]
        for crop, index in zip(found.images, found.index):
            first = index[1:].tolist()
            assert all(0 <= f <= extent - s for f, s, extent in zip(first, size, (11, 12)))
            assert list(crop.shape[1:]) == size
            expected = torch.zeros(size)
            expected[corner[0] - first[0], corner[1] - first[1]] = image[0, 0, corner[0], corner[1]]
            assert torch.equal(crop[0], expected)


def test_crops_cover_the_image() -> None:
    image = torch.ones(1, 1, 13, 17)
    found = class_patches(image, torch.zeros(1, 13, 17).long(), [5, 4], 1)
    seen = torch.zeros(13, 17)
    for _, y, x in found.index.tolist():
        seen[y : y + 5, x : x + 4] += 1
    assert seen.min() >= 1
    assert torch.all(found.coverage == 1)


def test_crops_in_three_dimensions() -> None:
    image, labels = torch.randn(2, 1, 6, 7, 8), torch.randint(0, 3, (2, 6, 7, 8))
    found = class_patches(image, labels, 3, 3, output_size=4)
    assert found.images.shape[1:] == (1, 4, 4, 4)
    assert set(found.labels.tolist()) == {0, 1, 2}


def test_background_is_spread_over_the_image() -> None:
    found = class_patches(torch.ones(1, 1, 64, 64), torch.zeros(1, 64, 64).long(), 8, 2, max_patches=8)
    assert len(found.labels) == 8
    rows = found.index[:, 1]
    assert rows.min() < 16
    assert rows.max() >= 48
    assert len(rows.unique()) >= 4


def test_images_do_not_suppress_each_other() -> None:
    image, labels = torch.randn(1, 1, 24, 24), torch.zeros(1, 24, 24, dtype=torch.int64)
    labels[:, 8:16, 8:16] = 1
    alone = class_patches(image, labels, 8, 2, max_patches=3)
    both = class_patches(image.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1), 8, 2, max_patches=3)
    for b in range(2):
        own = both.index[:, 0] == b
        assert torch.equal(both.index[own][:, 1:], alone.index[:, 1:])
        assert torch.equal(both.images[own], alone.images)


def test_coverage_counts_the_mask_not_intensities() -> None:
    image, labels = torch.zeros(1, 1, 8, 8), torch.ones(1, 8, 8).long()
    image[..., :4] = -3
    found = class_patches(image, labels, 4, 2)
    assert len(found.labels) == 4
    assert torch.all(found.coverage == 1)


def test_padding_and_resizing() -> None:
    image = torch.ones(1, 1, 8, 8)
    padded = class_patches(image, torch.zeros(1, 8, 8).long(), 4, 1, output_size=[7, 6], mode="pad")
    assert padded.images.shape == (4, 1, 7, 6)
    assert torch.all(padded.images.sum(dim=(1, 2, 3)) == 16)
    resized = class_patches(image, torch.zeros(1, 8, 8).long(), 4, 1, output_size=9).images
    torch.testing.assert_close(resized, torch.ones(4, 1, 9, 9))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("patch_size must not exceed", {"patch_size": 9}),
        ("labels must have shape", {"labels": torch.zeros(1, 8, 7).long()}),
        ("labels must have shape", {"labels": torch.zeros(1, 3, 8, 8)}),
        ("stride must not exceed", {"stride": 5}),
        ("mode must be", {"mode": "crop"}),
        ("num_classes must be", {"num_classes": 0}),
    ],
)
def test_bad_crops(message: str, change: dict) -> None:
    call = {"images": torch.zeros(1, 1, 8, 8), "labels": torch.zeros(1, 8, 8).long(), "patch_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        class_patches(**{"num_classes": 2, **call})


# --- the threshold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_threshold_converges_to_its_share(target: float) -> None:
    g = torch.Generator().manual_seed(0)
    threshold = CoverageThreshold(3, target=target)
    laws = [lambda u: u, lambda u: u**3, lambda u: 0.2 + 0.1 * u]
    tail = []
    for step in range(3000):
        labels = torch.randint(0, 3, (60,), generator=g)
        u = torch.rand(60, generator=g).clamp(min=1e-6)
        coverage = torch.stack([law(u) for law in laws])[labels, torch.arange(60)]
        threshold.update(coverage, labels)
        if step >= 1000:
            tail.append(threshold.value.clone())
    exact = torch.tensor([law(torch.tensor(1 - target)) for law in laws])
    torch.testing.assert_close(torch.stack(tail).mean(dim=0), exact, atol=0.02, rtol=0)
    u = torch.rand(100000, generator=g)
    for k, law in enumerate(laws):  # the share above the threshold, not the one below it
        assert abs((law(u) > threshold.value[k]).float().mean() - target) < 0.12


def test_too_large_a_share_raises_the_threshold() -> None:
    threshold = CoverageThreshold(2, initial=0.5, target=0.8)
    threshold.update(torch.tensor([0.9, 0.9, 0.1]), torch.tensor([0, 0, 1]))
    assert threshold.value[0] > 0.5  # all above, more than 0.8
    assert threshold.value[1] < 0.5  # none
    before = threshold.value.clone()
    threshold.update(torch.tensor([0.0, 0.7, 0.7]), torch.tensor([0, -1, 5]))  # none of them is a patch of its class
    assert torch.equal(threshold.value, before)


def test_patches_covered_whole_always_qualify() -> None:
    threshold = CoverageThreshold(1)
    for _ in range(2000):
        threshold.update(torch.ones(10), torch.zeros(10).long())
        assert threshold.value < 1


def test_threshold_state_survives_bit_for_bit(tmp_path) -> None:
    threshold, other = CoverageThreshold(2), CoverageThreshold(2)
    batches = [(torch.rand(20), torch.randint(0, 2, (20,))) for _ in range(8)]
    for batch in batches[:4]:
        threshold.update(*batch)
    torch.save(threshold.state_dict(), tmp_path / "t.pt")
    other.load_state_dict(torch.load(tmp_path / "t.pt", weights_only=True))
    for batch in batches[4:]:
        threshold.update(*batch)
        other.update(*batch)
    assert torch.equal(threshold.value, other.value)
    assert set(threshold.state_dict()) == {"value", "updates"}


def test_bad_thresholds() -> None:
    for options in ({"initial": 2.0}, {"target": 1.0}, {"gain": 0.0}, {"num_classes": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            CoverageThreshold(**{"num_classes": 2, **options})
    with pytest.raises(ValueError, match="same shape"):
        CoverageThreshold(2).update(torch.rand(3), torch.zeros(4).long())
    assert CoverageThreshold(2, initial=0.25).value.tolist() == [0.25, 0.25]
    with pytest.raises(ValueError, match="per_class must be at least 0, got -1"):
        PatchBatch(*torch.zeros(5, 3)).limited(-1, torch.zeros(3))
