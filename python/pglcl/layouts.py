"""How data folders are laid out: which files are the channels, the label and the patient of a case."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pglcl.errors import UserError
from pglcl.files import read_json
from pglcl.formats.names import inputs_in, is_dicom_folder, is_hidden, known_suffixes, list_folder, stem, suffix_of

NUMBERED = re.compile(r"(.+)_([0-9]{4})", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One volume. images: one file each channel, or one file with channels along the fourth axis."""

    name: str
    patient: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass
class DataFolder:
    """The cases of a folder, sorted by name. layout: acdc, decathlon or plain."""

    root: Path
    layout: str
    cases: list[Case]
    class_names: dict[int, str] = field(default_factory=dict)

    @property
    def patients(self) -> list[str]:
        return sorted({case.patient for case in self.cases})


# --- from files to cases --------------------------------------------------------------------------------------------


def group_files(files: Iterable[Path], labels: Collection[str] = ()) -> dict[str, tuple[Path, ...]]:
    """The one rule by which files become cases, in data folders and for `predict` alike.

    A name that ends in `_` and four digits is a channel of the case before them where some file's number is 0000. Then
    every file has a number, the numbers of a case are 0000, 0001, ... without a gap, and every case has the same ones.
    Other numbers (`scan_2015`, `case_0001` where there is no `case_0000`) belong to the name.

    Args:
        files: images, in any order. Hidden files (`._*`, `.partial-*`) and unknown suffixes are refused.
        labels: names of the label files, if there are any. Where they are those of single files (`case_0003`), each
            file is a case, whatever its number.

    Returns:
        The files of each case in the order of their channels, by name.

    Raises:
        UserError: a file twice, two files of one name (`a.nii` beside `a.nii.gz`), or numbers that break the rule.
    """
    files = list(files)
    _refuse_foreign(files)
    by_name = _unique_names(files)
    matches = {name: NUMBERED.fullmatch(name) for name in by_name}
    numbers: dict[str, dict[int, Path]] = {}
    for name, match in matches.items():
        if match:
            numbers.setdefault(match[1], {})[int(match[2])] = by_name[name]
    if not any(0 in channels for channels in numbers.values()) or _labels_name_files(numbers, labels):
        return {name: (by_name[name],) for name in sorted(by_name)}
    _check_numbers(numbers, [by_name[name] for name, match in matches.items() if not match])
    return {case: tuple(path for _, path in sorted(numbers[case].items())) for case in sorted(numbers)}


def _refuse_foreign(files: list[Path]) -> None:
    problems = []
    for path in files:
        if is_hidden(path):
            problems.append(f"{path}: is a hidden file, which is never read as an image")
        elif not suffix_of(path) and not path.exists():
            problems.append(f"{path}: not found")
        elif not suffix_of(path) and not path.is_dir():
            problems.append(f"{path}: must be a folder of DICOM slices, or end in {known_suffixes()}")
    if problems:
        raise UserError(*problems)


def _unique_names(files: list[Path]) -> dict[str, Path]:
    by_name: dict[str, Path] = {}
    problems = []
    for path in files:
        name = stem(path)
        if name not in by_name:
            by_name[name] = path
        elif path.absolute() == by_name[name].absolute():
            problems.append(f"{path}: is given twice")
        else:
            problems.append(f"{path}: has the name of {by_name[name]}; each case needs a name of its own")
    if problems:
        raise UserError(*problems)
    return by_name


def _labels_name_files(numbers: dict[str, dict[int, Path]], labels: Collection[str]) -> bool:
    """Whether the labels are those of single files, so that `case_0003` is a case and not a channel."""
    single = [label for label in labels if (m := NUMBERED.fullmatch(label)) and int(m[2]) in numbers.get(m[1], {})]
    whole = [label for label in labels if label in numbers]
    if not single:
        return False
    if whole:
        raise UserError(
            f"labels {single[0]} and {whole[0]}: the first is of the file of this name, the second of a case with "
            "channels 0000, 0001, ...; they must be all of one kind"
        )
    more = sorted(max(channels) for channels in numbers.values())[-1]
    if more and all(label.endswith("_0000") for label in single):
        raise UserError(
            f"label {single[0]}: is it of a case of its own, or of the case {single[0][:-5]} with the channels 0000 to "
            f"{more:04d}? Labels of cases with channels have no number: {single[0][:-5]}"
        )
    return True


