"""The bases, the contrast on top of them, and that each part is what it says."""

from __future__ import annotations

import pytest
import torch
from pglcl import bases
from pglcl.bases import copy_paste, one_hot, random_box, segmentation_loss, weak_to_strong
from pglcl.contrast import PatchContrast
from pglcl.model import SegmentationNetwork
from pglcl.step import Step
from torch import Tensor

from tests.pglcl.folders import tiny


def networks(dims: int = 2, seed: int = 0) -> tuple[SegmentationNetwork, SegmentationNetwork]:
    torch.manual_seed(seed)
    student, teacher = (SegmentationNetwork(dims, 1, 3, [4, 8, 8], 8) for _ in range(2))
    return student, teacher.requires_grad_(False)


def make_batch(dims: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    space = (32,) * dims if dims == 2 else (16,) * dims
    weak = torch.randn(2, 1, *space, generator=g)
    return {
        "image": torch.randn(2, 1, *space, generator=g),
        "label": torch.randint(0, 3, (2, *space), generator=g),
        "weak": weak,
        "strong": weak + 0.1 * torch.randn(weak.shape, generator=g),
    }


@torch.no_grad()
def make_say(network: SegmentationNetwork, k: int) -> None:
    """Class k everywhere."""
    last = [m for m in network.unet.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))][-1]
    last.bias.zero_()
    last.bias[k] = 50.0


def gradient_of(step: Step, batch: dict[str, Tensor], number: int = 6) -> tuple[dict[str, Tensor], Tensor]:
    step.student.zero_grad()
    losses = step(dict(batch), number, torch.Generator().manual_seed(0))
    grads = [p.grad.flatten() for p in step.student.parameters() if p.grad is not None]
    return losses, torch.cat(grads)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("patches", ["pooled", "crop"])
@pytest.mark.parametrize("loss", ["infonce", "gaussian"])
@pytest.mark.parametrize("consistency", list(bases.BASES))
def test_every_combination_steps(consistency: str, loss: str, patches: str, dims: int) -> None:
    size = "32" if dims == 2 else "16"
    options = {"consistency": consistency, "loss": loss, "patches": patches, "spatial_dims": dims, "image_size": size}
    config = tiny(**options, hard_negatives=loss == "gaussian")
    student, teacher = networks(dims)
    contrast = PatchContrast(config, 3)
    step = Step(student, teacher, contrast, config)
    labelled_alone = {name: t for name, t in make_batch(dims).items() if name in ("image", "label")}
    for number, batch in enumerate((labelled_alone, make_batch(dims, 1), make_batch(dims, 2))):
        losses, grad = gradient_of(step, batch, number + 2)
        assert all(torch.isfinite(v) for v in losses.values())
        assert torch.isfinite(grad).all()
    assert losses["contrast"] > 0
    assert student.projection.layers[0].weight.grad.abs().sum() > 0


