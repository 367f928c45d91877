"""Chooses the organs of which only the largest component is kept: in pseudo-labels, and in masks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from monai.data.utils import dense_patch_slices
from torch import Tensor

from pglcl.case_scores import predicted_and_true, without_ignored
from pglcl.config import TrainConfig
from pglcl.model import TrainedModel
from pglcl.postprocess import Organ, all_together, each_class, keep_largest, single_organs
from pglcl.predict import Predictor
from pglcl.ranks import Ranks
from pglcl.scores import score_volume
from pglcl.training_data import TrainingData


def organs_of_pseudo_labels(config: TrainConfig, data: TrainingData) -> list[Organ]:
    """The classes, each for itself, of which a pseudo-label keeps only the largest component."""
    every = each_class(data.num_classes)
    if not config.semi or config.clean_pseudo_labels == "none":
        return []
    if config.clean_pseudo_labels == "largest-component":
        return every
    volumes = [one.label for one in data.labelled if one.label is not None]
    seen = volumes if config.spatial_dims == 3 else (z for volume in volumes for z in volume.unbind(-1))
    return single_organs((part for mask in seen for part in _parts(mask, config)), every)


def _parts(mask: Tensor, config: TrainConfig) -> Iterator[Tensor]:
    """Parts of a slice or volume that a network may see; they may cut a ring in two.

    They are a quarter of their size apart, in volumes a half, since a quarter takes ten seconds for a large volume.
    """
    if config.whole_slices:
        yield mask
        return
    size = [min(n, side) for n, side in zip(config.size, mask.shape)]
    share = 4 if config.spatial_dims == 2 else 2
    for place in dense_patch_slices(mask.shape, size, [max(1, n // share) for n in size]):
        if (mask[place] > 0).any():
            yield mask[place]


def organs_of_masks(model: TrainedModel, data: TrainingData, ranks: Ranks) -> tuple[Organ, ...] | None:
    """The organs of which a mask should keep only the largest component, by nnU-Net's rule.

    First all classes together, then each class. They must be one organ in the labels of the labelled patients, and the
    Dice on the validation patients must be no worse with the largest component alone: the mean over all classes for
    all together, that of the class for one. None without validation patients.
    """
    if not data.validation:
        return None
    k = data.num_classes
    together, each = all_together(k), each_class(k)
    candidates = [together, *each] if k > 2 else each
    one = single_organs((v.label for v in data.labelled if v.label is not None), candidates)
    joint = together in one and k > 2
    # As predicted and with all classes together, each without and with the largest component of every class.
    ways = [(), each, *([[together], [together, *each]] if joint else [])]
    # Of Dice over the volumes that have the class, for each way; and the number of those volumes.
    sums = torch.zeros(len(ways) + 1, k, dtype=torch.float64)
    predictor = Predictor([model], postprocess="none")
    for case in data.validation[ranks.rank :: ranks.size]:
        mask, truth = predicted_and_true(predictor, case)
        for row, way in enumerate(ways):
            kept = without_ignored(keep_largest(mask, way), truth)
            for score in score_volume(kept, truth, k, (1, 1, 1), patient="", case="", distances=False):
                if not math.isnan(score.dice):
                    sums[row, score.class_index] += score.dice
                    sums[-1, score.class_index] += row == 0
    *totals, volumes = torch.tensor(ranks.sum(sums.flatten().tolist())).view(-1, k)
    dice = torch.stack(totals) / volumes.clamp(min=1)
    chosen: list[Organ] = []
    plain, each_kept = dice[:2]
    if joint and dice[2].sum() >= plain.sum():
        chosen.append(together)
        plain, each_kept = dice[2:]
    return (*chosen, *(organ for organ in each if organ in one and each_kept[organ[0]] >= plain[organ[0]]))
