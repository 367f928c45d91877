"""Splits the cases of a data folder by patient."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pglcl import formats
from pglcl.config import DEFAULTS, TrainConfig, flag
from pglcl.errors import UserError
from pglcl.files import read_json
from pglcl.layouts import Case, DataFolder


@dataclass(frozen=True)
class Split:
    """The patients of each part. Labels of `unlabelled` are not read. `test` is checked, and never used to train."""

    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def as_dict(self) -> dict[str, list[str]]:
        """The patients of each part, as lists, for JSON."""
        return {name: list(getattr(self, name)) for name in PARTS}


PARTS = tuple(field.name for field in fields(Split))


def split_patients(data: DataFolder, config: TrainConfig) -> Split:
    """Splits by the split file, by folds, by the lists of the folder, or by name; see `docs/data.md`.

    Raises:
        UserError: a wrong split file, or too few patients with labels.
    """
    if config.split_file:
        return _split_from_file(data, config)
    if config.folds:
        return _split_into_folds(data, config)
    if data.parts and config.test < 0 and config.validation < 0:
        train = [p for p in data.patients if p not in {*data.parts.get("validation", ()), *data.parts.get("test", ())}]
        ordered = [p for p in data.parts.get("train", ()) if p in train]
        ordered += [p for p in train if p not in ordered]
        validated, tested = data.parts.get("validation", ()), data.parts.get("test", ())
        return _split_of_parts(data, config, ordered, validated, tested, where=str(data.root))
    with_label = {case.patient for case in data.cases if case.label is not None}
    patients = data.patients
    if config.shuffle:
        random.Random(config.seed).shuffle(patients)
    annotated = [p for p in patients if p in with_label]
    if not annotated:
        raise UserError(f"{data.root}: no labelled volume{_where_labels_are(data)}")
    test = round(len(annotated) / 5) if config.test < 0 else config.test
    validation = round(len(annotated) / 10) if config.validation < 0 else config.validation
    if config.labelled + validation + test > len(annotated):
        raise UserError(
            f"{data.root}: --labelled {config.labelled}, --validation {validation} and --test {test} ask for "
            f"{config.labelled + validation + test} patients with labels, but only {len(annotated)} have labels"
        )
    rest, held_out = annotated[: len(annotated) - test], annotated[len(annotated) - test :]
    rest, tuned_on = rest[: len(rest) - validation], rest[len(rest) - validation :]
    labelled = rest[: config.labelled]
    used = {*labelled, *tuned_on, *held_out}
    return Split(tuple(labelled), tuple(p for p in patients if p not in used), tuple(tuned_on), tuple(held_out))


def without_effect(data: DataFolder, config: TrainConfig, split: Split) -> list[str]:
    """A line for each option about the split that has no effect, since a file decides instead.

    Args:
        data: the folder.
        config: the options.
        split: what :func:`split_patients` made of both.
    """
    lists = not config.folds and data.parts and config.test < 0 and config.validation < 0
    if not config.split_file and not lists:
        return []
    given = {name: getattr(config, name) for name in ("validation", "test", "shuffle")}
    names = [flag(name) + ("" if value is True else f" {value}") for name, value in given.items()
             if value != DEFAULTS[name]]  # fmt: skip
    if config.labelled not in (DEFAULTS["labelled"], len(split.labelled)):
        names.append(f"--labelled {config.labelled}")
    what = f"--split-file {config.split_file} decides" if config.split_file else f"the lists of {data.root} decide"
    return [f"{name} has no effect: {what}" for name in names]


def _where_labels_are(data: DataFolder) -> str:
    if data.layout != "plain":
        return ""
    return f"; label files lie in {data.root / 'labels'} and have the names of the images"


def _split_of_parts(
    data: DataFolder,
    config: TrainConfig,
    train: Iterable[str],
    validation: Iterable[str],
    test: Iterable[str],
    *,
    where: str,
) -> Split:
    """The first `--labelled` patients of `train` that have labels are labelled. Its other patients are unlabelled."""
    with_label = {case.patient for case in data.cases if case.label is not None}
    train = list(train)
    annotated = [p for p in train if p in with_label]
    if len(annotated) < config.labelled:
        raise UserError(
            f"{where}: --labelled {config.labelled}, but its training part has {len(annotated)} patients with labels"
        )
    labelled = annotated[: config.labelled]
    unlabelled = [p for p in train if p not in set(labelled)]
    return Split(tuple(labelled), tuple(unlabelled), tuple(validation), tuple(test))


def _split_into_folds(data: DataFolder, config: TrainConfig) -> Split:
    """Fold `--fold` of `--folds` is for validation. Test patients (the folder's lists, or `--test`) are in no fold."""
    with_label = {case.patient for case in data.cases if case.label is not None}
    annotated = [p for p in data.patients if p in with_label]
    count = max(0, config.test)
    test = [p for p in data.parts.get("test", ()) if p in with_label] if config.test < 0 else []
    if count:
        test = annotated[max(0, len(annotated) - count) :]
    rest = [p for p in annotated if p not in set(test)]
    if len(test) < count or len(rest) < config.folds:
        raise UserError(
            f"{data.root}: --folds {config.folds} needs a patient with labels for each fold, got {len(rest)} "
            f"besides the {len(test)} test patients"
        )
    validation = folds_of(rest, config.folds)[config.fold]
    train = [p for p in data.patients if p not in {*validation, *test}]
    if config.shuffle:
        random.Random(config.seed).shuffle(train)
    return _split_of_parts(data, config, train, validation, test, where=f"{data.root}, fold {config.fold}")


def folds_of(names: Iterable[str], count: int) -> list[list[str]]:
    """The names of each fold. Every name is in one fold, and the same names always give the same folds.

    The folds are those of nnU-Net, which shuffles the sorted names with the seed 12345 and cuts them into pieces.
    """
    ordered = sorted(names)
    places = np.arange(len(ordered))
    np.random.RandomState(12345).shuffle(places)  # numpy keeps this generator's numbers for ever
    return [[ordered[place] for place in sorted(piece)] for piece in np.array_split(places, count)]


def _split_of_folds(data: DataFolder, config: TrainConfig, path: Path, folds: list[Any]) -> Split:
    """nnU-Net's splits_final.json: `train` and `val` of a fold. Other patients are unlabelled if they have no label."""
    if not 0 <= config.fold < len(folds):
        raise UserError(f"{path}: --fold must be 0 to {len(folds) - 1}, the folds of this file, got {config.fold}")
    fold = folds[config.fold]
    lists = [fold.get(part) if isinstance(fold, dict) else None for part in ("train", "val")]
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists):
        raise UserError(f"{path}: fold {config.fold} must have the lists train and val of names")
    train, validation = ([str(n) for n in names or []] for names in lists)
    for part, names in (("train", train), ("val", validation)):
        for name in names:
            if name not in data.patients:
                raise UserError(f"{path}: fold {config.fold} has {name!r}, which is not a patient of {data.root}")
            if names.count(name) > 1:
                raise UserError(f"{path}: {name!r} is twice in {part} of fold {config.fold}")
    both = sorted(set(train) & set(validation))
    if both:
        raise UserError(f"{path}: {both[0]!r} is in train and in val of fold {config.fold}")
    with_label = {case.patient for case in data.cases if case.label is not None}
    missing = [p for p in validation if p not in with_label]
    if missing:
        raise UserError(f"{path}: val has patients without a label file: {', '.join(missing)}")
    others = [p for p in data.patients if p not in {*train, *validation} and p not in with_label]
    return _split_of_parts(data, config, [*train, *others], validation, (), where=str(path))


