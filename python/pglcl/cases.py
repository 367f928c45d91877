"""How the cases of a data folder are split by patient, and what is wrong with them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.files import read_json
from pglcl.layouts import Case, DataFolder
from pglcl.volumes import open_image, orientation_of, read_label, read_volume

# --- splits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Patients of each part. Labels of `unlabelled` patients are not read, volumes of `test` not at all."""

    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def as_dict(self) -> dict[str, list[str]]:
        return {name: list(getattr(self, name)) for name in ("labelled", "unlabelled", "validation", "test")}


def split_patients(data: DataFolder, config: TrainConfig) -> Split:
    if config.split_file:
        return _split_from_file(data, Path(config.split_file))
    with_label = {case.patient for case in data.cases if case.label is not None}
    patients = data.patients
    if config.shuffle:
        random.Random(config.seed).shuffle(patients)
    annotated = [p for p in patients if p in with_label]
    if not annotated:
        raise UserError(f"{data.root}: no labelled volume")
    test = round(len(annotated) / 5) if config.test < 0 else config.test
    validation = round(len(annotated) / 10) if config.validation < 0 else config.validation
    if config.labelled + validation + test > len(annotated):
        raise UserError(
            f"{data.root}: --labelled {config.labelled}, --validation {validation} and --test {test} ask for "
            f"{config.labelled + validation + test} patients with labels, {len(annotated)} are there"
        )
    rest, held_out = annotated[: len(annotated) - test], annotated[len(annotated) - test :]
    rest, tuned_on = rest[: len(rest) - validation], rest[len(rest) - validation :]
    labelled = rest[: config.labelled]
    used = {*labelled, *tuned_on, *held_out}
    return Split(tuple(labelled), tuple(p for p in patients if p not in used), tuple(tuned_on), tuple(held_out))


def _split_from_file(data: DataFolder, path: Path) -> Split:
    content = read_json(path)
    parts = ("labelled", "unlabelled", "validation", "test")
    if not isinstance(content, dict) or set(content) - set(parts) or "labelled" not in content:
        raise UserError(f"{path}: must be an object with the lists {', '.join(parts)}")
    seen: dict[str, str] = {}
    for part in parts:
        for patient in content.get(part, []):
            if patient not in data.patients:
                raise UserError(f"{path}: {part} has {patient!r}, which is no patient of {data.root}")
            if patient in seen:
                raise UserError(f"{path}: {patient!r} is in {seen[patient]} and in {part}")
            seen[patient] = part
    split = Split(*(tuple(content.get(part, [])) for part in parts))
    with_label = {case.patient for case in data.cases if case.label is not None}
    for part in ("labelled", "validation", "test"):
        missing = [p for p in getattr(split, part) if p not in with_label]
        if missing:
            raise UserError(f"{path}: {part} has patients without a label file: {', '.join(missing)}")
    if not split.labelled:
        raise UserError(f"{path}: labelled is empty")
    return split


def cases_of(data: DataFolder, patients: Iterable[str], *, with_label: bool = False) -> list[Case]:
    wanted = set(patients)
    return [c for c in data.cases if c.patient in wanted and (c.label is not None or not with_label)]


# --- inspection -----------------------------------------------------------------------------------------------------


@dataclass
class CaseReport:
    """What was found in one case; problems stop a training, notes do not."""

    case: Case
    shape: tuple[int, ...] = ()
    channels: int = 0
    spacing: tuple[float, ...] = ()
    intensity: tuple[float, float] = (0.0, 0.0)
    label_voxels: dict[int, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inspect_case(case: Case, num_classes: int | None = None) -> CaseReport:
    report = CaseReport(case)
    try:
        volume = read_volume(case.images)
        report.shape, report.channels, report.spacing = volume.data.shape[1:], len(volume.data), volume.spacing
        report.intensity = (float(volume.data.min()), float(volume.data.max()))
        if report.intensity[0] == report.intensity[1]:
            report.problems.append(f"{case.images[0]}: a constant image, every voxel is {report.intensity[0]:g}")
    except UserError as error:
        report.problems.extend(error.lines)
    if case.label is not None:
        try:
            orientation_of(open_image(case.label), case.label)
            label = read_label(case.label, case.images[0], num_classes)
            values, counts = np.unique(label, return_counts=True)
            report.label_voxels = {int(v): int(n) for v, n in zip(values, counts)}
            if set(report.label_voxels) == {0}:
                report.notes.append(f"{case.label}: an empty label, every voxel is background")
        except UserError as error:
            report.problems.extend(line for line in error.lines if line not in report.problems)
    return report


def inspect_folder(data: DataFolder, num_classes: int | None = None) -> list[CaseReport]:
    classes = num_classes or (max(data.class_names) + 1 if data.class_names else None)
    reports = [inspect_case(case, classes) for case in data.cases]
    channels = Counter(r.channels for r in reports if r.channels)
    if len(channels) > 1:
        usual = channels.most_common(1)[0][0]
        for r in reports:
            if r.channels not in (0, usual):
                r.problems.append(f"{r.case.images[0]}: has {r.channels} channels, the others have {usual}")
    return reports


def count_classes(data: DataFolder, config: TrainConfig, labels: Iterable[np.ndarray]) -> int:
    """From the option, the description of the data, or the labels of the labelled patients."""
    if config.num_classes:
        return config.num_classes
    if data.class_names:
        return max(data.class_names) + 1
    return max(2, 1 + max(int(label.max()) for label in labels))


def distance_unit(data: DataFolder) -> str:
    """mm; or voxel where the spacing was lost: an ACDC folder whose headers all say 1 mm, which no scanner took."""
    if data.layout != "acdc":
        return "mm"
    for case in data.cases:
        try:
            if not np.allclose(open_image(case.images[0]).header.get_zooms()[:3], 1):
                return "mm"
        except UserError:
            continue
    return "voxel"
