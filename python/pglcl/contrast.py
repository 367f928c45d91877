"""The patch-wise contrast on top of any base (method, sections 8 and 9)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pglcl.bases import ViewBatch
from pglcl.config import TrainConfig
from pglcl.model import SegmentationNetwork
from pglcl_ext import (
    CoverageThreshold,
    EmbeddingQueue,
    GaussianContrastLoss,
    PatchBatch,
    PatchContrastLoss,
    PatchRows,
    class_patches,
    patch_embeddings,
)
from pglcl_ext.distributed import gather_rows

CROPS_OBSERVED = 8  # of a class and image, to move the coverage threshold by


class Keys(NamedTuple):
    """What anchors are compared with: embeddings (M, D), labels (M,) int64, entropies (M,)."""

    embeddings: Tensor
    labels: Tensor
    entropies: Tensor


def halved(x: Tensor) -> Tensor:
    """(B, C, *S) to half the resolution; average pooling does the same, several times slower on a CPU."""
    for axis in range(2, x.dim()):
        even, odd = (x[(*[slice(None)] * axis, slice(first, None, 2))] for first in (0, 1))
        x = (even + odd) * 0.5
    return x


Rows = TypeVar("Rows", PatchRows, PatchBatch)


def limit_per_class(rows: Rows, count: int, hardest: bool, generator: torch.Generator | None) -> Rows:
    """Rows that qualify, `count` (0: all) of a class: the least certain, or a random sample."""
    rows = rows.compact()  # the losses leave out the others; projecting them would be for nothing
    if not count:
        return rows
    priority = rows.entropy if hardest else torch.rand(len(rows.labels), generator=generator).to(rows.labels.device)
    return rows.limited(count, priority).compact()


class PatchContrast(nn.Module):
    """Guided patches, keys of the teacher queued by class, and one of the two losses.

    Anchors are the student's patches, keys the teacher's, their classes given by annotation or pseudo-label. Patches
    are compared by the entropy of the teacher's prediction inside them.

    Args:
        config: the options of the run.
        num_classes: K.
        process_group: of the ranks that share their keys, or None.
    """

    def __init__(self, config: TrainConfig, num_classes: int, process_group: Any = None) -> None:
        super().__init__()
        self.config, self.num_classes, self.process_group = config, num_classes, process_group
        self.threshold = CoverageThreshold(num_classes, target=config.coverage_target)
        self.gaussian: GaussianContrastLoss | None = None
        self.infonce: PatchContrastLoss | None = None
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
            return
        bounds: dict[str, Any] = {}
        if config.guidance:
            bounds["max_positive_disparity"] = config.max_positive_disparity * math.log(num_classes)
            bounds["min_negative_disparity"] = config.min_negative_disparity * math.log(num_classes)
        if config.queue_length:
            self.queue = EmbeddingQueue(
                num_classes,
                config.embedding_dim,
                config.queue_length,
                descriptor_dim=1,
                process_group=process_group,
            )
        # Queues of all ranks hold the keys of all ranks; without one, the loss gathers them.
        group = None if config.queue_length else process_group
        self.infonce = PatchContrastLoss(config.temperature, normalize=False, group=group, **bounds)

    def forward(
        self,
        student: SegmentationNetwork,
        views: ViewBatch,
        features: Tensor,
        keys: Keys,
        generator: torch.Generator,
    ) -> Tensor:
        """The contrastive loss of the student's patches against the queue, or against `keys` without one.

        Args:
            views: what the student saw; with the teacher's prediction.
            features: of the student, (B, F, *S / 2); gradients flow to them.
            keys: those of this step, from :meth:`teacher_keys`.
            generator: of a random sample of anchors and of hard negatives.
        """
        batch = self.patches(
            student,
            views,
            features,
            annotated=self.config.anchors == "labelled",
            count=self.config.anchors_per_class,
            hardest=self.config.hard_anchors,
            generator=generator,
            observe=True,
        )
        anchors = student.projection(batch.embeddings)
        if self.gaussian is not None:
            gaussian: Tensor = self.gaussian(anchors, batch.labels, generator=generator)
            return gaussian
        assert self.infonce is not None
        if self.queue is not None:
            held = self.queue.keys()
            assert held.descriptors is not None
            keys = Keys(held.keys, held.labels, held.descriptors.squeeze(1))
        loss: Tensor = self.infonce(
            anchors,
            batch.labels,
            batch.entropy.to(anchors.dtype),
            keys=keys.embeddings,
            key_labels=keys.labels,
            key_descriptors=keys.entropies,
        )
        return loss

    @torch.no_grad()
    def teacher_keys(
        self, teacher: SegmentationNetwork, seen: ViewBatch, features: Tensor, generator: torch.Generator
    ) -> Keys:
        """Keys of the teacher's patches, which are queued.

        Args:
            seen: what the teacher saw.
            features: of the teacher, (B, F, *S / 2).
        """
        batch = self.patches(teacher, seen, features, count=self.config.keys_per_class, generator=generator)
        keys = Keys(teacher.projection(batch.embeddings), batch.labels, batch.entropy)
        if self.gaussian is not None:
            self.gaussian.enqueue(keys.embeddings, keys.labels)
        elif self.queue is not None:
            self.queue.enqueue(*keys)
        return keys

    def patches(
        self,
        network: SegmentationNetwork,
        views: ViewBatch,
        features: Tensor,
        *,
        annotated: bool = False,
        count: int = 0,
        hardest: bool = False,
        generator: torch.Generator | None = None,
        observe: bool = False,
    ) -> PatchBatch:
        """Class-aware patches with their embeddings, pooled or cropped: those that qualify.

        Args:
            count, hardest, generator: which of them at most, as for :func:`limit_per_class`.
            annotated: only annotated pixels count.
            observe: move the threshold by all patches.
        """
        assert views.prediction is not None
        weights = views.class_weights(self.num_classes, annotated=annotated)
        if self.config.patches == "crop":
            crops = self._cropped(network, weights, views.prediction, views.images, observe)
            return limit_per_class(crops, count, hardest, generator)

        def select(rows: PatchRows) -> PatchRows:
            if observe:
                self._move_threshold(*self.threshold.coverage_and_classes(rows))
            return limit_per_class(rows, count, hardest, generator)

        return patch_embeddings(
            features,
            halved(weights),
            self.config.patch_size // network.feature_stride,
            coverage=self.threshold.value,
            prediction=halved(views.prediction),
            select=select,
        )

    def _move_threshold(self, coverage: Tensor, labels: Tensor) -> None:
        """By the patches of all ranks, so that every rank has the same, and a checkpoint of one holds that of all."""
        if self.process_group is not None:
            coverage, labels = gather_rows([coverage, labels], self.process_group)
        self.threshold.update(coverage, labels)

    def _cropped(
        self, network: SegmentationNetwork, weights: Tensor, prediction: Tensor, images: Tensor, observe: bool
    ) -> PatchBatch:
        """Crops of the images, encoded again: one embedding of each, its mean feature."""
        size, deepest = self.config.patch_size, network.stride
        crops = class_patches(
            images,
            weights,
            size,
            self.num_classes,
            coverage=self.threshold.value,
            max_patches=self.config.crops_per_class,
            output_size=-(-max(size, 2 * deepest) // deepest) * deepest,
        )
        if observe:
            space = weights.sum(dim=1, keepdim=True)
            every = class_patches(space, weights, size, self.num_classes, max_patches=CROPS_OBSERVED)
            self._move_threshold(every.coverage, every.labels)
        if len(crops.labels) == 0:
            nothing = images.new_zeros(0)
            embeddings = images.new_zeros(0, network.feature_channels)
            return PatchBatch(embeddings, crops.labels, nothing, nothing, crops.index)
        _, features = network.with_features(crops.images)
        embeddings = features.flatten(2).mean(dim=2)
        entropy = _entropy_of_crops(crops.index, crops.labels, weights, prediction, size)
        return PatchBatch(embeddings, crops.labels, entropy, crops.coverage, crops.index)


def _entropy_of_crops(index: Tensor, labels: Tensor, weights: Tensor, prediction: Tensor, size: int) -> Tensor:
    """(N,): the entropy of the prediction, averaged over each crop with the weights of its class."""
    h = -torch.special.xlogy(prediction, prediction).sum(dim=1)
    entropy = []
    for (b, *first), k in zip(index.tolist(), labels.tolist()):
        place = tuple(slice(f, f + size) for f in first)
        w = weights[(b, k, *place)]
        entropy.append((w * h[(b, *place)]).sum() / w.sum())
    return torch.stack(entropy)
