"""One step: every base with the contrast, and the effect of the teacher's predictions on the loss."""

from __future__ import annotations

import pytest
import torch
from pglcl.bases import BASES, Taught, labelled_and
from pglcl.contrast import PatchContrast
from pglcl.step import StepLoss
from torch import Tensor

from tests.pglcl.folders import tiny
from tests.pglcl.steps import gradient_of, make_batch, networks, predict_class_everywhere


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("patches", ["pooled", "crop"])
@pytest.mark.parametrize("loss", ["infonce", "gaussian"])
@pytest.mark.parametrize("consistency", list(BASES))
def test_every_combination_of_options_gives_a_finite_loss_and_gradients(
    consistency: str, loss: str, patches: str, dims: int
) -> None:
    size = "32" if dims == 2 else "16"
    options = {"consistency": consistency, "loss": loss, "patches": patches, "spatial_dims": dims, "image_size": size}
    options["mixed_patches"] = "split" if loss == "infonce" else "together"  # with random labels, no patch is filled
    config = tiny(**options, hard_negatives=loss == "gaussian")
    student, teacher = networks(dims)
    contrast = PatchContrast(config, 3)
    step = StepLoss(student, teacher, contrast, config)
    labelled_alone = {name: t for name, t in make_batch(dims).items() if name in ("image", "label")}
    for number, batch in enumerate((labelled_alone, make_batch(dims, 1), make_batch(dims, 2))):
        losses, grad = gradient_of(step, batch, number + 2)
        assert all(torch.isfinite(v) for v in losses.values())
        assert torch.isfinite(grad).all()
    assert losses["contrast"] > 0
    assert student.projection.layers[0].weight.grad.abs().sum() > 0


def test_the_teachers_pseudo_labels_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach both losses, and the teacher's embeddings reach the queue."""
    config = tiny(consistency="copy-paste")
    student, teacher = networks()
    batch = make_batch()
    results = []
    for said in (0, 2):  # a teacher that sees one class everywhere
        predict_class_everywhere(teacher, said)
        contrast = PatchContrast(config, 3)
        step = StepLoss(student, teacher, contrast, config)
        seen: list[Tensor] = []

        def recording(*arguments, seen=seen, infonce=contrast.infonce.forward, **options):
            seen.append(arguments[1])
            return infonce(*arguments, **options)

        monkeypatch.setattr(contrast.infonce, "forward", recording)
        losses, _ = gradient_of(step, batch)
        assert contrast.queue is not None
        results.append((float(losses["segmentation"]), set(seen[0].tolist()), contrast.queue.counts.tolist()))
        keys, labels, _ = contrast.queue.keys()
        with torch.no_grad():  # the queue holds the teacher's embeddings, not the student's
            _, features = teacher.with_features(torch.cat([batch["image"], batch["weak"]]))
            p = torch.zeros(4, 3, 32, 32)
            p[:, said] = 1
            views = labelled_and(batch, batch["weak"], Taught.of(p, 2, []))
            own = contrast.patches(teacher, views, views.class_weights(3), features, 0, torch.Generator())
            z = teacher.projection(own.embeddings)
        assert (torch.cdist(keys[labels >= 0], z).min(dim=1).values < 1e-3).all()
    assert results[0][0] != results[1][0]  # the segmentation loss follows the pseudo-labels
    assert results[0][1] != results[1][1]  # and so do the classes of the anchors
    assert results[0][2] != results[1][2]  # and those that are queued


def test_a_contrast_of_weight_0_gives_the_gradients_of_semi() -> None:
    student, teacher = networks()
    batch = make_batch()
    _, plain = gradient_of(StepLoss(student, teacher, None, tiny(method="semi")), batch)
    student.projection.zero_grad(set_to_none=True)
    config = tiny(method="patchcl", contrast_weight=0.0)
    contrast = PatchContrast(config, 3)
    contrast.threshold.value.zero_()
    losses, grad = gradient_of(StepLoss(student, teacher, contrast, config), batch)
    assert losses["contrast"] > 0
    torch.testing.assert_close(grad[: len(plain)], plain)


def test_the_weight_of_the_contrast_rises_and_returns_to_0() -> None:
    config = tiny(contrast_weight=2.0)
    student, teacher = networks()
    step = StepLoss(student, teacher, None, config)
    n = config.steps
    weights = [step._contrast_weight(i) for i in range(n + 1)]
    assert weights[0] == weights[n] == 0
    assert max(weights) == weights[n // 2] == 2
    assert weights == pytest.approx(weights[::-1])
    constant = StepLoss(student, teacher, None, tiny(contrast_weight=2.0, contrast_schedule="constant"))
    assert {constant._contrast_weight(i) for i in range(n)} == {2.0}


def test_half_of_the_feature_channels_of_a_weak_view_are_dropped() -> None:
    config = tiny(consistency="weak-to-strong")
    student, teacher = networks()
    step = StepLoss(student, teacher, None, config)
    seen = []
    student.with_features = lambda x, kept=None, ask=student.with_features: seen.append(kept) or ask(x, kept)
    gradient_of(step, make_batch())
    (kept,) = seen
    assert kept.shape == (2 + 2 + 2 + 2, student.feature_channels, 1, 1)
    assert torch.all(kept[:6] == 1)
    assert set(kept[6:].unique().tolist()) == {0.0, 2.0}
    gradient_of(StepLoss(student, teacher, None, tiny(consistency="weak-to-strong", feature_dropout=0.0)), make_batch())
    assert seen[1] is None
