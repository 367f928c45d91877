"""Inspects the cases of a data folder: what they hold, what is wrong with them, and what a training needs of them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pglcl.cases import Split, cases_of, split_patients, without_effect
from pglcl.config import TrainConfig
from pglcl.conventions import maybe_ignored, smoothed_edges, two_conventions, unusual_background
from pglcl.description import Description
from pglcl.errors import UserError
from pglcl.formats import Source, nifti
from pglcl.intensity import (
    FEW,
    Intensity,
    Measured,
    choose_intensity,
    constant_channels,
    describe_constant,
    describe_few,
    few_values,
    measure,
)
from pglcl.labels import MOST_CLASSES, LabelMap, parse_labels, value_counts
from pglcl.layouts import Case, DataFolder
from pglcl.levels import Level, Levels, apart_from_most, levels_of
from pglcl.limits import check_memory
from pglcl.memory import in_words
from pglcl.model import choose_device
from pglcl.prepare import choose_slice_axis, does_not_suit, padded_shape, resized_for
from pglcl.resolution import Resolution
from pglcl.volumes import read_label_values, read_volume

SHOWN = 8  # lines of one kind
SAME = 3  # files that are named where many have the same note


@dataclass
class CaseReport:
    """The findings about one case. A training refuses problems, and only prints notes.

    shape, spacing: in canonical axes. orientation: of the file's axes, such as RAS. unit: of the spacing. axes: of the
    file, 2 or 3. dtype: of the file. source: of its first image. digest, label_digest: SHA-256 of the voxels of the
    images and of the label. few_values: number of different values of the images, if it is small. label_voxels: number
    of voxels of each value of the label.
    """

    case: Case
    shape: tuple[int, ...] = ()
    channels: int = 0
    spacing: tuple[float, ...] = ()
    orientation: str = ""
    unit: str = "mm"
    axes: int = 3
    dtype: str = ""
    source: Source | None = None
    digest: str = ""
    label_digest: str = ""
    measured: Measured | None = None
    levels: tuple[Level, ...] = ()
    few_values: int = 0
    label_voxels: dict[int, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def intensity(self) -> tuple[float, float]:
        return (min(self.measured.low), max(self.measured.high)) if self.measured else (math.nan, math.nan)

    @property
    def constant(self) -> dict[int, float]:
        """The value of each constant channel."""
        return constant_channels(self.measured.low, self.measured.high) if self.measured else {}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = ("shape", "channels", "spacing", "orientation", "unit", "dtype", "problems", "notes")
        return {
            "name": self.case.name,
            "patient": self.case.patient,
            "images": [str(path) for path in self.case.images],
            "label": str(self.case.label) if self.case.label else None,
            **{name: getattr(self, name) for name in own},
            "intensity": list(self.intensity) if self.measured else None,
            "label_voxels": {str(value): n for value, n in self.label_voxels.items()},
        }


def inspect_case(case: Case, labels: LabelMap | None = None) -> CaseReport:
    """Reads a whole case, with its label if it has one.

    Args:
        case: the files.
        labels: the meaning of label values, if it is known. Then other values are a problem, and classes from 1 on are
            foreground. Otherwise every value except 0 is foreground.
    """
    report = CaseReport(case)
    data, values = None, None
    try:
        volume = read_volume(case.images)
        data, source = volume.data, volume.source
        report.shape, report.channels, report.spacing = data.shape[1:], len(data), volume.spacing
        report.unit, report.axes, report.dtype = source.unit, source.axes, str(source.dtype)
        report.source, report.digest = source, hashlib.sha256(data.data).hexdigest()
        report.orientation = "".join(nib.aff2axcodes(source.affine)) if source.unit == "mm" else "-"
    except UserError as error:
        report.problems.extend(error.lines)
    if case.label is not None:
        try:
            values = read_label_values(case.label, case.images[0])
            report.label_voxels = value_counts(values, case.label)
            report.label_digest = hashlib.sha256(np.ascontiguousarray(values, np.int32).data).hexdigest()
            if labels is not None:
                labels.check(report.label_voxels, case.label)
            elif negative := {v: n for v, n in report.label_voxels.items() if v < 0}:
                report.problems.append(_negative(case.label, negative))
            if labels is not None and not any(labels.class_counts(report.label_voxels)):
                report.notes.append(f"{case.label}: has no voxel that counts: all are to be ignored")
            if set(report.label_voxels) == {0}:
                report.notes.append(f"{case.label}: is an empty label: every voxel is background")
        except UserError as error:
            values = None
            report.problems.extend(line for line in error.lines if line not in report.problems)
    if data is not None:
        foreground = None
        if values is not None and len(data) == 1 and np.array_equal(values, data[0]):
            report.problems.append(f"{case.label}: has the same voxels as its image; is it a copy of the image?")
        if values is not None:
            foreground = values != 0 if labels is None else labels.encode(values, case.label or case.images[0]) > 0
        report.measured, report.levels = measure(data, source.dtype, foreground), levels_of(data)
        report.few_values = few_values(data)
        flat = report.constant
        if len(flat) == len(data):
            report.problems.append(f"{case.images[0]}: {describe_constant(flat, len(data))}")
    return report


def _negative(path: Path, found: dict[int, int]) -> str:
    """A line for negative label values: they may mark what is to be ignored, or come from a type with a sign."""
    words = ", ".join(f"{value} in {n} voxel{'s' * (n != 1)}" for value, n in [*found.items()][:4])
    meaning = f"--labels 0,1,{next(iter(found))}=ignore"
    return f"{path}: has negative values: {words}; say with --labels what they mean, for example {meaning}"


def inspect_cases(cases: Iterable[Case], labels: LabelMap | None = None) -> list[CaseReport]:
    """A report of each case. Its problems and notes also tell how the case differs from the others.

    A number of channels that most cases do not have is a problem. So are label values of another convention, if
    `labels` does not say what they mean.
    """
    reports = [inspect_case(case, labels) for case in cases]
    channels = Counter(r.channels for r in reports if r.channels)
    if len(channels) > 1:
        usual = channels.most_common(1)[0][0]
        for r in reports:
            if r.channels not in (0, usual):
                r.problems.append(f"{r.case.images[0]}: has {r.channels} channels, the others have {usual}")
    _look_at_channels(reports)
    _look_at_orientations(reports)
    if labels is None:
        _look_at_values(reports)
    return reports


def _look_at_channels(reports: Sequence[CaseReport]) -> None:
    """Adds a note to each case with a constant channel or few values; a single one where most cases are like that."""
    good = [r for r in reports if r.measured and len(r.constant) < r.channels]
    usual = {c for c, n in Counter(c for r in good for c in r.constant).items() if 2 * n > len(good)}
    for c in sorted(usual):
        cases = [r for r in good if c in r.constant]
        cases[0].notes.append(f"channel {c} is constant in {len(cases)} of {len(good)} images")
    for r in good:
        if found := {c: value for c, value in r.constant.items() if c not in usual}:
            r.notes.append(f"{r.case.images[0]}: {describe_constant(found, r.channels)}")
    few = [r for r in good if r.few_values]
    if 2 * len(few) > len(good):
        few[0].notes.append(f"{len(few)} of {len(good)} images have at most {FEW} different values; are they labels?")
    else:
        for r in few:
            r.notes.append(f"{r.case.images[0]}: {describe_few(r.few_values)}")


def _look_at_orientations(reports: Sequence[CaseReport]) -> None:
    """Adds a note to each NIfTI image that does not say how it lies, if others do: left may be right there."""
    files = [(r, r.source) for r in reports if r.source and r.source.reader == "nifti"]
    without = [r for r, source in files if not nifti.says_orientation(source)]
    for r in without if len(without) < len(files) else ():
        r.notes.append(f"{r.case.images[0]}: does not say which way its axes point, as others do (sform, qform code 0)")


def _look_at_values(reports: Sequence[CaseReport]) -> None:
    """Adds what is odd in the label values of all files together: to the first case with such values."""
    by_file = {r.case.label: r for r in reports if r.case.label is not None and r.label_voxels}
    if found := two_conventions({path: r.label_voxels for path, r in by_file.items()}):
        fewer = min(found.with_small, found.with_large, key=len)
        report = by_file[fewer[0]]
        (report.problems if found.certain else report.notes).append(found.describe())
    totals: Counter[int] = Counter()
    for report in by_file.values():
        totals.update(report.label_voxels)
    for line in (smoothed_edges(totals), unusual_background(totals), maybe_ignored(totals)):
        if line:
            next(iter(by_file.values())).notes.append(line)


def same_images(reports: Sequence[CaseReport], split: Split | None = None) -> list[str]:
    """A line for each image of one patient whose voxels are those of another patient's.

    If one of them is trained on, the score of the other says nothing about new patients.
    """
    parts = {patient: part for part, patients in split.as_dict().items() for patient in patients} if split else {}
    first: dict[str, CaseReport] = {}
    lines = []
    for report in reports:
        other = first.setdefault(report.digest, report) if report.digest else report
        if other.case.patient != report.case.patient:
            names = [f"{r.case.name} ({parts[r.case.patient]})" if parts else r.case.name for r in (other, report)]
            lines.append(f"{names[0]} and {names[1]} have the same voxels, but count as two patients")
    more = [f"and {len(lines) - SHOWN} more images with the voxels of another"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def same_labels(reports: Sequence[CaseReport]) -> list[str]:
    """A line for each label that has the same voxels as a label of another patient.

    Nobody draws the same outlines twice. So one is a copy by mistake, or both images are of one patient. Labels
    with a single value are not compared.
    """
    first: dict[str, CaseReport] = {}
    lines = []
    for report in reports:
        if len(report.label_voxels) < 2:
            continue
        other = first.setdefault(report.label_digest, report)
        if other.case.patient != report.case.patient and other.digest != report.digest:
            lines.append(
                f"{other.case.name} and {report.case.name} have the same label, but different images. One label may be "
                "a copy by mistake"
            )
    more = [f"and {len(lines) - SHOWN} more labels that others have, too"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def inspect_folder(data: DataFolder, labels: LabelMap | None = None) -> list[CaseReport]:
    """A report of each case of a data folder; `labels`: by default those that the folder declares."""
    return inspect_cases(data.cases, labels or data.labels)


# --- before a training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """The facts about its data that a training must know before it prepares them.

    labels, intensity, resolution, levels, description: part of the model. channels: of the images. slice_axis: of 2-D
    training, None in 3-D. needed: bytes of the prepared volumes. voxels: of each class in the
    files of the labelled volumes. notes: lines to print at the start.
    """

    labels: LabelMap
    intensity: Intensity
    resolution: Resolution
    levels: Levels
    description: Description
    channels: int
    slice_axis: int | None
    needed: int
    voxels: tuple[int, ...]
    notes: tuple[str, ...]

    def lost_classes(self, kept: set[int], config: TrainConfig) -> list[str]:
        """A line for each class that files have and the prepared labels do not; `kept`: the classes that these have."""
        how = (
            f"--image-size {'x'.join(map(str, config.size))}" if config.whole_slices else f"--spacing {config.spacing}"
        )
        return [
            f"class {k} ({self.labels.names[k]}): its {n} labelled voxels vanish when volumes are brought to {how}; it "
            "cannot be learned"
            for k, n in enumerate(self.voxels)
            if n and k not in kept
        ]


def declared_labels(data: DataFolder, config: TrainConfig) -> LabelMap | None:
    """The classes of `--labels`, `--num-classes` or the description of the data; None if none of them gives any."""
    if config.labels:
        return parse_labels(config.labels)
    if config.num_classes:
        names = data.labels.class_names if data.labels else data.class_names
        return LabelMap.of_values(range(config.num_classes), names)
    return data.labels


def labels_of(data: DataFolder, reports: Iterable[CaseReport], declared: LabelMap | None) -> LabelMap:
    """The declared classes; without any, a class for every value that was found.

    Raises:
        UserError: too many values were found in all files together, although not in one.
    """
    if declared:
        return declared
    found = {value for report in reports for value in report.label_voxels}
    if len(found) > MOST_CLASSES:
        raise UserError(
            f"{data.root}: the label files have {len(found)} different values, but at most {MOST_CLASSES} classes are "
            "possible; if values number the objects of one class, --labels 0,1-1000=cell merges them"
        )
    return LabelMap.of_values(found, data.class_names)


def survey(
    data: DataFolder,
    config: TrainConfig,
    split: Split | None = None,
    *,
    print_line: Callable[[str], None] | None = None,
) -> Survey:
    """Reads every volume of training, validation and test once, before a training spends hours.

    Labels of unlabelled patients are not read.

    Args:
        data: the data folder.
        config: the options of the run.
        split: the patients of each part; by default the options decide.
        print_line: prints a line.

    Raises:
        UserError: a line for each problem of the volumes; or there is nothing to learn from, or too little memory.
    """
    split = split or split_patients(data, config)
    declared = declared_labels(data, config)
    parts = {
        "labelled": cases_of(data, split.labelled, with_label=True),
        "unlabelled": [dataclasses.replace(c, label=None) for c in cases_of(data, split.unlabelled)],
        "held out": cases_of(data, (*split.validation, *split.test), with_label=True),
    }
    cases = [case for part in parts.values() for case in part]
    if print_line:
        print_line(f"{data.root}: checking {len(cases)} volumes")
    reports = inspect_cases(cases, declared)
    problems = [line for report in reports for line in report.problems]
    problems += [f"{r.case.images[0]}: {why}" for r in reports if r.source and (why := does_not_suit(r.source, config))]
    if problems:
        raise UserError(
            *problems, f"{len(problems)} problems; pglcl inspect {data.root} lists those of the whole folder"
        )
    if not parts["labelled"]:
        raise UserError(f"{data.root}: no labelled volume")
    if config.method != "supervised" and not parts["unlabelled"]:
        raise UserError(
            f"{data.root}: no unlabelled volume is left for --method {config.method}; use --method supervised, or a "
            "smaller --labelled"
        )
    labelled = reports[: len(parts["labelled"])]
    labels = labels_of(data, reports, declared)
    notes = [
        *data.notes,
        *without_effect(data, config, split),
        *_left_out(data, split),
        *same_images(reports, split),
        *same_labels(reports),
        *_missing_classes(data, labels, labelled),
    ]
    notes += _condensed(note for report in reports for note in report.notes)
    notes.append(f"labels: {_in_words(labels)}; {_origin(config, data)}")
    trained = reports[: len(parts["labelled"]) + len(parts["unlabelled"])]
    intensity = choose_intensity(
        config.normalise, config.level_and_width, data.modalities, [r.measured for r in trained if r.measured]
    )
    notes += _several_channels(data, labelled)
    notes.append(f"intensities: {intensity.describe()}")
    slice_axis = choose_slice_axis(config, labelled[0].shape)
    notes += _sliced_otherwise(reports, slice_axis) if config.slice_axis < 0 else []
    notes += _sides_of_slices(labelled, config, slice_axis)
    kept = trained if config.method != "supervised" else labelled
    resolution = Resolution.of([r.source for r in kept if r.source], config, slice_axis)
    notes += _other_voxels(reports[len(trained) :], resolution, config, slice_axis)
    odd = apart_from_most([r.levels for r in kept], intensity)
    notes += _some([f"{kept[i].case.images[0]}: {why}" for i, why in odd.items()], "training volumes with such values")
    levels = Levels.of([r.levels for r in kept])
    notes += _other_levels(reports[len(trained) :], levels, intensity)
    needed = prepared_bytes(kept, config, slice_axis, len(labels))
    check_memory(config, choose_device(config.device), reports[0].channels, len(labels), needed)
    notes.append(f"{len(kept)} prepared volumes take {in_words(needed)}")
    described = Description.of(data)
    return Survey(
        labels,
        intensity,
        resolution,
        levels,
        described,
        reports[0].channels,
        slice_axis,
        needed,
        tuple(sum(counts) for counts in zip(*(labels.class_counts(r.label_voxels) for r in labelled))),
        tuple(notes),
    )


def _condensed(notes: Iterable[str]) -> list[str]:
    """The notes of many files. If many files have the same note, the first few are named, and the others counted."""
    files: dict[str, list[str]] = {}
    for note in notes:
        file, _, text = note.partition(": ")
        files.setdefault(text, []).append(file)
    lines = []
    for text, named in files.items():
        lines += [f"{file}: {text}" for file in named[:SAME]]
        lines += [f"and {len(named) - SAME} more files: {text}"] if len(named) > SAME else []
    return lines


def _left_out(data: DataFolder, split: Split) -> list[str]:
    """Lines about volumes that take no part: of patients outside the split, and unlabelled ones of the other parts."""
    inside = {patient for patients in split.as_dict().values() for patient in patients}
    outside = [c.name for c in data.cases if c.patient not in inside]
    needed = {*split.labelled, *split.validation, *split.test}
    without = [c.name for c in data.cases if c.patient in needed and c.label is None]
    return [
        f"{len(names)} volumes take no part, since {why}: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")
        for names, why in (
            (outside, "the split does not name their patients"),
            (without, "they have no label, and their patients are labelled or held out"),
        )
        if names
    ]


def _several_channels(data: DataFolder, reports: Sequence[CaseReport]) -> list[str]:
    """A line about images with several channels. Frames of a film and colours are channels, too."""
    count = reports[0].channels
    if count == 1:
        return []
    along = [r for r in reports if r.source and r.source.axes == 3 and r.source.channels > 1]
    how = ", along the fourth axis of their files" if along else ""
    if not data.modalities and any(r.source and nifti.names_time(r.source) for r in along):
        how += ", which their headers call time: the network sees all frames at once"
    return [f"images have {count} channels{how}"]


def _in_words(labels: LabelMap) -> str:
    """The classes as `--labels` takes them; the first ones of many."""
    parts = labels.describe().split(",")
    more = f", ... ({len(labels)} classes)" if len(parts) > SHOWN else ""
    return ",".join(parts[:SHOWN]) + more


def _origin(config: TrainConfig, data: DataFolder) -> str:
    """The source of the meaning of label values, in words."""
    if config.labels or config.num_classes:
        return "--labels" if config.labels else "--num-classes"
    return "as the data declare them" if data.labels else "a class for each value that the label files have"


SHRUNK = 2.0  # factor between the sides of slices before and after, from which train says so
NARROW = 4.0  # factor between the sides of slices and of what the network sees of them, from which train says so
UNEQUAL = 2.0  # factor between voxel sizes of training volumes from which --spacing is recommended


def _other_voxels(
    held_out: Sequence[CaseReport], resolution: Resolution, config: TrainConfig, slice_axis: int | None
) -> list[str]:
    """Lines about voxels of very different sizes: of the training volumes, and of those held out beside them."""
    lines = []
    if not config.whole_slices and config.target_spacing is None and resolution.spread > UNEQUAL:
        lines.append(
            f"voxels of the training volumes are {resolution.describe()}: up to {resolution.spread:.3g} times as large "
            "as others along an axis; --spacing resamples them to one size"
        )
    if len(resolution.units) > 1:
        lines.append(
            f"the training images have different units of length, {' and '.join(resolution.units)}: only some files "
            "say how large their voxels are"
        )
    others = [(r, why) for r in held_out if r.source and (why := resolution.problem(r.source, config, slice_axis))]
    lines += [f"{r.case.images[0]}: {why}" for r, why in others[:SHOWN]]
    more = len(others) - SHOWN
    return lines + ([f"and {more} more validation and test volumes with such voxels"] if more > 0 else [])


def _other_levels(held_out: Sequence[CaseReport], levels: Levels, intensity: Intensity) -> list[str]:
    """Lines about held out volumes whose intensities clearly differ from those of the training volumes."""
    lines = [f"{r.case.images[0]}: {why}" for r in held_out if (why := levels.problem(r.levels, intensity))]
    return _some(lines, "volumes of validation and test with such values")


def _some(lines: Sequence[str], what: str) -> list[str]:
    """The first lines, and one with the number of the others."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"and {more} more {what}"] if more > 0 else [])]


