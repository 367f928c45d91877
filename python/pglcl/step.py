"""The loss of a training step: the teacher predicts, the student sees its views, and both losses are added."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pglcl.bases import Taught, ViewBatch, labelled_alone, labelled_and, make_base, segmentation_loss
from pglcl.config import TrainConfig
from pglcl.contrast import PatchContrast
from pglcl.model import SegmentationNetwork
from pglcl.postprocess import Organ

CONTRAST_RAMP = 0.3  # share of the steps in which the weight of the contrast rises, and falls again


class StepLoss(nn.Module):
    """The loss of a batch, for one ``backward()``.

    It is a module, so that :class:`~torch.nn.parallel.DistributedDataParallel` can wrap it. Its trained parameters are
    those of the student.

    Args:
        student, teacher: networks of the same architecture. The teacher needs no gradient.
        contrast: the contrastive loss, or None.
        config: the options of the run.
        organs: those of which a pseudo-label keeps only the largest component.
        section: opens a named section of the step, for the profile.
    """

    def __init__(
        self,
        student: SegmentationNetwork,
        teacher: SegmentationNetwork,
        contrast: PatchContrast | None,
        config: TrainConfig,
        organs: Sequence[Organ] = (),
        section: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.contrast = student, teacher, contrast
        self.config, self.organs, self.section = config, organs, section
        self.base = make_base(config)

    def forward(
        self, batch: dict[str, Tensor], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its detached parts: segmentation and, if there is one, contrast.

        Args:
            batch: of :class:`~pglcl.batches.StepBatches`, on the device.
            step: its number, from 0.
            generator: draws everything random; on the CPU.
        """
        autocast = torch.autocast(batch["image"].device.type, torch.bfloat16, enabled=self.config.amp)
        semi = "strong" in batch
        taught = teacher_features = None
        if semi or self.contrast is not None:
            with self.section("teacher"), torch.no_grad(), autocast:
                prediction, teacher_features = self._ask_teacher(batch)
            with self.section("pseudo-labels"):
                taught = Taught.of(prediction, len(batch["image"]), self.organs)
        with self.section("views"):
            if semi:
                assert taught is not None
                views = self.base.views(batch, taught, generator)
            else:
                alone = labelled_alone(batch, None if taught is None else taught.prediction)
                views = self.base.warmup_views(alone, generator) if self.config.semi else alone
        with self.section("student forward"), autocast:
            logits, features = self.student.with_features(views.images, self._kept_features(views, generator))
        with self.section("loss"):
            if semi:
                loss = self.base.loss(logits, views, self._ramp(step))
            else:
                loss = segmentation_loss(logits, views.target)
        parts = {"segmentation": loss.detach()}
        if self.contrast is None:
            return loss, parts
        with self.section("contrast forward"):
            assert taught is not None
            assert teacher_features is not None
            seen = labelled_and(batch, batch["weak"], taught) if semi else alone
            keys = self.contrast.teacher_keys(self.teacher, seen, teacher_features.float(), generator)
            shown = views.strongly_augmented()
            student = logits[: len(shown.images)].detach().float().softmax(dim=1)
            # A slice of all images would cost the backward pass a copy.
            own_features = (features[: len(shown.images)] if views.weak else features).float()
            contrast = self.contrast(self.student, shown, student, own_features, keys, generator)
        parts["contrast"] = contrast.detach()
        return loss + self._contrast_weight(step) * contrast, parts

    def _kept_features(self, views: ViewBatch, generator: torch.Generator) -> Tensor | None:
        """(B, features, 1, ...): the factor of each feature channel; None if there are no weak views to lose any."""
        if not views.weak:
            return None
        share = 1 - self.config.feature_dropout
        shape = (views.weak, self.student.feature_channels)
        kept = torch.ones(len(views.images), shape[1])
        kept[-views.weak :] = (torch.rand(shape, generator=generator) < share) / share
        return kept.view(*kept.shape, *[1] * self.config.spatial_dims).to(views.images.device)

    def _ask_teacher(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Probabilities of labelled and unlabelled images, and features.

        Only the contrast needs those of labelled images. Without it, their probabilities are 0.
        """
        labelled = batch["image"] if self.contrast is not None else batch["image"][:0]
        images = torch.cat([labelled, batch["weak"]]) if "weak" in batch else labelled
        logits, features = self.teacher.with_features(images)
        prediction = logits.float().softmax(dim=1)
        if len(labelled) == 0:
            prediction = torch.cat([prediction.new_zeros(len(batch["image"]), *prediction.shape[1:]), prediction])
        return prediction, features

    def _contrast_weight(self, step: int) -> float:
        """The weight of the contrast. It rises over the first 30 % of the steps, since features mean little at first.

        It falls to 0 over the last 30 %, when outlines are what is left to learn.
        """
        weight, done = self.config.contrast_weight, step / self.config.steps
        if self.config.contrast_schedule == "constant":
            return weight
        return weight * min(1.0, done / CONTRAST_RAMP, (1 - done) / CONTRAST_RAMP)

    def _ramp(self, step: int) -> float:
        """The trust in the teacher. It rises from exp(-5) to 1 over the first third of the semi-supervised steps."""
        begin = self.config.warmup_steps
        third = max(1.0, (self.config.steps - begin) / 3)
        return math.exp(-5 * (1 - min(1.0, (step - begin) / third)) ** 2)
