"""The contrast on top of the bases: which patches are anchors and keys, and the effect of its options."""

from __future__ import annotations

import math

import pytest
import torch
from pglcl.bases import labelled_alone
from pglcl.contrast import PatchContrast
from pglcl.step import StepLoss
from torch import Tensor

from pglcl_ext import PatchBatch, reference
from tests.pglcl.folders import tiny
from tests.pglcl.steps import gradient_of, make_batch, networks, predict_class_everywhere


def anchors_of(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor], predicted: int | None = None, **options):
    """Labels and descriptors of the anchors, labels of the queued keys. `predicted`: the only class of the teacher."""
    options = {"mixed_patches": "together", **options}
    config = tiny(consistency="copy-paste", **options)
    student, teacher = networks()
    if predicted is not None:
        predict_class_everywhere(teacher, predicted)
    contrast = PatchContrast(config, 3)
    contrast.threshold.value.zero_()
    seen = []

    def recording(anchors, labels, descriptors, infonce=contrast.infonce.forward, **options):
        seen.append((labels, descriptors))
        return infonce(anchors, labels, descriptors, **options)

    monkeypatch.setattr(contrast.infonce, "forward", recording)
    losses, _ = gradient_of(StepLoss(student, teacher, contrast, config), batch)
    assert losses["contrast"] > 0
    assert contrast.queue is not None
    return *seen[0], contrast.queue.counts


def test_anchors_are_annotated_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    batch["label"] %= 2  # class 2 is only in pseudo-labels
    for choice, expected in (("labelled", {0, 1}), ("all", {0, 1, 2})):
        labels, _, counts = anchors_of(monkeypatch, batch, 2, anchors=choice)
        assert set(labels.tolist()) == expected
        assert (counts > 0).all()  # keys come from both


def test_anchors_and_keys_of_a_class_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"anchors": "all", "queue_length": 1000, "patch_size": 4}
    entropies = {}
    for name in ("teacher", "random"):
        labels, entropies[name], counts = anchors_of(
            monkeypatch, make_batch(), anchor_order=name, anchors_per_class=9, keys_per_class=5, **options
        )
        assert labels.bincount().tolist() == [9, 9, 9]
        assert counts.tolist() == [5, 5, 5]
    every, entropy, counts = anchors_of(monkeypatch, make_batch(), anchors_per_class=0, keys_per_class=0, **options)
    assert (every.bincount() > 9).all()
    assert (counts > 5).all()
    largest = torch.cat([entropy[every == k, 0].sort(descending=True).values[:9] for k in range(3)])
    assert torch.equal(entropies["teacher"][:, 0].sort().values, largest.sort().values)
    assert entropies["random"].mean() < entropies["teacher"].mean()


def test_guidance_and_queue_can_be_switched_off() -> None:
    student, teacher = networks()
    values = {}
    for name, change in {"all": {}, "unguided": {"guidance": False}, "no queue": {"queue_length": 0}}.items():
        config = tiny(max_positive_disparity=0.01, **change)
        step = StepLoss(student, teacher, PatchContrast(config, 3), config)
        for seed in (1, 2, 3):
            losses, _ = gradient_of(step, make_batch(seed=seed))
        values[name] = float(losses["contrast"])
    assert len(set(values.values())) == 3


def test_anchors_are_pixels_that_the_teacher_is_sure_of(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    batch["label"] %= 2
    sure, _, _ = anchors_of(monkeypatch, batch, 2)  # of class 2, everywhere
    assert set(sure.tolist()) == {0, 1, 2}
    unsure, _, _ = anchors_of(monkeypatch, batch, anchor_confidence=0.999)
    assert set(unsure.tolist()) == {0, 1}


def test_the_least_certain_anchors_of_the_student_come_first() -> None:
    contrast = PatchContrast(tiny(patch_size=4, anchors_per_class=2, mixed_patches="together"), 3)
    contrast.threshold.value.zero_()
    student, _ = networks()
    views = labelled_alone({"image": torch.randn(1, 1, 32, 32), "label": torch.zeros(1, 32, 32, dtype=torch.long)},
        torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 32, 32))  # fmt: skip
    prediction = views.prediction.clone()
    for i, j in ((2, 3), (7, 1)):
        prediction[0, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = 1 / 3
    rows = contrast.patches(
        student, views, views.class_weights(3), torch.randn(1, student.feature_channels, 16, 16), 2, torch.Generator(),
        unsure=prediction,
    )  # fmt: skip
    assert rows.index.tolist() == [[0, 2, 3], [0, 7, 1]]
    assert torch.all(rows.entropy == 0)  # the entropy is the teacher's


@pytest.mark.parametrize("choice", ["split", "leave-out", "together"])
@pytest.mark.parametrize("guidance", [False, True])
def test_a_mixed_and_a_filled_patch_of_a_class_are_no_pair(choice: str, guidance: bool) -> None:
    config = tiny(mixed_patches=choice, guidance=guidance, queue_length=0, inside_coverage=0.9)
    contrast = PatchContrast(config, 3)
    g = torch.Generator().manual_seed(0)
    z, k = (torch.randn(20, 8, generator=g) for _ in range(2))
    y, t = (torch.randint(0, 3, (20,), generator=g) for _ in range(2))
    h, e = (torch.rand(20, generator=g) for _ in range(2))
    full, filled = (torch.rand(20, generator=g) * 0.4 + 0.6 for _ in range(2))
    anchors, keys = PatchBatch(z, y, h, full, y), PatchBatch(k, t, e, filled, t)
    own = contrast.guidance.descriptors(anchors.entropy, anchors.coverage)
    others = contrast.guidance.descriptors(keys.entropy, keys.coverage, keys=True)
    loss = contrast.infonce(z, y, own, keys=k, key_labels=t, key_descriptors=others)
    mixed, also = full[:, None] < 0.9, filled[None] < 0.9
    pair = {"split": mixed == also, "leave-out": ~mixed & ~also, "together": torch.ones(20, 20, dtype=torch.bool)}
    positive = (y[:, None] == t) & pair[choice]
    if guidance:
        positive &= (h[:, None] - e).abs() <= config.max_positive_disparity * math.log(3)
    want = reference.patch_contrast_loss(
        z, y, keys=k, key_labels=t, temperature=config.temperature,
        positive_mask=positive, negative_mask=y[:, None] != t,
    )  # fmt: skip
    torch.testing.assert_close(loss, want)


def test_the_gaussian_loss_leaves_mixed_patches_out() -> None:
    counts = {}
    for choice in ("split", "together"):
        config = tiny(loss="gaussian", mixed_patches=choice, patch_size=4, queue_length=1000)
        student, teacher = networks()
        contrast = PatchContrast(config, 3)
        contrast.threshold.value.zero_()
        gradient_of(StepLoss(student, teacher, contrast, config), make_batch())
        counts[choice] = contrast.gaussian.queue.counts.sum()
    assert counts["split"] < counts["together"]
