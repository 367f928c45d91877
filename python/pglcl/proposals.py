"""What `pglcl inspect` shows of a folder: its classes, warnings, and options that suit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pglcl.cases import distance_unit
from pglcl.errors import UserError
from pglcl.inspection import NARROW, UNEQUAL, CaseReport, same_images, same_labels
from pglcl.intensity import (
    choose_intensity,
)
from pglcl.labels import LabelMap
from pglcl.layouts import DataFolder


@dataclass(frozen=True)
class Proposal:
    """An option of `pglcl train` that suits the data, and why."""

    option: str
    value: str
    reason: str


def class_table(data: DataFolder, reports: Sequence[CaseReport], labels: LabelMap) -> list[dict[str, Any]]:
    """A row for each class: values, name, voxels, share of all voxels, and number of patients whose labels have it."""
    counts = {r.case.name: labels.class_counts(r.label_voxels) for r in reports if r.label_voxels}
    total = sum(sum(c) for c in counts.values()) or 1
    rows = []
    for k in range(len(labels)):
        voxels = sum(c[k] for c in counts.values())
        patients = {r.case.patient for r in reports if r.case.name in counts and counts[r.case.name][k]}
        rows.append({
            "class": k, "values": list(labels.values[k]), "name": labels.names[k], "voxels": voxels,
            "share": voxels / total, "patients": len(patients),
        })  # fmt: skip
    return rows


def warnings_of(data: DataFolder, reports: Sequence[CaseReport], labels: LabelMap) -> list[str]:
    """Lines that do not stop a training but that its user should know."""
    lines = [*data.notes, *same_images(reports), *same_labels(reports)]
    with_label = [r for r in reports if r.label_voxels]
    blank = [r for r in with_label if not sum(labels.class_counts(r.label_voxels)[1:])]
    if 2 * len(blank) > len(with_label):
        lines.append(f"{len(blank)} of {len(with_label)} labels are empty")
    for row in class_table(data, reports, labels)[1:] if with_label else []:
        what = f"class {row['class']} ({row['name']}, value {row['values'][0] if row['values'] else '*'})"
        if row["patients"] == 0:
            lines.append(f"{what}: no labelled volume has it")
        elif row["patients"] == 1 and len({r.case.patient for r in with_label}) > 1:
            lines.append(f"{what}: only one labelled patient has it")
    return lines


def propose(data: DataFolder, reports: Sequence[CaseReport]) -> list[Proposal]:
    """Options for `pglcl train` that follow from the measurements; none if no case could be read."""
    good = [r for r in reports if r.measured and r.shape]
    if not good:
        return []
    shape = np.median([r.shape for r in good], axis=0)
    spacing = np.array([r.spacing for r in good], np.float64)
    usual = np.median(spacing, axis=0)
    flat, reason = _flat(good, shape, usual)
    proposals = [Proposal("--spatial-dims", "2" if flat else "3", reason)]
    if flat:
        axis = int(np.argmin(good[0].shape))
        inside = [round(n) for d, n in enumerate(shape) if d != axis]
        pixels = f"slices have {inside[0]}x{inside[1]} pixels (median)"
        within = np.delete(spacing, axis, axis=1)
        spread = float((within.max(axis=0) / within.min(axis=0)).max())
        spaced = spread > UNEQUAL and all(r.unit == "mm" for r in good)
        if spaced:
            pixel = np.median(within, axis=0)
            sides = np.delete(np.array([r.shape for r in good]) * spacing, axis, axis=1)
            inside = [round(n) for n in np.median(sides / pixel, axis=0)]
            why = f"sizes of pixels differ by a factor of {spread:.3g}; this is their median"
            proposals.append(Proposal("--spacing", ",".join(f"{s:.3g}" for s in pixel), why))
            pixels = f"slices then have {inside[0]}x{inside[1]} pixels (median)"
        size = _sizes(min(n, 256) for n in inside)
        proposals.append(Proposal("--image-size", ",".join(map(str, size)), pixels))
        if not spaced and max(n / s for n, s in zip(inside, size)) > NARROW:
            proposals.append(Proposal("--slices", "whole", f"{pixels}, far more than the network can see at a time"))
    else:
        spread = float((spacing.max(axis=0) / spacing.min(axis=0)).max())
        if spread > 1.1:
            target = ",".join(f"{s:.3g}" for s in usual)
            why = f"spacings differ by a factor of {spread:.3g}; this is their median"
            proposals.append(Proposal("--spacing", target, why))
        extent = [min(n, 64) for n in shape]
        text = "x".join(f"{n:.0f}" for n in shape)
        size = _sizes(extent)
        proposals.append(Proposal("--image-size", ",".join(map(str, size)), f"volumes have {text} voxels (median)"))
    try:
        measured = [r.measured for r in good if r.measured]
        intensity = choose_intensity("auto", None, data.modalities, measured)
        kinds = {channel.kind for channel in intensity.channels}
        proposals.append(Proposal("--normalise", kinds.pop() if len(kinds) == 1 else "auto", intensity.reason))
    except UserError as error:
        proposals.append(Proposal("--normalise", "percentile", str(error)))
    return proposals


def _flat(good: Sequence[CaseReport], shape: np.ndarray, spacing: np.ndarray) -> tuple[bool, str]:
    """Whether slices suit the data better than patches of volumes, and why."""
    if all(r.axes == 2 for r in good):
        return True, "the images are 2-D"
    if shape.min() < 16:
        return True, f"volumes have {shape.min():.0f} slices (median)"
    ratio = float(spacing.max() / spacing.min())
    if ratio >= 3:
        return True, f"voxels are {ratio:.3g} times longer along one axis"
    return False, f"voxels are nearly cubes, {'x'.join(f'{s:.3g}' for s in spacing)} {good[0].unit}"


def _sizes(extent: Iterable[float]) -> list[int]:
    """The multiples of 16 nearest to numbers of voxels. The default network needs such sizes, not all of them 16."""
    sizes = [max(16, 16 * round(n / 16)) for n in extent]
    return sizes if max(sizes) > 16 else [32] * len(sizes)


def modality_guess(data: DataFolder, reports: Sequence[CaseReport]) -> str:
    """The modality in words: that of the description, or a guess from the intensities."""
    if data.modalities:
        return ", ".join(data.modalities)
    measured = [r.measured for r in reports if r.measured]
    if not measured:
        return "unknown"
    if all(m.eight_bits and len(m.low) == 3 for m in measured):
        return "colour pictures"
    if all(all(m.hounsfield) for m in measured):
        return "CT (whole numbers below -500)"
    return "grey pictures" if all(r.unit == "pixel" for r in reports if r.measured) else "MR or other"


def summary(data: DataFolder, reports: Sequence[CaseReport], labels: LabelMap) -> dict[str, Any]:
    """All that `pglcl inspect --json` prints."""
    good = [r for r in reports if r.spacing]
    spacing = np.array([r.spacing for r in good], np.float64) if good else np.ones((1, 3))
    return {
        "data": str(data.root),
        "layout": data.layout,
        "volumes": len(reports),
        "patients": len(data.patients),
        "labelled": sum(r.case.label is not None for r in reports),
        "unlabelled": sum(r.case.label is None for r in reports),
        "modality": modality_guess(data, reports),
        "spacing": {
            name: [float(s) for s in f(spacing, axis=0)]
            for name, f in (("least", np.min), ("median", np.median), ("most", np.max))
        },
        "unit": distance_unit(data),
        "labels": labels.describe(),
        "classes": class_table(data, reports, labels),
        "cases": [r.as_dict() for r in reports],
        "warnings": [*warnings_of(data, reports, labels), *(note for r in reports for note in r.notes)],
        "problems": [line for r in reports for line in r.problems],
        "proposals": [dataclasses.asdict(p) for p in propose(data, reports)],
    }
