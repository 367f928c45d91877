"""The cases of a data folder, whatever its layout."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pglcl.errors import UserError
from pglcl.formats.names import is_input_file, suffix_of
from pglcl.labels import LabelMap
from pglcl.layouts.folders import children

HDF5 = (".h5", ".hdf5")  # image and label in one file


@dataclass(frozen=True)
class Case:
    """One volume.

    images: a file (or DICOM folder) for each channel, or one file with channels along its fourth axis. label: its label
    file, or None; for HDF5, label and image are one file.
    """

    name: str
    patient: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass
class DataFolder:
    """The cases of a folder, sorted by name.

    layout: acdc, decathlon, nnunet, kits, ssl4mis, plain or list. labels: the classes that the layout or a description
    declares; None if they follow from the values in the files. class_names: of values, where the layout knows them.
    modalities: of each channel, from dataset.json. columns: of a list, those that hold the channels. parts: patients of
    train, validation and test, where the folder has lists of them. notes: what a user should know about how the folder
    was read.
    """

    root: Path
    layout: str
    cases: list[Case]
    labels: LabelMap | None = None
    class_names: dict[int, str] = field(default_factory=dict)
    modalities: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def descriptions(self) -> list[Path]:
        """The files that say which cases there are."""
        return [self.root] if self.root.is_file() else [self.root / "dataset.json", *sorted(self.root.glob("*.list"))]

    @property
    def patients(self) -> list[str]:
        return sorted({case.patient for case in self.cases})


# The text behind the name of a patient, where a patient has several volumes: patient001_frame01, s3_visit2.
VOLUME_OF_A_PATIENT = re.compile(
    r"(?i)(.+?)[_-](?:frame|slice|visit|ses|session|time|timepoint|tp|scan|phase|day|week|month|year|baseline|followup|"
    r"pre|post|ed|es|left|right)[_-]?[0-9]*"
)


def alike_names(cases: Iterable[Case]) -> list[str]:
    """A line about cases that are patients of their own, and whose names look like volumes of one patient."""
    groups: dict[str, list[str]] = {}
    for case in cases:
        name = case.name
        while match := VOLUME_OF_A_PATIENT.fullmatch(name):
            name = match[1]
        if case.patient == case.name != name:
            groups.setdefault(name, []).append(case.name)
    alike = [names for names in groups.values() if len(names) > 1]
    if not alike:
        return []
    return [
        f"{alike[0][0]} and {alike[0][1]} look like volumes of one patient, but count as two patients, so one may be "
        f"used for training and the other for the scores ({len(alike)} such names); a list with the column patient "
        "keeps them together"
    ]


def alike_patients(cases: Iterable[Case]) -> list[str]:
    """A line about patients whose names differ only in case, spaces, leading zeros or the encoding of an accent.

    Spreadsheets leave out the zeros of 001.
    """
    groups: dict[str, list[str]] = {}
    for patient in sorted({case.patient for case in cases}):
        key = re.sub(r"(?<![0-9])0+(?=[0-9])", "", "".join(unicodedata.normalize("NFKC", patient).casefold().split()))
        groups.setdefault(key, []).append(patient)
    alike = [names for names in groups.values() if len(names) > 1]
    if not alike:
        return []
    names = " and ".join(map(repr, alike[0]))
    how = "only case, spaces or leading zeros differ"
    return [f"{names} count as {len(alike[0])} patients, though {how} ({len(alike)} such names)"]


def not_listed(file: Path, cases: Sequence[Case]) -> list[str]:
    """A line for each folder of images, about those that `file` does not list. They are not even unlabelled."""
    listed = {path.resolve() for case in cases for path in case.images}
    lines = []
    for folder in sorted({path.parent for case in cases for path in case.images}):
        others = [path.name for path in children(folder) if is_input_file(path) and path.resolve() not in listed]
        if others:
            some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            lines.append(f"{folder}: {some} ({len(others)}): not read, since {file.name} does not list them")
    return lines


def other_count(file: Path, described: Mapping[str, Any], labelled: int) -> list[str]:
    """A line if `numTraining` of a dataset.json is not the number of images with labels: some may be missing."""
    count = described.get("numTraining", labelled)
    if count == labelled:
        return []
    return [f"{file}: says numTraining {count}, but {labelled} images have labels; are some missing?"]


def refuse_confusions(file: Path, cases: Iterable[Case]) -> None:
    """Raises UserError for files that a list or description names for two purposes."""
    cases = list(cases)
    images = Counter(path.resolve() for case in cases for path in case.images)
    twice = [f"{file}: {path} is listed {n} times" for path, n in images.items() if n > 1]
    twice += _wrong_labels(file, cases)
    if twice:
        raise UserError(*twice)


def _wrong_labels(file: Path, cases: Iterable[Case]) -> list[str]:
    """Lines for labels that are also images, and for labels of two patients: mistakes in the list."""
    images = {path.resolve() for case in cases for path in case.images if suffix_of(path) not in HDF5}
    patients: dict[Path, str] = {}
    lines = []
    for case in cases:
        if case.label is None:
            continue
        label = case.label.resolve()
        if label in images:
            lines.append(f"{file}: {label} is listed as a label and as an image")
        if patients.setdefault(label, case.patient) != case.patient:
            lines.append(f"{file}: {label} is listed as a label of {patients[label]} and of {case.patient}")
    return lines
