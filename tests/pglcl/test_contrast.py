"""The contrast on top of the bases: which patches are anchors and keys, and what its options do."""

from __future__ import annotations

import pytest
import torch
from pglcl.contrast import PatchContrast
from pglcl.step import StepLoss
from torch import Tensor

from tests.pglcl.folders import tiny
from tests.pglcl.steps import gradient_of, make_batch, networks, predict_class_everywhere


def anchors_of(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor], said: int | None = None, **options):
    """(labels, entropies) of the anchors, labels of the queued keys; by a teacher that predicts `said` everywhere."""
    config = tiny(consistency="copy-paste", **options)
    student, teacher = networks()
    if said is not None:
        predict_class_everywhere(teacher, said)
    contrast = PatchContrast(config, 3)
    contrast.threshold.value.zero_()
    seen = []

    def recording(anchors, labels, entropy, infonce=contrast.infonce.forward, **options):
        seen.append((labels, entropy))
        return infonce(anchors, labels, entropy, **options)

    monkeypatch.setattr(contrast.infonce, "forward", recording)
    losses, _ = gradient_of(StepLoss(student, teacher, contrast, config), batch)
    assert losses["contrast"] > 0
    assert contrast.queue is not None
    return *seen[0], contrast.queue.counts


def test_anchors_are_annotated_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    batch["label"] %= 2  # class 2 is in pseudo-labels alone
    for choice, expected in (("labelled", {0, 1}), ("all", {0, 1, 2})):
        labels, _, counts = anchors_of(monkeypatch, batch, 2, anchors=choice)
        assert set(labels.tolist()) == expected
        assert (counts > 0).all()  # keys are of both


def test_anchors_and_keys_of_a_class_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"anchors": "all", "queue_length": 1000, "patch_size": 4}
    entropies = {}
    for name, hard in (("hard", True), ("random", False)):
        labels, entropies[name], counts = anchors_of(
            monkeypatch, make_batch(), hard_anchors=hard, anchors_per_class=9, keys_per_class=5, **options
        )
        assert labels.bincount().tolist() == [9, 9, 9]
        assert counts.tolist() == [5, 5, 5]
    every, entropy, counts = anchors_of(monkeypatch, make_batch(), anchors_per_class=0, keys_per_class=0, **options)
    assert (every.bincount() > 9).all()
    assert (counts > 5).all()
    largest = torch.cat([entropy[every == k].sort(descending=True).values[:9] for k in range(3)])
    assert torch.equal(entropies["hard"].sort().values, largest.sort().values)
    assert entropies["random"].mean() < entropies["hard"].mean()


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