def _split_from_file(data: DataFolder, config: TrainConfig) -> Split:
    path = Path(config.split_file)
    content = read_json(path)
    if isinstance(content, list) and content:
        return _split_of_folds(data, config, path, content)
    if not isinstance(content, dict) or set(content) - set(PARTS) or "labelled" not in content:
        raise UserError(f"{path}: must be an object with the lists {', '.join(PARTS)}")
    for part in content:
        if not isinstance(content[part], list) or not all(isinstance(p, str) for p in content[part]):
            raise UserError(f"{path}: {part} must be a list of patients' names")
    seen: dict[str, str] = {}
    for part in PARTS:
        for patient in content.get(part, []):
            if patient not in data.patients:
                raise UserError(f"{path}: {part} has {patient!r}, which is not a patient of {data.root}")
            if patient in seen:
                where = f"twice in {part}" if seen[patient] == part else f"in {seen[patient]} and in {part}"
                raise UserError(f"{path}: {patient!r} is {where}")
            seen[patient] = part
    split = Split(*(tuple(content.get(part, [])) for part in PARTS))
    with_label = {case.patient for case in data.cases if case.label is not None}
    for part in ("labelled", "validation", "test"):
        missing = [p for p in getattr(split, part) if p not in with_label]
        if missing:
            raise UserError(f"{path}: {part} has patients without a label file: {', '.join(missing)}")
    if not split.labelled:
        raise UserError(f"{path}: labelled is empty")
    return split


def cases_of(data: DataFolder, patients: Iterable[str], *, with_label: bool = False) -> list[Case]:
    """The cases of `patients`, in the folder's order; `with_label`: only those with a label file."""
    wanted = set(patients)
    return [c for c in data.cases if c.patient in wanted and (c.label is not None or not with_label)]


def distance_unit(data: DataFolder, cases: Iterable[Case] | None = None) -> str:
    """The unit of distances in `cases`, by default all of the folder: mm, or pixel for files without a spacing.

    It is voxel for an ACDC folder whose headers all say 1 mm: no scanner took such volumes, so their spacing was lost.
    If files have different units, all of them are named.
    """
    sources = []
    for case in data.cases if cases is None or data.layout == "acdc" else cases:
        try:
            sources.append(formats.read_source(case.images[0]))
        except UserError:
            continue
    if data.layout == "acdc" and sources and all(np.allclose(source.spacing, 1) for source in sources):
        return "voxel"
    return " and ".join(sorted({source.unit for source in sources})) or "mm"
