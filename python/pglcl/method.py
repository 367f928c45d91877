"""The method (METHOD section 9): semi-supervised bases, and the patch-wise contrast on top of any of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pglcl.config import TrainConfig
from pglcl.model import SegmentationNetwork
from pglcl_ext import (
    CoverageThreshold,
    EmbeddingQueue,
    GaussianContrastLoss,
    PatchBatch,
    PatchContrastLoss,
    class_patches,
    gaussian_contrast_loss,
    hard_negative_statistics,
    patch_embeddings,
)

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


# --- the bases: what the student is shown, and the loss on it -------------------------------------------------------


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


def halved(x: Tensor) -> Tensor:
    """(B, C, *S) to half the resolution; average pooling does the same, several times slower on a CPU."""
    for axis in range(2, x.dim()):
        even, odd = (x[(*[slice(None)] * axis, slice(first, None, 2))] for first in (0, 1))
        x = (even + odd) * 0.5
    return x


def at_most(rows: PatchBatch, per_class: int, hardest: bool, generator: torch.Generator) -> PatchBatch:
    """Those that qualify, `per_class` (0: all) of a class: the least certain, or a random sample."""
    rows = rows.compact()  # the losses leave out the others; projecting them would be for nothing
    if not per_class:
        return rows
    priority = rows.entropy if hardest else torch.rand(len(rows.labels), generator=generator).to(rows.labels.device)
    return rows.limited(per_class, priority).compact()


# --- the contrast ---------------------------------------------------------------------------------------------------


class PatchContrast(nn.Module):
    """Guided patches, keys of the teacher queued by class, and one of the two losses.

    Anchors are the student's patches, keys the teacher's, their classes given by annotation or pseudo-label. Patches
    are compared by the entropy of the teacher's prediction inside them.
    """

    def __init__(self, config: TrainConfig, num_classes: int, process_group: Any = None) -> None:
        super().__init__()
        self.config, self.num_classes, self.process_group = config, num_classes, process_group
        self.threshold = CoverageThreshold(num_classes, target=config.coverage_target)
        scale = math.log(num_classes)
        bounds: dict[str, float] = {}
        if config.guidance:
            bounds["max_positive_disparity"] = config.max_positive_disparity * scale
            bounds["min_negative_disparity"] = config.min_negative_disparity * scale
        self.queue: EmbeddingQueue | None = None
        if config.loss == "gaussian":
            self.gaussian = GaussianContrastLoss(
                num_classes,
                config.embedding_dim,
                queue_length=max(config.queue_length, 1),
                hard_negatives=config.hard_negatives,
                normalize=False,
                process_group=process_group,
            )
        else:
            if config.queue_length:
                self.queue = EmbeddingQueue(
                    num_classes,
                    config.embedding_dim,
                    config.queue_length,
                    descriptor_dim=1,
                    process_group=process_group,
                )
            # Queues of all ranks hold the keys of all ranks; without one, the loss gathers them.
            self.infonce = PatchContrastLoss(
                config.temperature,
                normalize=False,
                group=None if config.queue_length else process_group,
                **bounds,
            )

    def patches(
        self,
        network: SegmentationNetwork,
        features: Tensor,
        weights: Tensor,
        prediction: Tensor,
        images: Tensor,
        *,
        choose: Callable[[PatchBatch], PatchBatch] = PatchBatch.compact,
        observe: bool = False,
    ) -> PatchBatch:
        """Class-aware patches with their embeddings, pooled or cropped, those that `choose` leaves.

        `observe` moves the threshold by all of them.
        """
        if self.config.patches == "crop":
            return choose(self._cropped(network, weights, prediction, images, observe))

        def select(rows: PatchBatch) -> PatchBatch:
            if observe:
                self.threshold.update(*self.threshold.classes_and_coverage(rows))
            return choose(rows)

        return patch_embeddings(
            features,
            halved(weights),
            self.config.patch_size // network.feature_stride,
            coverage=self.threshold.value,
            prediction=halved(prediction),
            select=select,
        )

    def _cropped(
        self, network: SegmentationNetwork, weights: Tensor, prediction: Tensor, images: Tensor, observe: bool
    ) -> PatchBatch:
        size = self.config.patch_size
        least = 2 ** (len(self.config.channel_list) - 1)
        encoder_size = -(-max(size, 2 * least) // least) * least
        crops = class_patches(
            images,
            weights,
            size,
            self.num_classes,
            coverage=self.threshold.value,
            max_patches=self.config.crops_per_class,
            output_size=encoder_size,
        )
        if observe:
            every = class_patches(weights.sum(dim=1, keepdim=True), weights, size, self.num_classes, max_patches=8)
            self.threshold.update(every.coverage, every.labels)
        if len(crops.labels) == 0:
            width = 2 * network.arguments["channels"][0]
            nothing = images.new_zeros(0)
            return PatchBatch(images.new_zeros(0, width), crops.labels, nothing, nothing, crops.index)
        _, features = network.with_features(crops.images)
        h = -torch.special.xlogy(prediction, prediction).sum(dim=1)
        entropy = []
        for (b, *first), k in zip(crops.index.tolist(), crops.labels.tolist()):
            place = tuple(slice(f, f + size) for f in first)
            w = weights[(b, k, *place)]
            entropy.append((w * h[(b, *place)]).sum() / w.sum())
        return PatchBatch(
            features.flatten(2).mean(dim=2), crops.labels, torch.stack(entropy), crops.coverage, crops.index
        )

    @torch.no_grad()
    def teacher_keys(
        self,
        teacher: SegmentationNetwork,
        features: Tensor,
        weights: Tensor,
        prediction: Tensor,
        images: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, labels and entropies of the teacher's patches, which are queued."""
        choose = partial(at_most, per_class=self.config.keys_per_class, hardest=False, generator=generator)
        batch = self.patches(teacher, features, weights, prediction, images, choose=choose)
        keys = teacher.projection(batch.embeddings)
        if self.config.loss == "gaussian":
            self.gaussian.enqueue(keys, batch.labels)
        elif self.queue is not None:
            self.queue.enqueue(keys, batch.labels, batch.entropy)
        return keys, batch.labels, batch.entropy

    def forward(
        self,
        student: SegmentationNetwork,
        features: Tensor,
        weights: Tensor,
        prediction: Tensor,
        images: Tensor,
        keys: tuple[Tensor, Tensor, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """The contrastive loss of the student's patches against the queue, or against `keys` without one."""
        count, hardest = self.config.anchors_per_class, self.config.hard_anchors
        choose = partial(at_most, per_class=count, hardest=hardest, generator=generator)
        batch = self.patches(student, features, weights, prediction, images, choose=choose, observe=True)
        anchors = student.projection(batch.embeddings)
        if self.config.loss == "gaussian":
            queue = self.gaussian.queue
            if self.config.hard_negatives:
                means, covariances = hard_negative_statistics(anchors, batch.labels, queue, generator=generator)
            else:
                means, covariances = queue.statistics()
            return gaussian_contrast_loss(anchors, batch.labels, means, covariances, queue.counts)
        if self.queue is not None:
            held = self.queue.keys()
            assert held.descriptors is not None
            keys = (held.keys, held.labels, held.descriptors.squeeze(1))
        return self.infonce(
            anchors,
            batch.labels,
            batch.entropy.to(anchors.dtype),
            keys=keys[0],
            key_labels=keys[1],
            key_descriptors=keys[2],
        )


# --- one step -------------------------------------------------------------------------------------------------------


class Step:
    """The losses of one training step and their gradients.

    Args:
        student, teacher: networks of the same architecture; gradients are left in the student.
        contrast: or None.
        section: names a part of the step for the profile.
    """

    def __init__(
        self,
        student: SegmentationNetwork,
        teacher: SegmentationNetwork,
        contrast: PatchContrast | None,
        config: TrainConfig,
        section: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ) -> None:
        self.student, self.teacher, self.contrast = student, teacher, contrast
        self.config, self.section = config, section
        self.make_views, self.base_loss = BASES[config.consistency]

    def __call__(self, batch: dict[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Leaves gradients; returns the losses, detached, on the device."""
        config = self.config
        autocast = torch.autocast(batch["image"].device.type, torch.bfloat16, enabled=config.amp)
        semi = "strong" in batch
        prediction = teacher_features = None
        if semi or self.contrast is not None:
            with self.section("teacher"), torch.no_grad(), autocast:
                prediction, teacher_features = self._ask_teacher(batch, semi)
        with self.section("views"):
            if semi:
                views = self.make_views(batch, prediction, config, generator)
            else:
                ones = torch.ones_like(batch["label"], dtype=batch["image"].dtype)
                views = Views(batch["image"], batch["label"], ones, ones, ones.bool(), prediction, len(ones))
        with self.section("student forward"), autocast:
            logits, features = self.student.with_features(views.images)
        with self.section("loss"):
            if semi:
                base = self.base_loss(logits, views, config, self._ramp(step))
            else:
                base = segmentation_loss(logits, views.target)
        losses = {"segmentation": base.detach()}
        if self.contrast is None:
            with self.section("backward"):
                base.backward()
            return losses
        with self.section("contrast"):
            assert prediction is not None
            assert teacher_features is not None
            seen = _labelled_and(batch, batch["weak"], prediction) if semi else views
            # The contrast ends at a copy of the features, so that its own backward pass can be told apart.
            leaf = features.detach().float().requires_grad_()
            losses["contrast"] = self._contrast(self.contrast, views, leaf, seen, teacher_features.float(), generator)
        with self.section("backward"):
            if leaf.grad is None:  # crops have their own way through the network
                base.backward()
            else:
                torch.autograd.backward([base, features], [None, leaf.grad.to(features.dtype)])
        return losses

    def _ask_teacher(self, batch: dict[str, Tensor], semi: bool) -> tuple[Tensor, Tensor]:
        """Probabilities of labelled and unlabelled images, and features. Labelled ones are asked for keys alone."""
        labelled = batch["image"] if self.contrast is not None else batch["image"][:0]
        logits, features = self.teacher.with_features(torch.cat([labelled, batch["weak"]]) if semi else labelled)
        prediction = logits.float().softmax(dim=1)
        if len(labelled) == 0:
            prediction = torch.cat([prediction.new_zeros(len(batch["image"]), *prediction.shape[1:]), prediction])
        return prediction, features

    def _ramp(self, step: int) -> float:
        """From exp(-5) to 1 over the first third of the semi-supervised steps."""
        third = max(1.0, (self.config.steps - self.config.warmup) / 3)
        return math.exp(-5 * (1 - min(1.0, (step - self.config.warmup) / third)) ** 2)

    def _contrast(
        self,
        contrast: PatchContrast,
        views: Views,
        features: Tensor,
        seen: Views,
        teacher_features: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Queues keys of what the teacher has `seen`, contrasts the student's patches; gradients end at `features`."""
        k = self.student.arguments["num_classes"]
        assert seen.prediction is not None
        assert views.prediction is not None
        keys = contrast.teacher_keys(
            self.teacher, teacher_features, seen.class_weights(k), seen.prediction, seen.images, generator
        )
        weights = views.class_weights(k, annotated=self.config.anchors == "labelled")
        value = contrast(self.student, features, weights, views.prediction, views.images, keys, generator)
        (self.config.contrast_weight * value).backward()
        return value.detach()
