"""Chooses the classes of which only the largest component is kept: in pseudo-labels, and in masks."""

from __future__ import annotations

import math

import torch

from pglcl.case_scores import predicted_and_true
from pglcl.config import TrainConfig
from pglcl.model import TrainedModel
from pglcl.postprocess import keep_largest, single_organs
from pglcl.predict import Predictor
from pglcl.ranks import Ranks
from pglcl.scores import score_volume
from pglcl.training_data import TrainingData


def organs_of_pseudo_labels(config: TrainConfig, data: TrainingData) -> list[int]:
    """The classes of which a pseudo-label keeps only the largest component."""
    if not config.semi or config.clean_pseudo_labels == "none":
        return []
    if config.clean_pseudo_labels == "largest-component":
        return list(range(1, data.num_classes))
    volumes = [one.label for one in data.labelled if one.label is not None]
    seen = volumes if config.spatial_dims == 3 else (z for volume in volumes for z in volume.unbind(-1))
    return single_organs(seen, data.num_classes)


def organs_of_masks(model: TrainedModel, data: TrainingData, ranks: Ranks) -> tuple[int, ...] | None:
    """The classes whose masks should keep only their largest component, by nnU-Net's rule.

    Such a class is one organ in the labels of the labelled patients, and its mean Dice on the validation patients is no
    worse with the largest component alone. None without validation patients.
    """
    if not data.validation:
        return None
    k = data.num_classes
    # For each class, the sum of Dice over the volumes that have it: as predicted, and with the largest component alone.
    sums = torch.zeros(2, k, dtype=torch.float64)
    predictor = Predictor([model], postprocess="none")
    for case in data.validation[ranks.rank :: ranks.size]:
        mask, truth = predicted_and_true(predictor, case)
        for row, shown in enumerate((mask, keep_largest(mask, range(1, k)))):
            for score in score_volume(shown, truth, k, (1, 1, 1), patient="", case="", distances=False):
                sums[row, score.class_index] += 0 if math.isnan(score.dice) else score.dice
    plain, kept = torch.tensor(ranks.sum(sums.flatten().tolist())).view(2, k)
    one = single_organs((v.label for v in data.labelled if v.label is not None), k)
    return tuple(label for label in one if kept[label] >= plain[label])