def test_the_teachers_pseudo_labels_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both losses, and its embeddings the queue."""
    config = tiny(consistency="copy-paste")
    student, teacher = networks()
    batch = make_batch()
    results = []
    for said in (0, 2):  # a teacher that sees one class everywhere
        make_say(teacher, said)
        contrast = PatchContrast(config, 3)
        step = Step(student, teacher, contrast, config)
        seen: list[Tensor] = []

        def recording(*arguments, seen=seen, infonce=contrast.infonce.forward, **options):
            seen.append(arguments[1])
            return infonce(*arguments, **options)

        monkeypatch.setattr(contrast.infonce, "forward", recording)
        losses, _ = gradient_of(step, batch)
        assert contrast.queue is not None
        results.append((float(losses["segmentation"]), set(seen[0].tolist()), contrast.queue.counts.tolist()))
        keys, labels, _ = contrast.queue.keys()
        with torch.no_grad():  # what is queued is the teacher's, not the student's
            _, features = teacher.with_features(torch.cat([batch["image"], batch["weak"]]))
            w = torch.cat([one_hot(batch["label"], 3), one_hot(torch.full((2, 32, 32), said), 3)])
            p = torch.zeros(4, 3, 32, 32)
            p[:, said] = 1
            own = contrast.patches(teacher, features, w, p, torch.cat([batch["image"], batch["weak"]]))
            z = teacher.projection(own.embeddings)
        assert (torch.cdist(keys[labels >= 0], z).min(dim=1).values < 1e-3).all()
    assert results[0][0] != results[1][0]  # the segmentation loss follows the pseudo-labels
    assert results[0][2] != results[1][2]  # and so do the classes that are queued


def anchors_of(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor], said: int | None = None, **options):
    """(labels, entropies) of the anchors, labels of the queued keys; by a teacher that says `said` everywhere."""
    config = tiny(consistency="copy-paste", **options)
    student, teacher = networks()
    if said is not None:
        make_say(teacher, said)
    contrast = PatchContrast(config, 3)
    contrast.threshold.value.zero_()
    seen = []

    def recording(anchors, labels, entropy, infonce=contrast.infonce.forward, **options):
        seen.append((labels, entropy))
        return infonce(anchors, labels, entropy, **options)

    monkeypatch.setattr(contrast.infonce, "forward", recording)
    losses, _ = gradient_of(Step(student, teacher, contrast, config), batch)
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


def test_semi_is_patchcl_without_the_contrast() -> None:
    student, teacher = networks()
    batch = make_batch()
    _, plain = gradient_of(Step(student, teacher, None, tiny(method="semi")), batch)
    student.projection.zero_grad(set_to_none=True)
    config = tiny(method="patchcl", contrast_weight=0.0)
    contrast = PatchContrast(config, 3)
    contrast.threshold.value.zero_()
    losses, grad = gradient_of(Step(student, teacher, contrast, config), batch)
    assert losses["contrast"] > 0
    torch.testing.assert_close(grad[: len(plain)], plain)


def test_guidance_and_queue_can_be_switched_off() -> None:
    student, teacher = networks()
    values = {}
    for name, change in {"all": {}, "unguided": {"guidance": False}, "no queue": {"queue_length": 0}}.items():
        config = tiny(max_positive_disparity=0.01, **change)
        step = Step(student, teacher, PatchContrast(config, 3), config)
        for seed in (1, 2, 3):
            losses, _ = gradient_of(step, make_batch(seed=seed))
        values[name] = float(losses["contrast"])
    assert len(set(values.values())) == 3


def test_segmentation_loss_leaves_out_what_has_no_target() -> None:
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    target = torch.randint(0, 3, (2, 8, 8))
    target[:, 4:] = -1
    whole = segmentation_loss(logits, target)
    part = segmentation_loss(logits[:, :, :4], target[:, :4])
    torch.testing.assert_close(whole, part)
    whole.backward()
    assert torch.all(logits.grad[:, :, 4:] == 0)
    none = segmentation_loss(logits, torch.full_like(target, -1))
    assert none == 0
    sure = one_hot(target.clamp(min=0), 3) * 40
    assert segmentation_loss(sure, target) < 1e-4


def test_copy_paste_mixes_everything_alike() -> None:
    batch, teacher = make_batch(), torch.randn(4, 3, 32, 32).softmax(1)
    views = copy_paste(batch, teacher, tiny(), torch.Generator().manual_seed(0))
    pseudo = teacher[2:].argmax(1)
    annotated = views.certainty == 1
    assert 0.3 < annotated[:2].float().mean() < 0.7  # outside the box
    assert torch.equal(annotated[:2], ~annotated[2:])
    for own, other, place in ((0, slice(0, 2), annotated[:2]), (1, slice(2, 4), annotated[2:])):
        image, target = views.images[other].squeeze(1), views.target[other]
        assert torch.equal(image[place], batch["image"].squeeze(1)[place])
        assert torch.equal(image[~place], batch["strong"].squeeze(1)[~place])
        assert torch.equal(target[place], batch["label"][place])
        assert torch.equal(target[~place], pseudo[~place])
        assert own in (0, 1)
    assert torch.all(views.weight[~annotated] == bases.UNLABELLED_SHARE)


def test_weak_to_strong_counts_sure_pixels_alone() -> None:
    batch, teacher = make_batch(), (torch.randn(4, 3, 32, 32) * 2).softmax(1)
    views = weak_to_strong(batch, teacher, tiny(confidence=0.7), torch.Generator().manual_seed(0))
    assert torch.equal(views.weight[2:] > 0, views.prediction[2:].amax(1) >= 0.7)
    assert torch.equal(views.target[2:], views.prediction[2:].argmax(1))
    assert torch.all(views.weight[:2] == 1)


def test_boxes_lie_anywhere_inside() -> None:
    g = torch.Generator().manual_seed(0)
    boxes = torch.stack([random_box((9, 12), 0.5, g) for _ in range(200)])
    assert torch.all(boxes.sum(dim=(1, 2)) == 4 * 6)
    assert boxes.amax(dim=0).min() == 1  # every pixel is in one of them
