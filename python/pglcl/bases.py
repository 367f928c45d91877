"""The semi-supervised bases (METHOD section 9): what the student is shown, and the loss on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pglcl.config import TrainConfig

UNLABELLED_SHARE = 0.5  # copy-paste: weight of pasted pseudo-labelled pixels (Bidirectional Copy-Paste's alpha)


@dataclass
class Views:
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


def mean_teacher(batch: dict[str, Tensor], teacher: Tensor, config: TrainConfig, g: torch.Generator) -> Views:
    return _labelled_and(batch, batch["strong"], teacher)


def mean_teacher_loss(logits: Tensor, views: Views, config: TrainConfig, ramp: float) -> Tensor:
    """Supervised loss, and the squared distance from the teacher's probabilities (Tarvainen and Valpola 2017)."""
    n = views.supervised
    assert views.prediction is not None
    distance = (logits[n:].float().softmax(1) - views.prediction[n:]).square().mean()
    # 10: the weight that the squared distance, at most 2 / K, usually gets beside cross-entropy.
    return segmentation_loss(logits[:n], views.target[:n]) + 10 * ramp * config.consistency_weight * distance


def weak_to_strong(batch: dict[str, Tensor], teacher: Tensor, config: TrainConfig, g: torch.Generator) -> Views:
    """Boxes of the strong views are exchanged between images (CutMix), and the teacher's prediction with them."""
    count = len(batch["strong"])
    box = random_box(tuple(batch["strong"].shape[2:]), 0.5, g).to(teacher.device)
    order = torch.randperm(count, generator=g).to(teacher.device)
    labelled, unlabelled = teacher[: len(batch["image"])], teacher[len(batch["image"]) :]
    strong = torch.where(box > 0, batch["strong"][order], batch["strong"])
    teacher = torch.cat([labelled, torch.where(box > 0, unlabelled[order], unlabelled)])
    views = _labelled_and(batch, strong, teacher)
    views.weight[views.supervised :] *= views.certainty[views.supervised :] >= config.confidence
    return views


def weak_to_strong_loss(logits: Tensor, views: Views, config: TrainConfig, ramp: float) -> Tensor:
    n = views.supervised
    supervised = segmentation_loss(logits[:n], views.target[:n])
    return supervised + config.consistency_weight * segmentation_loss(logits[n:], views.target[n:], views.weight[n:])


def copy_paste(batch: dict[str, Tensor], teacher: Tensor, config: TrainConfig, g: torch.Generator) -> Views:
    """Labelled images pasted into unlabelled ones and the other way round (Bai et al., CVPR 2023)."""
    n = min(len(batch["image"]), len(batch["strong"]))
    views = _labelled_and(
        {"image": batch["image"][:n], "label": batch["label"][:n]},
        batch["strong"][:n],
        torch.cat([teacher[:n], teacher[len(batch["image"]) :][:n]]),
    )
    views.weight[n:] *= UNLABELLED_SHARE * config.consistency_weight
    box = random_box(tuple(views.images.shape[2:]), 2 / 3, g).to(teacher.device) > 0

    def mixed(x: Tensor) -> Tensor:
        labelled, unlabelled = x[:n], x[n:]
        return torch.cat([torch.where(box, unlabelled, labelled), torch.where(box, labelled, unlabelled)])

    tensors = (views.images, views.target, views.weight, views.certainty, views.annotated, views.prediction)
    return Views(*(mixed(t) for t in tensors if t is not None), supervised=0)


def copy_paste_loss(logits: Tensor, views: Views, config: TrainConfig, ramp: float) -> Tensor:
    n = len(logits) // 2
    parts = (slice(0, n), slice(n, None))
    return sum((segmentation_loss(logits[p], views.target[p], views.weight[p]) for p in parts), logits.new_zeros(()))


BASES: dict[str, tuple[Callable[..., Views], Callable[..., Tensor]]] = {
    "mean-teacher": (mean_teacher, mean_teacher_loss),
    "weak-to-strong": (weak_to_strong, weak_to_strong_loss),
    "copy-paste": (copy_paste, copy_paste_loss),
}


def _labelled_and(batch: dict[str, Tensor], unlabelled: Tensor, teacher: Tensor) -> Views:
    """Labelled images followed by unlabelled ones."""
    n = len(batch["image"])
    certainty, pseudo = teacher[n:].max(dim=1)
    target = torch.cat([batch["label"], pseudo])
    return Views(
        torch.cat([batch["image"], unlabelled]),
        target,
        torch.ones_like(target, dtype=teacher.dtype),
        torch.cat([torch.ones_like(batch["label"], dtype=teacher.dtype), certainty]),
        torch.cat([torch.ones_like(batch["label"], dtype=torch.bool), torch.zeros_like(pseudo, dtype=torch.bool)]),
        teacher,
        n,
    )
