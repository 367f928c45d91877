"""One training step: views, base loss, contrast, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pglcl.bases import BASES, Views, _labelled_and, segmentation_loss
from pglcl.config import TrainConfig
from pglcl.contrast import PatchContrast
from pglcl.model import SegmentationNetwork


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
