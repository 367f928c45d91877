"""Checks, reads and prepares the volumes of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pglcl.cache import clear_partial, prepare_cached
from pglcl.cases import Split, cases_of, split_patients
from pglcl.config import TrainConfig
from pglcl.formats import itk
from pglcl.formats.names import READERS, suffix_of
from pglcl.inspection import Survey, survey
from pglcl.labels import LabelMap
from pglcl.layouts import Case, DataFolder, open_folder
from pglcl.prepare import Prepared, decide_slices, prepare
from pglcl.progress import Progress


@dataclass
class TrainingData:
    """The volumes of a run, read and prepared; without those of the test.

    survey: what was measured of them. Its labels and intensities become part of the model.
    """

    folder: DataFolder
    split: Split
    survey: Survey
    labelled: list[Prepared]
    unlabelled: list[Prepared]
    validation: list[Case]

    @property
    def num_classes(self) -> int:
        return len(self.survey.labels)

    @property
    def channels(self) -> int:
        return self.survey.channels


def load_training_data(
    root: Path, config: TrainConfig, split: Split | None = None, *, progress: Progress | None = None
) -> TrainingData:
    """Reads the volumes of a training. It checks all of them first, so that every problem is named before it begins.

    Args:
        root: the data folder.
        config: the options of the run.
        split: that of a resumed run; by default the options decide.
        progress: prints notes.

    Raises:
        UserError: a line for each problem of the data.
    """
    folder = open_folder(root)
    config = decide_slices(config, folder.cases)
    split = split or split_patients(folder, config)
    found = survey(folder, config, split, print_line=progress.print_line if progress else None)
    if progress:
        for note in found.notes:
            progress.print_line(note)

    def prepared(case: Case, labels: LabelMap | None) -> Prepared:
        if config.cache:
            return prepare_cached(Path(config.cache), case, config, found.slice_axis, found.intensity, labels)
        return prepare(case, config, found.slice_axis, found.intensity, labels)

    if config.cache:
        clear_partial(Path(config.cache))
    labelled = [prepared(case, found.labels) for case in cases_of(folder, split.labelled, with_label=True)]
    kept = {int(k) for one in labelled if one.label is not None for k in one.label.unique()}
    if progress:
        for line in found.lost_classes(kept, config):
            progress.print_line(line)
    if config.spatial_dims == 3:
        for one in labelled:
            one.foreground  # noqa: B018  (computed here once, instead of in every process that prepares batches)
    unlabelled = cases_of(folder, split.unlabelled) if config.semi else []
    without = [prepared(dataclasses.replace(case, label=None), None) for case in unlabelled]
    return TrainingData(folder, split, found, labelled, without, cases_of(folder, split.validation, with_label=True))


def cases_read(folder: DataFolder, split: Split) -> list[Case]:
    """The cases that a training on this split reads: not the test, and no labels of unlabelled patients."""
    with_label = cases_of(folder, (*split.labelled, *split.validation), with_label=True)
    return [*with_label, *(dataclasses.replace(case, label=None) for case in cases_of(folder, split.unlabelled))]


def files_behind(folder: DataFolder, cases: Iterable[Case]) -> list[Path]:
    """Every file that these cases come from: images, labels, and lists or descriptions of the folder."""
    return [*folder.descriptions, *files_of_cases(cases)]


def files_of_cases(cases: Iterable[Case]) -> set[Path]:
    """The files of the images and labels of these cases."""
    paths = {path for case in cases for path in (*case.images, case.label) if path is not None}
    return {file for path in paths for file in files_of(path)}


def files_of(path: Path) -> list[Path]:
    """All files of an image: a folder of DICOM slices, a header with its voxels beside it, or one file."""
    if path.is_dir():  # without hidden files, such as macOS and others leave in folders that are looked at
        found = (file for file in path.rglob("*") if file.is_file())
        return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return [path, *itk.voxel_files(path)] if READERS.get(suffix_of(path)) == "itk" else [path]
