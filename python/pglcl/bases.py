"""The semi-supervised base methods (method, section 9): what the student is shown, and the loss on it.

A base is a dataclass. Its fields are options of :class:`~pglcl.config.TrainConfig` of the same names.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pglcl.config import TrainConfig
from pglcl.postprocess import Organ, clean
from pglcl_ext.class_patches import one_hot

UNLABELLED_SHARE = 0.5  # copy-paste: weight of pasted pseudo-labelled pixels (Bidirectional Copy-Paste's alpha)
# Mean teacher: usual weight of the squared distance, which is at most 2 / K, beside cross-entropy.
DISTANCE_WEIGHT = 10


@dataclass
class ViewBatch:
    """The images that the student sees in a step, and their targets.

    images: (B, C, *S). target: (B, *S) int64, -1 where nothing is known. weight: (B, *S), of each pixel in the loss.
    certainty: (B, *S), 1 for an annotation, the teacher's probability for a pseudo-label. annotated: (B, *S) bool.
    prediction: (B, K, *S), the teacher's probabilities, or None where they are not needed. supervised: number of
    annotated images, which come first. weak: number of weak views, which come last; a share of their feature channels
    is dropped in the student.
    """

    images: Tensor
    target: Tensor
    weight: Tensor
    certainty: Tensor
    annotated: Tensor
    prediction: Tensor | None
    supervised: int
    weak: int = 0

    def class_weights(self, num_classes: int, counts: Tensor | None = None) -> Tensor:
        """(B, K, *S): `counts` (B, *S), by default the certainty, for the class of each pixel; 0 for other classes."""
        return one_hot(self.target, num_classes) * (self.certainty if counts is None else counts)[:, None]

    def strongly_augmented(self) -> ViewBatch:
        """All but the weak views."""
        n = len(self.images) - self.weak
        return ViewBatch(
            self.images[:n],
            self.target[:n],
            self.weight[:n],
            self.certainty[:n],
            self.annotated[:n],
            None if self.prediction is None else self.prediction[:n],
            self.supervised,
        )


class Taught(NamedTuple):
    """The teacher's predictions in a step.

    prediction: (L + U, K, *S), probabilities of the labelled images and of the weak views of the unlabelled ones.
    pseudo: (U, *S) int64, the pseudo-labels of the unlabelled images. certainty: (U, *S), their probability.
    """

    prediction: Tensor
    pseudo: Tensor
    certainty: Tensor

    @classmethod
    def of(cls, prediction: Tensor, labelled: int, organs: Sequence[Organ]) -> Taught:
        """Makes pseudo-labels of a prediction.

        Args:
            prediction: (L + U, K, *S), probabilities.
            labelled: L.
            organs: those of which a pseudo-label keeps only the largest component.
        """
        unlabelled = prediction[labelled:]
        pseudo = unlabelled.max(dim=1).indices  # argmax gives the same, but takes five times longer on a CPU
        return cls(prediction, *clean(pseudo, unlabelled, organs))


class Base(ABC):
    """The methods of a base that a training step calls."""

    @abstractmethod
    def views(self, batch: dict[str, Tensor], taught: Taught, generator: torch.Generator) -> ViewBatch:
        """The student's views of a batch of :class:`~pglcl.batches.StepBatches` after the warm-up."""

    @abstractmethod
    def loss(self, logits: Tensor, views: ViewBatch, ramp: float) -> Tensor:
        """The loss, a scalar, of logits (B, K, *S). `ramp`, in [0, 1], says how far the teacher is trusted."""

    def warmup_views(self, views: ViewBatch, generator: torch.Generator) -> ViewBatch:
        """The student's views during the warm-up; `views` are those of :func:`labelled_alone`."""
        return views


@dataclass(frozen=True)
class MeanTeacher(Base):
    """Tarvainen and Valpola 2017: the squared distance from the teacher's probabilities."""

    consistency_weight: float

    def views(self, batch: dict[str, Tensor], taught: Taught, generator: torch.Generator) -> ViewBatch:
        return labelled_and(batch, batch["strong"], taught)

    def loss(self, logits: Tensor, views: ViewBatch, ramp: float) -> Tensor:
        n = views.supervised
        assert views.prediction is not None
        distance = (logits[n:].float().softmax(1) - views.prediction[n:]).square().mean()
        supervised = segmentation_loss(logits[:n], views.target[:n])
        return supervised + DISTANCE_WEIGHT * ramp * self.consistency_weight * distance


