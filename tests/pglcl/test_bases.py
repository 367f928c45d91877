"""The bases: what the student is shown, and the loss on it."""

from __future__ import annotations

import pytest
import torch
from pglcl.bases import (
    BASES,
    UNLABELLED_SHARE,
    CopyPaste,
    Taught,
    WeakToStrong,
    labelled_alone,
    make_base,
    random_box,
    segmentation_loss,
)

from pglcl_ext.class_patches import one_hot
from tests.pglcl.folders import tiny
from tests.pglcl.steps import make_batch


@pytest.mark.parametrize("name", list(BASES))
def test_a_base_is_made_from_the_options_of_its_name(name: str) -> None:
    options = {"confidence": 0.7} if name == "weak-to-strong" else {}
    base = make_base(tiny(consistency=name, consistency_weight=0.25, **options))
    assert isinstance(base, BASES[name])
    assert base.consistency_weight == 0.25
    assert getattr(base, "confidence", 0.7) == 0.7


@pytest.mark.parametrize("name", list(BASES))
def test_unlabelled_images_change_the_loss_and_its_weight_scales_them(name: str) -> None:
    batch, taught = make_batch(), Taught.of((torch.randn(4, 3, 32, 32) * 3).softmax(1), 2, [])
    logits = torch.randn(8, 3, 32, 32)
    losses = {}
    for weight in (0.0, 1.0, 2.0):
        base = make_base(tiny(consistency=name, consistency_weight=weight))
        views = base.views(batch, taught, torch.Generator().manual_seed(0))
        losses[weight] = float(base.loss(logits[: len(views.images)], views, 1.0))
    assert losses[1.0] != losses[0.0]
    if name != "copy-paste":  # there, labelled and unlabelled pixels share one weighted mean
        assert losses[2.0] - losses[0.0] == pytest.approx(2 * (losses[1.0] - losses[0.0]), rel=1e-4)


def test_segmentation_loss_leaves_out_what_has_no_target() -> None:
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    target = torch.randint(0, 3, (2, 8, 8))
    target[:, 4:] = -1
    whole = segmentation_loss(logits, target)
    part = segmentation_loss(logits[:, :, :4], target[:, :4])
    torch.testing.assert_close(whole, part)
    whole.backward()
    assert logits.grad is not None
    assert torch.all(logits.grad[:, :, 4:] == 0)
    none = segmentation_loss(logits, torch.full_like(target, -1))
    assert none == 0
    sure = one_hot(target.clamp(min=0), 3) * 40.0
    assert segmentation_loss(sure, target) < 1e-4


def test_copy_paste_mixes_images_and_targets_alike() -> None:
    batch, prediction = make_batch(), torch.randn(4, 3, 32, 32).softmax(1)
    views = CopyPaste(1.0, True).views(batch, Taught.of(prediction, 2, []), torch.Generator().manual_seed(0))
    pseudo = prediction[2:].argmax(1)
    annotated = views.certainty == 1
    assert torch.equal(annotated, views.annotated)
    assert 0.3 < annotated[:2].float().mean() < 0.7  # outside the box
    assert torch.equal(annotated[:2], ~annotated[2:])
    assert views.prediction is not None
    for half in (slice(0, 2), slice(2, 4)):
        place = annotated[half]
        image, target, shown = views.images[half].squeeze(1), views.target[half], views.prediction[half].movedim(1, -1)
        assert torch.equal(image[place], batch["image"].squeeze(1)[place])
        assert torch.equal(image[~place], batch["strong"].squeeze(1)[~place])
        assert torch.equal(target[place], batch["label"][place])
        assert torch.equal(target[~place], pseudo[~place])
        assert torch.equal(shown[place], prediction[:2].movedim(1, -1)[place])
        assert torch.equal(shown[~place], prediction[2:].movedim(1, -1)[~place])
    assert torch.all(views.weight[~annotated] == UNLABELLED_SHARE)
    assert torch.all(views.weight[annotated] == 1)


def test_labelled_images_are_pasted_into_each_other_during_warm_up() -> None:
    images, labels = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 12, 12), torch.arange(3).view(3, 1, 1)
    alone = labelled_alone({"image": images, "label": labels.expand(3, 12, 12)}, None)
    views = CopyPaste(1.0, True).warmup_views(alone, torch.Generator().manual_seed(0))
    assert torch.equal(views.images[:, 0].long(), views.target)
    for i in range(3):
        assert (views.target[i] == (i - 1) % 3).sum() == 8 * 8  # a box of 2/3 of each side, of another image
        assert (views.target[i] == i).sum() == 12 * 12 - 8 * 8
    assert CopyPaste(1.0, False).warmup_views(alone, torch.Generator()) is alone


@pytest.mark.parametrize(("strong", "dropout"), [(1, 0.0), (2, 0.0), (1, 0.5), (2, 0.5)])
def test_weak_to_strong_counts_only_sure_pixels(strong: int, dropout: float) -> None:
    batch, prediction = make_batch(), (torch.randn(4, 3, 32, 32) * 2).softmax(1)
    base = WeakToStrong(1.0, 0.7, strong, dropout)
    views = base.views(batch, Taught.of(prediction, 2, []), torch.Generator().manual_seed(0))
    assert len(views.images) == 2 + 2 * strong + 2 * (dropout > 0)
    assert views.prediction is not None
    assert torch.equal(views.weight[2:] > 0, views.prediction[2:].amax(1) >= 0.7)
    assert 0 < (views.weight[2:] > 0).float().mean() < 1
    assert torch.equal(views.target[2:], views.prediction[2:].argmax(1))
    assert torch.all(views.weight[:2] == 1)
    if dropout:
        assert views.weak == 2
        assert torch.equal(views.images[-2:], batch["weak"])
        assert torch.equal(views.target[-2:], prediction[2:].argmax(1))
    if strong == 2:
        assert not torch.equal(views.target[2:4], views.target[4:6])  # boxes of their own
        assert len(views.strongly_augmented().images) == 6


def test_removed_components_become_background_with_its_probability() -> None:
    prediction = torch.full((1, 3, 8, 8), 0.05)
    prediction[:, 0] = 0.9
    for place in ((slice(1, 4), slice(1, 4)), (6, 6)):  # an organ and an island of class 1
        prediction[0, 1][place], prediction[0, 0][place] = 0.9, 0.05
    plain, cleaned = (Taught.of(prediction, 0, organs) for organs in ([], [(1,)]))
    assert plain.pseudo.sum() == 10
    assert plain.certainty.min() == pytest.approx(0.9)
    assert cleaned.pseudo.sum() == 9
    assert cleaned.pseudo[0, 6, 6] == 0
    assert cleaned.certainty[0, 6, 6] == pytest.approx(0.05)


def test_random_boxes_lie_inside_at_every_place() -> None:
    g = torch.Generator().manual_seed(0)
    boxes = torch.stack([random_box((9, 12), 0.5, g) for _ in range(200)])
    assert torch.all(boxes.sum(dim=(1, 2)) == 4 * 6)
    assert boxes.amax(dim=0).min() == 1  # every pixel is in one of them