def _sides_of_slices(reports: Sequence[CaseReport], config: TrainConfig, slice_axis: int | None) -> list[str]:
    """A line about what the network sees of slices.

    Another one names slices that are far larger: details are lost, or what lies around. Or slices that are smaller.
    """
    if slice_axis is None:
        return []
    size = "x".join(map(str, config.size))
    scaled = f"at a spacing of {config.spacing} mm" if config.spacing else "at their own resolution"
    how = f"whole, scaled to {size} pixels" if config.whole_slices else f"parts of {size} pixels, {scaled}"
    return [f"slices: {how} (--slices {config.slices})", *_large_or_small(reports, config, slice_axis, size)]


def _large_or_small(reports: Sequence[CaseReport], config: TrainConfig, slice_axis: int, size: str) -> list[str]:
    if config.whole_slices:
        now = [resized_for(config, r.shape, r.spacing, slice_axis) for r in reports]
        factor = float(np.median([max(a / b for a, b in zip(r.shape, small)) for r, small in zip(reports, now)]))
        if factor < SHRUNK:
            return []
        return [
            f"slices are shrunk {factor:.3g} times along each side, to --image-size {size}; a larger one, or --slices "
            "crop, keeps details"
        ]
    shapes = [resized_for(config, r.shape, r.spacing, slice_axis) for r in reports]
    sides = np.median([[n for axis, n in enumerate(shape) if axis != slice_axis] for shape in shapes], axis=0)
    factors, seen = sides / np.array(config.size), "x".join(f"{n:.0f}" for n in sides)
    if factors.max() > NARROW:
        ways = ["a larger --image-size"]
        if all(r.unit == "mm" for r in reports):
            ways.append("a coarser --spacing")
        if not config.spacing:
            ways.append("--slices whole")
        more = f"{' or '.join(filter(None, (', '.join(ways[:-1]), ways[-1])))} shows it more of what lies around"
        return [f"the network sees {size} pixels of slices of {seen} at a time; {more}"]
    if factors.max() < 1:
        enlarged = "" if config.spacing else ", and --slices whole enlarges them"
        return [f"slices of {seen} pixels are padded to --image-size {size}; a smaller one saves time{enlarged}"]
    return []


