"""The learner: student, teacher, contrast and optimiser, and one training step of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pglcl.case_scores import score_case
from pglcl.config import TrainConfig
from pglcl.contrast import PatchContrast
from pglcl.intensity import Intensity
from pglcl.labels import LabelMap
from pglcl.model import TrainedModel, network_for, update_teacher
from pglcl.organs import organs_of_pseudo_labels
from pglcl.predict import Predictor
from pglcl.ranks import Ranks, averaging
from pglcl.record import Profile
from pglcl.scores import Score, patient_means
from pglcl.step import StepLoss
from pglcl.training_data import TrainingData


class Learner:
    """Student, teacher, contrast and optimiser: the content of a checkpoint, and one training step.

    Args:
        config: the options of the run.
        data: the prepared volumes.
        ranks: the processes that train together.
        profile: measures the sections of a step.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, ranks: Ranks, profile: Profile) -> None:
        self.config, self.data, self.ranks, self.profile = config, data, ranks, profile
        torch.manual_seed(config.seed)
        self.student = network_for(config, data.channels, data.num_classes).to(ranks.device)
        self.teacher = network_for(config, data.channels, data.num_classes).to(ranks.device).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.contrast: PatchContrast | None = None
        if config.contrast:
            self.contrast = PatchContrast(config, data.num_classes, ranks.group).to(ranks.device)
        else:
            self.student.projection.requires_grad_(False)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.organs = organs_of_pseudo_labels(config, data)
        self.best: dict[str, float] = {"step": 0, "dice": -1.0}  # of the validations so far
        self.loss: nn.Module = StepLoss(self.student, self.teacher, self.contrast, config, self.organs, profile)
        if ranks.size > 1:
            self.loss = averaging(self.loss, config)

    def start_from(self, model: TrainedModel) -> None:
        """Gives student and teacher the weights of another run. :func:`initial_model` has checked that they fit."""
        for network in (self.student, self.teacher):
            network.load_state_dict(model.network.state_dict())

    def step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Takes step `step`, counted from 0; returns the losses, on the device."""
        config, ranks = self.config, self.ranks
        for options in self.optimizer.param_groups:
            options["lr"] = config.learning_rate * (1 - step / config.steps) ** 0.9
        # Every random draw of a step comes from this generator, so a resumed run draws the same.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step * 101 + ranks.rank)
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor
        parts: dict[str, Tensor]
        loss, parts = self.loss(batch, step, generator)
        with self.profile("backward"):
            loss.backward()
        with self.profile("update"):
            self.optimizer.step()
            update_teacher(self.teacher, self.student, config.ema_decay, step)
        return parts

    def model(self, step: int) -> TrainedModel:
        """The teacher after `step` steps, with what it needs to know of the data."""
        found = self.data.survey
        return TrainedModel(
            self.teacher,
            self.config,
            found.slice_axis,
            found.labels,
            found.intensity,
            step,
            resolution=found.resolution,
            levels=found.levels,
            description=found.description,
        )

    def state(self, step: int) -> dict[str, Any]:
        """All that a run needs to go on after `step` steps."""
        state = {
            "step": step,
            "best": self.best,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model": self.model(step).state(),
        }
        return state if self.contrast is None else {**state, "contrast": self.contrast.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over a state. Raises KeyError, RuntimeError or ValueError for that of another network."""
        optimizer = state["optimizer"]
        if state["step"] and len(optimizer["state"]) != len(self.parameters):
            raise ValueError(f"its optimiser has {len(optimizer['state'])} of {len(self.parameters)} parameters")
        self._compare_survey(state["model"])
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["model"]["network"])
        self.optimizer.load_state_dict(optimizer)
        self.best = {name: state["best"][name] for name in ("step", "dice")}
        if self.contrast is not None:
            self.contrast.load_state_dict(state["contrast"])

    def _compare_survey(self, model: dict[str, Any]) -> None:
        """Compares the classes, slice axis and intensities of a run with those that the data have now.

        They may differ although the volumes are the same, if dataset.json has changed.
        """
        now, labels, intensity = self.data.survey, LabelMap.from_state(model["labels"]), model["intensity"]
        if labels != now.labels:
            raise ValueError(
                f"the run began with the classes {labels.describe()}; the data now have {now.labels.describe()}"
            )
        if model["slice_axis"] != now.slice_axis:
            raise ValueError(f"the run began with slices across axis {model['slice_axis']}; now axis {now.slice_axis}")
        began = Intensity.from_state(intensity)
        if not _same(began, now.intensity):
            raise ValueError(f"the run began with intensities {began.describe()}; now {now.intensity.describe()}")


def _same(first: Intensity, second: Intensity) -> bool:
    """Whether two normalisations differ at most in the last digits, which another machine may compute otherwise."""
    a, b = first.channels, second.channels
    return [c.kind for c in a] == [c.kind for c in b] and all(
        np.allclose([x.low, x.high, x.mean, x.std], [y.low, y.high, y.mean, y.std], rtol=1e-6) for x, y in zip(a, b)
    )


def validation_dice(learner: Learner, step: int) -> float:
    """The teacher's mean Dice on the validation patients; NaN without any. Each rank scores a share of them."""
    ranks = learner.ranks
    scores: list[Score] = []
    for case in learner.data.validation[ranks.rank :: ranks.size]:
        scores += score_case(Predictor([learner.model(step)]), case, distances=False)
    means = list(patient_means(scores, "dice").values())
    if ranks.size == 1:
        return float(np.mean(means)) if means else math.nan
    total, count = ranks.sum([sum(means), len(means)])
    return total / count if count else math.nan
