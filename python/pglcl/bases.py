"""The semi-supervised bases (method, section 9): what the student is shown, and the loss on it.

A base is a dataclass, its fields options of :class:`~pglcl.config.TrainConfig` by the same names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pglcl.config import TrainConfig

UNLABELLED_SHARE = 0.5  # copy-paste: weight of pasted pseudo-labelled pixels (Bidirectional Copy-Paste's alpha)
# What the squared distance of mean teacher, at most 2 / K, usually gets beside cross-entropy.
DISTANCE_WEIGHT = 10


@dataclass
class ViewBatch:
    """What the student sees in a step, and what it should say.

    images (B, C, *S). target (B, *S) int64, -1 where nothing is known. weight (B, *S), of each pixel. certainty
    (B, *S), 1 for an annotation, the teacher's probability for a pseudo-label. annotated (B, *S) bool. prediction
    (B, K, *S), the teacher's, or None when nobody asks for it. supervised: how many of the first images are annotated.
    """

    images: Tensor
    target: Tensor
    weight: Tensor
    certainty: Tensor
    annotated: Tensor
    prediction: Tensor | None
    supervised: int

    def class_weights(self, num_classes: int, *, annotated: bool = False) -> Tensor:
        """(B, K, *S): each pixel counts for its class alone, as much as it is certain; `annotated`: or not at all."""
        counts = self.certainty * self.annotated if annotated else self.certainty
        return one_hot(self.target, num_classes) * counts[:, None]


class Base(Protocol):
    """What a step asks of a base.

    `batch` is that of :class:`~pglcl.batches.StepBatches`; `prediction` (L + U, K, *S) the teacher's probabilities of
    its labelled images and of the weak views of its unlabelled ones; `ramp`, in [0, 1], how far the teacher is trusted.
    """

    def views(self, batch: dict[str, Tensor], prediction: Tensor, generator: torch.Generator) -> ViewBatch: ...

    def loss(self, logits: Tensor, views: ViewBatch, ramp: float) -> Tensor: ...


@dataclass(frozen=True)
class MeanTeacher:
    """Tarvainen and Valpola 2017: the squared distance from the teacher's probabilities."""

    consistency_weight: float

    def views(self, batch: dict[str, Tensor], prediction: Tensor, generator: torch.Generator) -> ViewBatch:
        return labelled_and(batch, batch["strong"], prediction)

    def loss(self, logits: Tensor, views: ViewBatch, ramp: float) -> Tensor:
        n = views.supervised
        assert views.prediction is not None
        distance = (logits[n:].float().softmax(1) - views.prediction[n:]).square().mean()
        supervised = segmentation_loss(logits[:n], views.target[:n])
        return supervised + DISTANCE_WEIGHT * ramp * self.consistency_weight * distance


@dataclass(frozen=True)
class WeakToStrong:
    """The teacher's class of the weak view, where it is sure, for the strong one; boxes exchanged as in CutMix."""

    consistency_weight: float
    confidence: float

    def views(self, batch: dict[str, Tensor], prediction: Tensor, generator: torch.Generator) -> ViewBatch:
        count = len(batch["strong"])
        box = random_box(tuple(batch["strong"].shape[2:]), 0.5, generator).to(prediction.device)
        order = torch.randperm(count, generator=generator).to(prediction.device)
        labelled, unlabelled = prediction[: len(batch["image"])], prediction[len(batch["image"]) :]
        strong = torch.where(box > 0, batch["strong"][order], batch["strong"])
        prediction = torch.cat([labelled, torch.where(box > 0, unlabelled[order], unlabelled)])
        views = labelled_and(batch, strong, prediction)
        views.weight[views.supervised :] *= views.certainty[views.supervised :] >= self.confidence
        return views

    def loss(self, logits: Tensor, views: ViewBatch, ramp: float) -> Tensor:
        n = views.supervised
        supervised = segmentation_loss(logits[:n], views.target[:n])
        unlabelled = segmentation_loss(logits[n:], views.target[n:], views.weight[n:])
        return supervised + self.consistency_weight * unlabelled


