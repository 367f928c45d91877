"""Predicts a labelled case and scores it against its label: for the validation of a training, and for evaluate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pglcl.labels import IGNORE
from pglcl.layouts import Case
from pglcl.predict import Predictor, Report
from pglcl.scores import Score, score_volume
from pglcl.volumes import read_label


def score_case(
    predictor: Predictor, case: Case, *, distances: bool = True, report: Report | None = None
) -> list[Score]:
    """The scores of one labelled case. `distances` is that of :func:`score_volume`; `report` is told the progress."""
    mask, truth, spacing = _predicted(predictor, case, report)
    mask = without_ignored(mask, truth)
    labels = predictor.models[0].labels
    values = [values[0] for values in labels.values]
    of_case: dict[str, Any] = {"patient": case.patient, "case": case.name, "values": values, "distances": distances}
    return score_volume(mask, truth, len(labels), spacing, **of_case)


def predicted_and_true(predictor: Predictor, case: Case) -> tuple[Tensor, Tensor]:
    """The predicted and the true mask (X, Y, Z) of a labelled case; the true one is -1 where it is to be ignored."""
    return _predicted(predictor, case, None)[:2]


def without_ignored(mask: Tensor, truth: Tensor) -> Tensor:
    """`mask`, with -1 where the truth is to be ignored.

    This comes after all post-processing, which sees a mask without knowing its truth.
    """
    ignored = truth == IGNORE
    return torch.where(ignored, IGNORE, mask.int()) if ignored.any() else mask


def _predicted(predictor: Predictor, case: Case, report: Report | None) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    prediction, prepared = predictor(case, report)
    spacing = prepared.spacing
    mask = prediction.mask()
    del prediction, prepared  # before the truth is read: both may be large
    return mask, true_mask(predictor, case), spacing


def true_mask(predictor: Predictor, case: Case) -> Tensor:
    """The mask (X, Y, Z) of a labelled case, in the classes of the model; -1 where it is to be ignored."""
    assert case.label is not None
    return torch.from_numpy(read_label(case.label, case.images[0], predictor.models[0].labels))