def _sliced_otherwise(reports: Sequence[CaseReport], slice_axis: int | None) -> list[str]:
    """A line about volumes whose thick slices lie across another axis than those of the training."""
    if slice_axis is None:
        return []
    others = [r.case.name for r in reports if r.shape[slice_axis] > 2 * min(r.shape)]
    if not others:
        return []
    some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    return [
        f"slices are taken across axis {slice_axis}, which has the fewest voxels of the first labelled volume; "
        f"{len(others)} volumes have far fewer voxels along another axis: {some}; --slice-axis sets the axis"
    ]


def _missing_classes(data: DataFolder, labels: LabelMap, labelled: Sequence[CaseReport]) -> list[str]:
    totals = np.sum([labels.class_counts(r.label_voxels) for r in labelled], axis=0)
    if not totals[1:].any():
        raise UserError(f"{data.root}: the labels of all {len(labelled)} labelled volumes are empty")
    return [
        f"class {k} ({labels.names[k]}, value {labels.values[k][0]}): no labelled volume has it; it cannot be learned"
        for k in range(len(labels))
        if not totals[k]
    ]


def prepared_bytes(reports: Sequence[CaseReport], config: TrainConfig, slice_axis: int | None, num_classes: int) -> int:
    """The bytes that :func:`pglcl.prepare.prepare` will keep: float32 images, labels of one or two bytes a voxel."""
    total = 0
    for report in reports:
        shape = resized_for(config, report.shape, report.spacing, slice_axis)
        voxels = math.prod(padded_shape(shape, config, slice_axis))
        of_label = (1 if num_classes <= 127 else 2) if report.label_voxels else 0
        total += voxels * (4 * report.channels + of_label)
    return total
