"""Dice, HD95 and average surface distance per class and volume, with MONAI; tables with bootstrap intervals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
from torch import Tensor

from pglcl.cases import cases_of, distance_unit
from pglcl.errors import UserError
from pglcl.files import read_json, write_json, write_text
from pglcl.layouts import Case, open_folder
from pglcl.model import TrainedModel, load_model
from pglcl.predict import probabilities
from pglcl.prepare import prepare
from pglcl.volumes import read_label

METRICS = ("dice", "hd95", "asd")


@dataclass
class Score:
    """One class of one volume.

    status: ok; absent (not in the truth, no score), missed (in the truth, not predicted).
    """

    patient: str
    case: str
    label: int
    dice: float
    hd95: float
    asd: float
    status: str
    false_positive_voxels: int = 0


def one_hot_volume(y: Tensor, num_classes: int) -> Tensor:
    """(X, Y, Z) to (1, K, X, Y, Z)."""
    return torch.stack([y == k for k in range(num_classes)])[None].float()


def score_volume(
    prediction: Tensor,
    truth: Tensor,
    num_classes: int,
    spacing: Sequence[float],
    *,
    patient: str,
    case: str,
    distances: bool = True,
) -> list[Score]:
    """Scores of the classes from 1 on.

    A class that the truth lacks has no score (MONAI's convention: NaN, left out of means) and is counted as absent. A
    class that is there and was not predicted has Dice 0 and, as distances, the diagonal of the volume: the worst that
    could be.
    """
    p, t = one_hot_volume(prediction, num_classes), one_hot_volume(truth, num_classes)
    dice = compute_dice(p, t, include_background=False, ignore_empty=True)[0]
    diagonal = math.sqrt(sum((n * s) ** 2 for n, s in zip(truth.shape, spacing)))
    scores = []
    for k in range(1, num_classes):
        predicted, present = bool(p[0, k].any()), bool(t[0, k].any())
        if not present:
            scores.append(Score(patient, case, k, math.nan, math.nan, math.nan, "absent", int(p[0, k].sum())))
            continue
        hd95 = asd = math.nan
        if distances and predicted:
            pair = (p[:, [0, k]], t[:, [0, k]])
            hd95 = float(compute_hausdorff_distance(*pair, percentile=95, spacing=list(spacing)))
            asd = float(compute_average_surface_distance(*pair, symmetric=True, spacing=list(spacing)))
        elif distances:
            hd95 = asd = diagonal
        scores.append(Score(patient, case, k, float(dice[k - 1]), hd95, asd, "ok" if predicted else "missed"))
    return scores


def patient_means(scores: Sequence[Score], metric: str, label: int | None = None) -> dict[str, float]:
    """The mean over a patient's volumes (and classes, without `label`), without those that have no score."""
    values: dict[str, list[float]] = {}
    for score in scores:
        value = getattr(score, metric)
        if (label is None or score.label == label) and not math.isnan(value):
            values.setdefault(score.patient, []).append(value)
    return {patient: float(np.mean(v)) for patient, v in values.items()}


def bootstrap_interval(values: Sequence[float], *, draws: int = 10000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, patients drawn with replacement."""
    if len(values) == 0:
        return math.nan, math.nan
    data, random = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = data[random.integers(0, len(data), (draws, len(data)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(scores: Sequence[Score], class_names: dict[int, str], unit: str) -> list[dict]:
    """A row per class and one for their mean: mean, deviation and interval over patients of each metric."""
    rows = []
    labels = sorted({score.label for score in scores})
    for label in [*labels, None]:
        own = [s for s in scores if label is None or s.label == label]
        row: dict = {
            "class": "mean" if label is None else class_names.get(label, f"class {label}"),
            "label": label,
            "patients": len({s.patient for s in own}),
            "volumes": len({s.case for s in own}),
            "absent": sum(s.status == "absent" for s in own),
            "missed": sum(s.status == "missed" for s in own),
            "unit": unit,
        }
        for metric in METRICS:
            values = list(patient_means(own, metric).values())
            row[metric] = float(np.mean(values)) if values else math.nan
            row[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            row[f"{metric}_interval"] = bootstrap_interval(values)
        rows.append(row)
    return rows


def table(rows: Sequence[dict], *, title: str = "") -> str:
    """Markdown."""
    unit = rows[0]["unit"] if rows else ""
    head = ["class", "Dice", "95 %", f"HD95 [{unit}]", "95 %", f"ASD [{unit}]", "absent", "missed"]
    lines = [*([title, ""] if title else []), "| " + " | ".join(head) + " |", "| --- " + "| ---: " * 7 + "|"]
    for row in rows:
        cells = [row["class"]]
        for metric, digits in (("dice", 3), ("hd95", 2)):
            low, high = row[f"{metric}_interval"]
            cells += [
                f"{row[metric]:.{digits}f} ± {row[f'{metric}_std']:.{digits}f}",
                f"{low:.{digits}f}-{high:.{digits}f}",
            ]
        cells += [f"{row['asd']:.2f} ± {row['asd_std']:.2f}", str(row["absent"]), str(row["missed"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scores_csv(scores: Sequence[Score], class_names: dict[int, str], unit: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = [
        "patient",
        "case",
        "label",
        "class",
        "dice",
        f"hd95_{unit}",
        f"asd_{unit}",
        "status",
        "false_positive_voxels",
    ]
    writer.writerow(head)
    for s in scores:
        numbers = ["" if math.isnan(v) else f"{v:.6g}" for v in (s.dice, s.hd95, s.asd)]
        name = class_names.get(s.label, f"class {s.label}")
        writer.writerow([s.patient, s.case, s.label, name, *numbers, s.status, s.false_positive_voxels])
    return out.getvalue()


def without_nan(value: Any) -> Any:
    """The same lists and dictionaries with None for NaN and infinity, as JSON asks for."""
    if isinstance(value, dict):
        return {name: without_nan(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_scores(scores: Sequence[Score], class_names: dict[int, str], unit: str, folder: Path, name: str) -> list[dict]:
    """<name>.csv, <name>.md and <name>.json; returns the summary."""
    rows = summarise(scores, class_names, unit)
    write_text(folder / f"{name}.csv", scores_csv(scores, class_names, unit))
    write_text(folder / f"{name}.md", table(rows) + "\n")
    write_json(folder / f"{name}.json", without_nan({"summary": rows, "scores": [vars(s) for s in scores]}))
    return rows


def score_case(model: TrainedModel, case: Case, *, distances: bool = True) -> list[Score]:
    prepared = prepare(case, model.config, model.num_classes, model.slice_axis, label=False)
    p = probabilities(model.network, prepared, model.config, model.slice_axis)
    assert case.label is not None
    truth = torch.from_numpy(read_label(case.label, case.images[0], model.num_classes))
    return score_volume(
        p.argmax(dim=0),
        truth,
        model.num_classes,
        prepared.volume.spacing,
        patient=case.patient,
        case=case.name,
        distances=distances,
    )


def evaluate_run(
    run: Path, root: Path, *, part: str = "test", device: str = "auto", progress: Any = None
) -> list[dict]:
    """Scores the model of `run` on a part of its split, or on every labelled volume (``part="all"``)."""
    model = load_model(run, device)
    folder = open_folder(root)
    if part == "all":
        cases = [case for case in folder.cases if case.label is not None]
    else:
        cases = cases_of(folder, read_json(run / "split.json")[part], with_label=True)
    if not cases:
        raise UserError(f"{root}: no labelled volume in the part {part!r}")
    scores: list[Score] = []
    for case in cases:
        scores += score_case(model, case)
        if progress:
            progress(case.name)
    return save_scores(scores, model.class_names, distance_unit(folder), run, f"scores_{part}")
