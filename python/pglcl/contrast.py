"""The patch-wise contrast, which is added to any base method (method, sections 8 and 9)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pglcl.bases import ViewBatch
from pglcl.config import TrainConfig
from pglcl.model import SegmentationNetwork
from pglcl_ext import (
    ClassPatches,
    CoverageThreshold,
    EmbeddingQueue,
    GaussianContrastLoss,
    PatchBatch,
    PatchContrastLoss,
    PatchRows,
    Side,
    class_patches,
    patch_embeddings,
)
from pglcl_ext.distributed import gather_rows
from pglcl_ext.patch_statistics import pixel_entropy

MIXED_APART = 1e3  # nats; no two entropies differ so much
CROPS_OBSERVED = 8  # crops of each class and image that move the coverage threshold


@dataclass(frozen=True)
class Guidance:
    """The choice of positives and negatives by the options of a run: for the loss, and for the report.

    Two descriptors guide the choice: the entropy of a prediction in the patch, and whether the patch is mixed, that is,
    whether its class fills only a part of it. The second descriptor is 0 or MIXED_APART, and a difference of
    MIXED_APART exceeds every bound. So a mixed patch and a filled one of the same class are neither positives nor
    negatives of each other.

    Args:
        config: the options of the run.
        num_classes: K.
    """

    config: TrainConfig
    num_classes: int

    @property
    def told_apart(self) -> bool:
        """Whether there is a descriptor of mixed patches."""
        return self.config.mixed_patches != "together" and self.config.loss == "infonce"

    @property
    def dims(self) -> int:
        """The number of descriptors."""
        return 1 + self.told_apart

    @property
    def bounds(self) -> dict[str, Any]:
        """`max_positive_disparity` and `min_negative_disparity` in nats, as :class:`PatchContrastLoss` takes them."""
        bounds: dict[str, Any] = {"max_positive_disparity": MIXED_APART / 4} if self.told_apart else {}
        if self.config.guidance:
            unit = math.log(self.num_classes) / self.dims  # disparity is the mean over the descriptors
            bounds["max_positive_disparity"] = self.config.max_positive_disparity * unit
            bounds["min_negative_disparity"] = self.config.min_negative_disparity * unit
        return bounds

    def mixed(self, coverage: Tensor) -> Tensor:
        """(N,) bool, of the share (N,) of each patch that its class covers."""
        return coverage < self.config.inside_coverage

    def descriptors(self, entropy: Tensor, coverage: Tensor, *, keys: bool = False) -> Tensor:
        """(N, 1): the entropy (N,); or (N, 2): the entropy, and MIXED_APART for a mixed patch, 0 for another."""
        if not self.told_apart:
            return entropy[:, None]
        # With the sign opposite to that of anchors, a mixed key differs from all anchors of its class, mixed or not.
        apart = -MIXED_APART if keys and self.config.mixed_patches == "leave-out" else MIXED_APART
        return torch.stack([entropy, apart * self.mixed(coverage)], dim=1)


def halved(x: Tensor) -> Tensor:
    """(B, C, *S) at half the resolution. Average pooling gives the same, but takes several times longer on a CPU."""
    for axis in range(2, x.dim()):
        even, odd = (x[(*[slice(None)] * axis, slice(first, None, 2))] for first in (0, 1))
        x = (even + odd) * 0.5
    return x


Rows = TypeVar("Rows", PatchRows, PatchBatch)


def limit_per_class(
    rows: Rows, count: int, priority: Callable[[Rows], Tensor] | None, generator: torch.Generator
) -> Rows:
    """At most `count` (0: all) qualifying rows of each class: those of the highest priority, or a random sample."""
    rows = rows.compact()  # the losses would leave out the other rows after they were projected
    if not count:
        return rows
    if priority is None:
        return rows.limited(count, torch.rand(len(rows.labels), generator=generator).to(rows.labels.device)).compact()
    return rows.limited(count, priority(rows)).compact()


class PatchContrast(nn.Module):
    """One of the two contrastive losses, on guided patches and on the teacher's keys, which are queued by class.

    Anchors are patches of the student, keys are patches of the teacher. Annotations or pseudo-labels give their
    classes. An anchor is worth most where the student is unsure and the annotation, or the teacher, is sure.
    :class:`Guidance` chooses the pairs, by the entropy of the teacher's prediction.

    Args:
        config: the options of the run.
        num_classes: K.
        process_group: the ranks that share their keys; None: this process alone.
    """

    def __init__(self, config: TrainConfig, num_classes: int, process_group: Any = None) -> None:
        super().__init__()
        self.config, self.num_classes, self.process_group = config, num_classes, process_group
        self.guidance = Guidance(config, num_classes)
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
        if config.queue_length:
            self.queue = EmbeddingQueue(
                num_classes,
                config.embedding_dim,
                config.queue_length,
                descriptor_dim=self.guidance.dims,
                process_group=process_group,
            )
        # The queue of each rank holds the keys of all ranks. Without a queue, the loss gathers the keys.
        group = None if config.queue_length else process_group
        self.infonce = PatchContrastLoss(config.temperature, normalize=False, group=group, **self.guidance.bounds)

    def forward(
        self,
        student: SegmentationNetwork,
        views: ViewBatch,
        prediction: Tensor,
        features: Tensor,
        keys: Side,
        generator: torch.Generator,
    ) -> Tensor:
        """The contrastive loss of the student's patches against the queue, or against `keys` without one.

        Args:
            student: the network that projects the anchors.
            views: what the student saw; with the teacher's prediction.
            prediction: (B, K, *S), the student's probabilities.
            features: (B, F, *S / 2), the student's; gradients flow to them.
            keys: those of this step, from :meth:`teacher_keys`.
            generator: draws random anchors and hard negatives.

        Returns:
            The loss, a scalar.
        """
        config = self.config
        unsure = {"student": prediction, "teacher": views.prediction, "random": None}[config.anchor_order]
        weights = views.class_weights(self.num_classes, self._anchor_pixels(views))
        batch = self.patches(
            student, views, weights, features, config.anchors_per_class, generator, unsure=unsure, observe=True
        )
        anchors = student.projection(batch.embeddings)
        if self.gaussian is not None:
            gaussian: Tensor = self.gaussian(anchors, batch.labels, generator=generator)
            return gaussian
        assert self.infonce is not None
        if self.queue is not None:
            keys = self.queue.keys()
        loss: Tensor = self.infonce(
            anchors,
            batch.labels,
            self.guidance.descriptors(batch.entropy, batch.coverage).to(anchors.dtype),
            keys=keys.embeddings,
            key_labels=keys.labels,
            key_descriptors=keys.descriptors,
        )
        return loss

    def _anchor_pixels(self, views: ViewBatch) -> Tensor:
        """(B, *S): how much each pixel counts for an anchor."""
        if self.config.anchors == "labelled":
            return views.annotated.float()
        if self.config.anchors == "certain":
            return (views.certainty >= self.config.anchor_confidence).float()
        return views.certainty

    @torch.no_grad()
    def teacher_keys(
        self, teacher: SegmentationNetwork, seen: ViewBatch, features: Tensor, generator: torch.Generator
    ) -> Side:
        """Makes keys of the teacher's patches and queues them.

        Args:
            teacher: the network that projects the keys.
            seen: what the teacher saw.
            features: (B, F, *S / 2), the teacher's.
            generator: draws a random sample of keys.

        Returns:
            The keys of this step.
        """
        weights = seen.class_weights(self.num_classes)
        batch = self.patches(teacher, seen, weights, features, self.config.keys_per_class, generator)
        descriptors = self.guidance.descriptors(batch.entropy, batch.coverage, keys=True)
        keys = Side(teacher.projection(batch.embeddings), batch.labels, descriptors)
        if self.gaussian is not None:
            self.gaussian.enqueue(keys.embeddings, keys.labels)
        elif self.queue is not None:
            self.queue.enqueue(*keys)
        return keys

    def patches(
        self,
        network: SegmentationNetwork,
        views: ViewBatch,
        weights: Tensor,
        features: Tensor,
        count: int,
        generator: torch.Generator,
        *,
        unsure: Tensor | None = None,
        observe: bool = False,
    ) -> PatchBatch:
        """The class-aware patches that qualify, with their embeddings, pooled or cropped.

        Args:
            network: the network that encodes crops.
            views: what the network saw; with the teacher's prediction.
            weights: (B, K, *S), how much a pixel counts for a class.
            features: (B, F, *S / 2), the network's.
            count: largest number of patches of a class; 0: all.
            generator: draws a random sample.
            unsure: (B, K, *S), the prediction whose least certain patches are taken first; None: a random sample.
            observe: update the coverage threshold with all patches.
        """
        assert views.prediction is not None
        if self.config.patches == "crop":
            crops = self._cropped(network, weights, views.prediction, views.images, observe)
            size = self.config.patch_size
            priority = None if unsure is None else lambda rows: entropy_of_crops(rows, weights, unsure, size)
            return limit_per_class(self._inside(crops), count, priority, generator)
        weights, cell = halved(weights), self.config.patch_size // network.feature_stride

        def select(rows: PatchRows) -> PatchRows:
            if observe:
                self._move_threshold(*self.threshold.coverage_and_classes(rows))
            priority = (
                None if unsure is None else lambda chosen: _entropy_of_rows(chosen, weights, halved(unsure), cell)
            )
            return limit_per_class(self._inside(rows), count, priority, generator)

        return patch_embeddings(
            features,
            weights,
            cell,
            coverage=self.threshold.value,
            prediction=halved(views.prediction),
            select=select,
        )

    def _inside(self, rows: Rows) -> Rows:
        """Leaves mixed patches out of the Gaussian loss, whose statistics of a class cannot leave out single pairs."""
        if self.gaussian is None or self.config.mixed_patches == "together":
            return rows
        return rows._replace(labels=rows.labels.masked_fill(self.guidance.mixed(rows.coverage), -1))

    def _move_threshold(self, coverage: Tensor, labels: Tensor) -> None:
        """Updates the threshold with the patches of all ranks, so that all ranks and the checkpoint have the same."""
        if self.process_group is not None:
            coverage, labels = gather_rows([coverage, labels], self.process_group)
        self.threshold.update(coverage, labels)

    def _cropped(
        self, network: SegmentationNetwork, weights: Tensor, prediction: Tensor, images: Tensor, observe: bool
    ) -> PatchBatch:
        """Crops of the images, encoded again. The embedding of a crop is its mean feature."""
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
        if len(crops.labels):
            _, features = network.with_features(crops.images)
            embeddings = features.flatten(2).mean(dim=2)
        else:
            embeddings = images.new_zeros(0, network.feature_channels)
        entropy = entropy_of_crops(crops, weights, prediction, size)
        return PatchBatch(embeddings, crops.labels, entropy, crops.coverage, crops.index)


def entropy_of_crops(crops: PatchBatch | ClassPatches, weights: Tensor, prediction: Tensor, size: int) -> Tensor:
    """(N,): the entropy of the prediction, averaged over each crop with the weights of its class."""
    h = pixel_entropy(prediction)
    entropy = [h.new_zeros(0)]
    for (b, *first), k in zip(crops.index.tolist(), crops.labels.tolist()):
        place = tuple(slice(f, f + size) for f in first)
        w = weights[(b, k, *place)]
        entropy.append(((w * h[(b, *place)]).sum() / w.sum())[None])
    return torch.cat(entropy)


def _entropy_of_rows(rows: PatchRows, weights: Tensor, prediction: Tensor, cell: int) -> Tensor:
    """(N,): the entropy of the prediction, averaged over each cell of the patch grid with the weights of its class."""
    inside = weights * pixel_entropy(prediction)[:, None]
    pool = F.avg_pool2d if inside.dim() == 4 else F.avg_pool3d
    image, *place = rows.index.unbind(1)
    return pool(inside, cell)[(image, rows.labels, *place)] / rows.coverage
