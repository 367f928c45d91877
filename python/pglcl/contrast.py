"""The patch-wise contrast on top of any base (METHOD sections 8 and 9)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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