@dataclass(frozen=True)
class CopyPaste:
    """Labelled images pasted into unlabelled ones and the other way round (Bai et al., CVPR 2023)."""

    consistency_weight: float

    def views(self, batch: dict[str, Tensor], prediction: Tensor, generator: torch.Generator) -> ViewBatch:
        n = min(len(batch["image"]), len(batch["strong"]))
        shown = torch.cat([prediction[:n], prediction[len(batch["image"]) :][:n]])
        labelled = {"image": batch["image"][:n], "label": batch["label"][:n]}
        views = labelled_and(labelled, batch["strong"][:n], shown)
        views.weight[n:] *= UNLABELLED_SHARE * self.consistency_weight
        box = random_box(tuple(views.images.shape[2:]), 2 / 3, generator).to(prediction.device) > 0

        def mixed(x: Tensor) -> Tensor:
            labelled, unlabelled = x[:n], x[n:]
            return torch.cat([torch.where(box, unlabelled, labelled), torch.where(box, labelled, unlabelled)])

        return ViewBatch(
            mixed(views.images),
            mixed(views.target),
            mixed(views.weight),
            mixed(views.certainty),
            mixed(views.annotated),
            mixed(shown),
            supervised=0,
        )

    def loss(self, logits: Tensor, views: ViewBatch, ramp: float) -> Tensor:
        n = len(logits) // 2
        parts = (slice(0, n), slice(n, None))
        losses = (segmentation_loss(logits[p], views.target[p], views.weight[p]) for p in parts)
        return sum(losses, logits.new_zeros(()))


BASES: dict[str, type[MeanTeacher] | type[WeakToStrong] | type[CopyPaste]] = {
    "mean-teacher": MeanTeacher,
    "weak-to-strong": WeakToStrong,
    "copy-paste": CopyPaste,
}


def make_base(config: TrainConfig) -> Base:
    """The base that --consistency names, with its options."""
    kind = BASES[config.consistency]
    return kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(kind)})


def labelled_alone(batch: dict[str, Tensor], prediction: Tensor | None) -> ViewBatch:
    """The views of a step without unlabelled images."""
    ones = torch.ones_like(batch["label"], dtype=batch["image"].dtype)
    return ViewBatch(batch["image"], batch["label"], ones, ones, ones.bool(), prediction, len(ones))


def labelled_and(batch: dict[str, Tensor], unlabelled: Tensor, prediction: Tensor) -> ViewBatch:
    """Labelled images followed by unlabelled ones (U, C, *S), whose targets are the teacher's pseudo-labels."""
    n = len(batch["image"])
    certainty, pseudo = prediction[n:].max(dim=1)
    target = torch.cat([batch["label"], pseudo])
    return ViewBatch(
        torch.cat([batch["image"], unlabelled]),
        target,
        torch.ones_like(target, dtype=prediction.dtype),
        torch.cat([torch.ones_like(batch["label"], dtype=prediction.dtype), certainty]),
        torch.cat([torch.ones_like(batch["label"], dtype=torch.bool), torch.zeros_like(pseudo, dtype=torch.bool)]),
        prediction,
        n,
    )


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    """(B, *S) to (B, K, *S) float; nothing where the target is -1."""
    classes = torch.arange(num_classes, device=target.device).view(-1, *[1] * (target.dim() - 1))
    return (target[:, None] == classes).float()


def segmentation_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy plus soft Dice over the classes, both over the pixels that have a target, weighted.

    Dice is of the batch: a class that the batch lacks, truth and prediction, costs nothing.
    """
    logits = logits.float()
    known = (target >= 0).float() if weight is None else weight * (target >= 0)
    total = known.sum().clamp(min=1e-6)
    cross_entropy = (F.cross_entropy(logits, target.clamp(min=0), reduction="none") * known).sum() / total
    dims = [0, *range(2, logits.dim())]
    p, t = logits.softmax(dim=1) * known[:, None], one_hot(target, logits.shape[1]) * known[:, None]
    overlap, size = (p * t).sum(dim=dims), (p * p).sum(dim=dims) + (t * t).sum(dim=dims)
    dice = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return cross_entropy + dice.mean()


def random_box(size: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    """(*S) float, 1 inside a box that takes `share` of every axis, at a random place."""
    box = torch.zeros(size)
    place = []
    for n in size:
        length = max(1, int(n * share))
        first = int(torch.randint(0, n - length + 1, (), generator=generator))
        place.append(slice(first, first + length))
    box[tuple(place)] = 1
    return box