@dataclass(frozen=True)
class WeakToStrong(Base):
    """Where the teacher is sure of the weak view, its class is the target of other views (Yang et al., CVPR 2023).

    The other views are one or two strong ones, in which images exchange boxes as in CutMix, and the weak view itself
    with a share of its feature channels dropped.
    """

    consistency_weight: float
    confidence: float
    strong_views: int
    feature_dropout: float

    def views(self, batch: dict[str, Tensor], taught: Taught, generator: torch.Generator) -> ViewBatch:
        n, count = len(batch["image"]), len(batch["strong"])
        labelled, unlabelled = taught.prediction[:n], taught.prediction[n:]
        parts = []
        for name in ("strong", "strong2")[: self.strong_views]:
            box = random_box(tuple(batch[name].shape[2:]), 0.5, generator).to(unlabelled.device) > 0
            order = torch.randperm(count, generator=generator).to(unlabelled.device)
            shown = (batch[name], taught.pseudo, taught.certainty, unlabelled)
            parts.append([torch.where(box, x[order], x) for x in shown])
        if self.feature_dropout:
            parts.append([batch["weak"], taught.pseudo, taught.certainty, unlabelled])
        images, pseudo, certainty, prediction = (torch.cat(x) for x in zip(*parts))
        views = labelled_and(batch, images, Taught(torch.cat([labelled, prediction]), pseudo, certainty))
        views.weight[n:] *= certainty >= self.confidence
        return dataclasses.replace(views, weak=count if self.feature_dropout else 0)

    def loss(self, logits: Tensor, views: ViewBatch, ramp: float) -> Tensor:
        """The views with fewer feature channels count as much as the strong ones together."""
        n, weak = views.supervised, len(logits) - views.weak
        supervised = segmentation_loss(logits[:n], views.target[:n])
        unlabelled = segmentation_loss(logits[n:weak], views.target[n:weak], views.weight[n:weak])
        if views.weak:
            fewer = segmentation_loss(logits[weak:], views.target[weak:], views.weight[weak:])
            unlabelled = (unlabelled + fewer) / 2
        return supervised + self.consistency_weight * unlabelled


@dataclass(frozen=True)
class CopyPaste(Base):
    """Labelled images pasted into unlabelled ones and the other way round (Bai et al., CVPR 2023).

    During warm-up, labelled images are pasted into each other.
    """

    consistency_weight: float
    mix_warmup: bool

    def views(self, batch: dict[str, Tensor], taught: Taught, generator: torch.Generator) -> ViewBatch:
        n = min(len(batch["image"]), len(batch["strong"]))
        prediction = torch.cat([taught.prediction[:n], taught.prediction[len(batch["image"]) :][:n]])
        labelled = {"image": batch["image"][:n], "label": batch["label"][:n]}
        shown = Taught(prediction, taught.pseudo[:n], taught.certainty[:n])
        views = labelled_and(labelled, batch["strong"][:n], shown)
        views.weight[n:] *= UNLABELLED_SHARE * self.consistency_weight
        return pasted(views, torch.arange(2 * n).roll(n), generator)

    def warmup_views(self, views: ViewBatch, generator: torch.Generator) -> ViewBatch:
        return pasted(views, torch.arange(len(views.images)).roll(1), generator) if self.mix_warmup else views

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


def labelled_and(batch: dict[str, Tensor], unlabelled: Tensor, taught: Taught) -> ViewBatch:
    """Labelled images followed by unlabelled ones (U, C, *S), whose targets are the teacher's pseudo-labels."""
    target, known = torch.cat([batch["label"], taught.pseudo]), torch.ones_like(batch["label"])
    return ViewBatch(
        torch.cat([batch["image"], unlabelled]),
        target,
        torch.ones_like(target, dtype=taught.certainty.dtype),
        torch.cat([known.to(taught.certainty.dtype), taught.certainty]),
        torch.cat([known.bool(), torch.zeros_like(taught.pseudo, dtype=torch.bool)]),
        taught.prediction,
        len(known),
    )


def pasted(views: ViewBatch, order: Tensor, generator: torch.Generator) -> ViewBatch:
    """Pastes a box of image `order[i]` into image i. All share one box: 2/3 of each axis, at a random place."""
    box = random_box(tuple(views.images.shape[2:]), 2 / 3, generator).to(views.images.device) > 0
    order = order.to(views.images.device)

    def mixed(x: Tensor) -> Tensor:
        return torch.where(box, x[order], x)

    return ViewBatch(
        mixed(views.images),
        mixed(views.target),
        mixed(views.weight),
        mixed(views.certainty),
        mixed(views.annotated),
        None if views.prediction is None else mixed(views.prediction),
        supervised=0,
    )


def segmentation_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy plus soft Dice over the classes. Both are weighted sums over the pixels that have a target.

    Dice is computed over the whole batch. A class that is neither in the target nor in the prediction adds nothing.

    Args:
        logits: (B, K, *S).
        target: (B, *S) int64, -1 where nothing is known.
        weight: (B, *S), of each pixel; default: 1.

    Returns:
        The loss, a float32 scalar.
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
