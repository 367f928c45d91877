"""The volumes of a run: checked, read and prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pglcl.cases import Split, cases_of, count_classes, inspect_case, split_patients
from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.layouts import Case, DataFolder, open_folder
from pglcl.prepare import Prepared, choose_slice_axis, prepare
from pglcl.progress import Progress
from pglcl.volumes import read_label


@dataclass
class TrainingData:
    """The volumes of a run, read and prepared. Those of the test are not among them."""

    folder: DataFolder
    split: Split
    num_classes: int
    channels: int
    slice_axis: int | None
    labelled: list[Prepared]
    unlabelled: list[Prepared]
    validation: list[Case]


def load_training_data(
    root: Path, config: TrainConfig, split: Split | None = None, *, progress: Progress | None = None
) -> TrainingData:
    """Reads what training needs, and checks all of it first: every problem is named before an hour is spent.

    Args:
        split: that of a run which is resumed; by default what the options say.
    """
    folder = open_folder(root)
    split = split or split_patients(folder, config)
    labelled = cases_of(folder, split.labelled, with_label=True)
    unlabelled = cases_of(folder, split.unlabelled)
    if progress:
        progress.say(f"{folder.root}: reading {len(labelled) + len(unlabelled)} volumes")
    _check(root, config, labelled, unlabelled)
    num_classes = count_classes(folder, config, (read_label(c.label, c.images[0]) for c in labelled if c.label))
    first = prepare(labelled[0], config, num_classes, None if config.spatial_dims == 3 else 2, label=False)
    slice_axis = choose_slice_axis(config, first.volume.data.shape[1:])
    # Their labels are checked once more, now that the number of classes is known.
    with_label = [prepare(case, config, num_classes, slice_axis, label=True) for case in labelled]
    without = [prepare(case, config, num_classes, slice_axis, label=False) for case in unlabelled if config.semi]
    channels = {len(p.image) for p in (*with_label, *without)}
    if len(channels) > 1:
        raise UserError(f"{root}: volumes have different numbers of channels: {sorted(channels)}")
    validation = cases_of(folder, split.validation, with_label=True)
    return TrainingData(folder, split, num_classes, channels.pop(), slice_axis, with_label, without, validation)


def _check(root: Path, config: TrainConfig, labelled: Sequence[Case], unlabelled: Sequence[Case]) -> None:
    """Raises what is wrong with the volumes, all of it."""
    problems, empty = [], 0
    for case in labelled:
        report = inspect_case(case, config.num_classes or None)
        problems += report.problems
        empty += not any(report.label_voxels.get(k) for k in report.label_voxels if k > 0) and not report.problems
    for case in unlabelled:  # their label files, if there are any, are none of our business
        problems += inspect_case(dataclasses.replace(case, label=None)).problems
    if problems:
        raise UserError(*problems, f"{len(problems)} problems; pglcl inspect {root} lists those of the whole folder")
    if labelled and empty == len(labelled):
        raise UserError(f"{root}: the labels of all {len(labelled)} labelled volumes are empty")
    if config.semi and not unlabelled:
        raise UserError(f"{root}: no unlabelled volume is left for --method {config.method}; use --method supervised")