def _check_numbers(numbers: dict[str, dict[int, Path]], unnumbered: list[Path]) -> None:
    usual = Counter(tuple(sorted(channels)) for channels in numbers.values() if 0 in channels).most_common(1)[0][0]
    problems = [f"{path}: has no channel number, while other files have _0000" for path in unnumbered]
    for case, channels in numbers.items():
        found = sorted(channels)
        listed = ", ".join(f"{n:04d}" for n in found)
        if found != list(range(len(found))):
            problems.append(
                f"{channels[found[0]]}: channels of {case} must be numbered from 0000 without a gap, got {listed}"
            )
        elif tuple(found) != usual:
            wanted = ", ".join(f"{n:04d}" for n in usual)
            problems.append(
                f"{channels[found[0]]}: {case} must have the channels of the others, {wanted}, got {listed}"
            )
        if len({path.parent for path in channels.values()}) > 1:
            problems.append(f"{channels[found[0]]}: channels of {case} must lie in one folder")
    if problems:
        raise UserError(*problems)


# --- layouts --------------------------------------------------------------------------------------------------------


def open_folder(root: Path) -> DataFolder:
    """Recognises the official ACDC folder, a Decathlon task, and `images/` beside `labels/`."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if (root / "dataset.json").is_file():
        data = _decathlon(root)
    elif (root / "images").is_dir():
        data = _plain(root)
    else:
        data = _acdc(root)
    if not data.cases:
        raise UserError(
            f"{root}: no volumes found. Expected patientXXX/patientXXX_frameYY.nii.gz (ACDC), a Decathlon task with "
            "dataset.json, or the folders images/ and labels/"
        )
    data.cases.sort(key=lambda case: case.name)
    names = Counter(case.name for case in data.cases)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"{root}: volumes of the same name: {', '.join(twice[:5])}")
    return data


def _files_below(root: Path) -> list[Path]:
    """Every file of a known suffix, at any depth; hidden folders are left out."""
    found = list_folder(root)
    below = [path for folder in found if folder.is_dir() for path in _files_below(folder)]
    return [path for path in found if suffix_of(path) and path.is_file()] + below


def _acdc(root: Path) -> DataFolder:
    pattern = re.compile(r"(patient\d+)_frame\d+(_gt)?")
    matches = [(path, match) for path in _files_below(root) if (match := pattern.fullmatch(stem(path)))]
    images = _unique_names([path for path, match in matches if not match[2]])
    labels = {name[: -len("_gt")]: path for name, path in _unique_names([p for p, m in matches if m[2]]).items()}
    cases = [Case(name, name.split("_")[0], (path,), labels.pop(name, None)) for name, path in images.items()]
    _refuse_lonely(labels.values(), root)
    names = {0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    return DataFolder(root, "acdc", cases, names)


def _decathlon(root: Path) -> DataFolder:
    content = read_json(root / "dataset.json")
    cases = []
    try:
        for entry in content.get("training", []):
            image = root / entry["image"]
            cases.append(Case(stem(image), stem(image), (image,), root / entry["label"]))
        for entry in content.get("test", []):
            image = root / (entry["image"] if isinstance(entry, dict) else entry)
            if image.exists():  # the official test images have no labels: they are unlabelled volumes
                cases.append(Case(stem(image), stem(image), (image,), None))
        names = {int(k): str(v) for k, v in content.get("labels", {}).items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{root / 'dataset.json'}: not a Decathlon description: {error!r}") from error
    return DataFolder(root, "decathlon", cases, names)


def _plain(root: Path) -> DataFolder:
    labels = _unique_names(inputs_in(root / "labels")) if (root / "labels").is_dir() else {}
    groups = group_files(inputs_in(root / "images"), labels)
    cases = [Case(name, name, paths, labels.pop(name, None)) for name, paths in groups.items()]
    _refuse_lonely(labels.values(), root / "images")
    return DataFolder(root, "plain", cases)


def _refuse_lonely(labels: Iterable[Path], images: Path) -> None:
    problems = [f"{path}: a label without an image in {images}" for path in labels]
    if problems:
        raise UserError(*problems)


def group_inputs(paths: Iterable[Path]) -> list[Case]:
    """What `predict` was given, files and folders of files, as cases without labels; see :func:`group_files`."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir() or is_dicom_folder(path):
            files.append(path)
            continue
        found = inputs_in(path)
        if not found:
            raise UserError(f"{path}: no image in this folder; images end in {known_suffixes()}")
        files += found
    return [Case(name, name, images, None) for name, images in group_files(files).items()]
