"""The layouts of data folders: which files are the channels and the label of a case, and who is its patient."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pglcl.errors import UserError
from pglcl.files import read_json
from pglcl.formats import hdf5, itk, read_source
from pglcl.formats.names import (
    inputs_in,
    is_dicom_folder,
    is_hidden,
    is_input_file,
    known_suffixes,
    list_folder,
    stem,
    suffix_of,
)
from pglcl.labels import LabelMap

HDF5 = (".h5", ".hdf5")  # image and label in one file
NUMBERED = re.compile(r"(.+)_([0-9]{4})", re.DOTALL)


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


# --- from files to cases --------------------------------------------------------------------------------------------


def group_files(files: Iterable[Path], labels: Collection[str] = ()) -> dict[str, tuple[Path, ...]]:
    """Groups files into cases, by one rule for data folders and for `predict`.

    If a name ends in `_0000`, every name must end in `_` and four digits, the number of a channel; the part before them
    names the case. The channels of a case are numbered 0000, 0001, ... without a gap, and are the same for every case.
    Otherwise, such numbers (`scan_2015`, `case_0001` without a `case_0000`) belong to the name.

    Args:
        files: images, in any order. Hidden files (`._*`, `.partial-*`) and unknown suffixes are refused.
        labels: names of the label files, if there are any. If they name single files (`case_0003`), each file is a
            case, whatever its number.

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
    """Whether labels name single files, so that `case_0003` is a case and not a channel."""
    single = [label for label in labels if (m := NUMBERED.fullmatch(label)) and int(m[2]) in numbers.get(m[1], {})]
    whole = [label for label in labels if label in numbers]
    if not single:
        return False
    if whole:
        raise UserError(
            f"labels {single[0]} and {whole[0]}: the first names a single file, the second a case with channels 0000, "
            "0001, ...; labels must be all of one kind"
        )
    more = sorted(max(channels) for channels in numbers.values())[-1]
    if more and all(label.endswith("_0000") for label in single):
        raise UserError(
            f"label {single[0]}: is it of a case of its own, or of the case {single[0][:-5]}, with channels 0000 to "
            f"{more:04d}? The label of a case with channels must have no number: {single[0][:-5]}"
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

LAYOUTS = """patientXXX/patientXXX_frameYY.nii.gz (ACDC), dataset.json (Decathlon, nnU-Net), images/ beside labels/, \
case_XXXXX/imaging.nii.gz (KiTS), data/*.h5 and data/slices/*.h5 (SSL4MIS), or a .csv or .json list of files"""


def open_folder(root: Path) -> DataFolder:
    """Recognises the layout of a data folder, or reads a list of files; `docs/data.md` has a table of them.

    Raises:
        UserError: no layout fits, or the files break the rules of the one that does.
    """
    if root.is_file() and root.suffix.lower() in (".csv", ".json"):
        data = _list(root)
    elif not root.is_dir():
        raise UserError(f"{root}: no such folder" + (", and no .csv or .json list" if root.exists() else ""))
    else:
        data = _layout_of(root)(root)
    if not data.cases:
        raise UserError(f"{root}: no volumes found. Expected {LAYOUTS}")
    data.cases.sort(key=lambda case: case.name)
    names = Counter(case.name for case in data.cases)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"{root}: volumes of the same name: {', '.join(twice[:5])}")
    data.notes += _alike_names(data.cases)
    return data


# What stands behind the name of a patient, where a patient has several volumes: patient001_frame01, s3_visit2.
VOLUME_OF_A_PATIENT = re.compile(
    r"(?i)(.+?)[_-](?:frame|slice|visit|ses|session|time|timepoint|tp|scan|phase|day|week|month|year|baseline|followup|"
    r"pre|post|ed|es|left|right)[_-]?[0-9]*"
)


def _alike_names(cases: Iterable[Case]) -> list[str]:
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
        f"{alike[0][0]} and {alike[0][1]} look like volumes of one patient, and count as two patients, of whom one may "
        f"be trained on and the other scored ({len(alike)} such names); a list with the column patient keeps them "
        "together"
    ]


def _layout_of(root: Path) -> Any:
    list_folder(root)  # raises UserError for a folder that cannot be read
    if _is_there(root / "dataset.json"):
        content = read_json(root / "dataset.json")
        v2 = isinstance(content, dict) and ("channel_names" in content or "file_ending" in content)
        return _nnunet if v2 else _decathlon
    if _is_there(root / "images", folder=True):
        return _plain
    if (root / "data" / "slices").is_dir() or any(suffix_of(p) == ".h5" for p in _children(root, "data")):
        return _ssl4mis
    if any(stem(path) == "imaging" for path in _kits_images(root)):
        return _kits
    return _acdc


def _is_there(path: Path, *, folder: bool = False) -> bool:
    """Whether a file or folder is there.

    Raises:
        UserError: something else has the name, such as a link to nothing. If it were silently left out, the folder
            would seem to hold other data.
    """
    kind = "folder" if folder else "file"
    if not os.path.lexists(path):
        return False
    if not (path.is_dir() if folder else path.is_file()):
        what = f"is a link to {os.readlink(path)}, where no {kind} is" if path.is_symlink() else "is something else"
        raise UserError(f"{path}: must be a {kind}, {what}")
    return True


def _children(root: Path, name: str = "") -> list[Path]:
    folder = root / name
    return list_folder(folder) if folder.is_dir() else []


def _files_below(root: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Every file of a known suffix, at any depth. Hidden folders and links to a folder `above` are left out."""
    here = root.resolve()
    if here in above:
        return []
    found = list_folder(root)
    files = [path for path in found if is_input_file(path)]
    for path in found:
        if path.is_symlink() and not path.exists():  # for example to a patient's folder that was moved
            raise UserError(f"{path}: is a link to {os.readlink(path)}, where nothing is")
    below = [path for folder in found if folder.is_dir() for path in _files_below(folder, (*above, here))]
    return files + below


def _holds_images(folder: Path) -> bool:
    """Whether images lie at any depth of a folder. What cannot be looked at there does not matter."""
    try:
        return bool(_files_below(folder))
    except UserError:
        return False


def _refuse_lonely(labels: Iterable[Path], images: Path) -> None:
    problems = [f"{path}: a label without an image in {images}" for path in labels]
    if problems:
        raise UserError(*problems)


def _acdc(root: Path) -> DataFolder:
    pattern = re.compile(r"(patient\d+)_frame\d+(_gt)?")
    matches = [(path, match) for path in _files_below(root) if (match := pattern.fullmatch(stem(path)))]
    images = _unique_names([path for path, match in matches if not match[2]])
    labels = {name[: -len("_gt")]: path for name, path in _unique_names([p for p, m in matches if m[2]]).items()}
    cases = [Case(name, name.split("_")[0], (path,), labels.pop(name, None)) for name, path in images.items()]
    _refuse_lonely(labels.values(), root)
    names = {0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    return DataFolder(root, "acdc", cases, LabelMap.of_values(names, names), names)


def _plain(root: Path) -> DataFolder:
    images, labels = root / "images", root / "labels"
    return DataFolder(root, "plain", _pair(images, labels), notes=_not_read(images, labels))


def _not_read(*folders: Path) -> list[str]:
    """Lines about files beside images and labels that are not read: of other formats, or in folders of their own.

    A label among them would make its image count as unlabelled.
    """
    lines = []
    for folder in folders:
        found = list_folder(folder) if folder.is_dir() else []
        voxels = {file.name for path in found if suffix_of(path) == ".mhd" for file in itk.voxel_files(path)}
        others = [path.name for path in found if path.is_file() and not suffix_of(path) and path.name not in voxels]
        below = [path.name for path in found if path.is_dir() and not is_dicom_folder(path) and _holds_images(path)]
        for names, why in (
            (others, "their format is not known by its suffix"),
            (below, "folders of images; images and labels must lie directly there"),
        ):
            if names:
                some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                lines.append(f"{folder}: {some} ({len(names)}): not read, {why}")
    return lines


def _pair(images: Path, labels: Path, channels: int = 0) -> list[Case]:
    """Cases of a folder of images and a folder of labels with the same names; `channels` of each case, 0: unknown."""
    by_name = _unique_names(inputs_in(labels)) if _is_there(labels, folder=True) else {}
    files = inputs_in(images)
    if channels:
        _require_numbers(files, channels)
    groups = group_files(files, () if channels else by_name)
    cases = [Case(name, name, paths, by_name.pop(name, None)) for name, paths in groups.items()]
    _refuse_lonely(by_name.values(), images)
    return cases


def _require_numbers(files: Iterable[Path], channels: int) -> None:
    """Checks nnU-Net's names: each ends in the number of one of the channels that dataset.json names."""
    problems = []
    for path in files:
        match = NUMBERED.fullmatch(stem(path))
        if not match or int(match[2]) >= channels:
            problems.append(f"{path}: must end in _0000 to _{channels - 1:04d}, the channels that dataset.json names")
    if problems:
        raise UserError(*problems)


def _kits_images(root: Path) -> list[Path]:
    folders = [p for p in [*_children(root), *_children(root, "data")] if p.is_dir() and p.name.startswith("case")]
    return [path for folder in folders for path in list_folder(folder) if is_input_file(path)]


def _kits(root: Path) -> DataFolder:
    files = _kits_images(root)
    cases, problems = [], []
    for folder in sorted({path.parent for path in files}):
        own = _unique_names([path for path in files if path.parent == folder])
        if "imaging" in own:
            cases.append(Case(folder.name, folder.name, (own["imaging"],), own.get("segmentation")))
        elif "segmentation" in own:  # the images of KiTS are fetched by a program of their own
            problems.append(f"{own['segmentation']}: a label without its image, {folder / 'imaging.nii.gz'}")
    if problems:
        raise UserError(*problems)
    names = {0: "background", 1: "kidney", 2: "tumor", 3: "cyst"}
    return DataFolder(root, "kits", cases, class_names=names, modalities=("CT",))


# --- dataset.json ---------------------------------------------------------------------------------------------------


def _decathlon(root: Path) -> DataFolder:
    file = root / "dataset.json"
    content = read_json(file)
    cases, absent = [], 0
    try:
        for entry in content.get("training", []):
            images = _decathlon_images(root / entry["image"])
            name = stem(root / entry["image"])
            cases.append(Case(name, name, images, root / entry["label"]))
        for entry in content.get("test", []):
            image = root / (entry["image"] if isinstance(entry, dict) else entry)
            images = _decathlon_images(image)
            if images[0].exists():  # the official test images have no labels: they are unlabelled volumes
                cases.append(Case(stem(image), stem(image), images, None))
            else:
                absent += 1
        labels = _named_values(_by_name(content.get("labels", {}), file), file)
        modalities = tuple(str(content.get("modality", {})[k]) for k in sorted(content.get("modality", {}), key=int))
        _refuse_confusions(file, cases)
    except (TypeError, KeyError, AttributeError, ValueError, OSError) as error:
        raise UserError(f"{file}: not a Decathlon description: {error!r}") from error
    notes = _not_listed(file, cases)
    notes += [f"{file}: {absent} of the images that it lists as test are not there"] if absent else []
    return DataFolder(root, "decathlon", cases, labels, modalities=modalities, notes=notes)


def _not_listed(file: Path, cases: Sequence[Case]) -> list[str]:
    """A line for each folder of images, about those that `file` does not list. They are not even unlabelled."""
    listed = {path.resolve() for case in cases for path in case.images}
    lines = []
    for folder in sorted({path.parent for case in cases for path in case.images}):
        others = [path.name for path in _children(folder) if is_input_file(path) and path.resolve() not in listed]
        if others:
            some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            lines.append(f"{folder}: {some} ({len(others)}): not read, {file.name} does not list them")
    return lines


def _by_name(names: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The value of each name, from the name of each value."""
    twice = [name for name, count in Counter(map(str, names.values())).items() if count > 1]
    if twice:
        values = ", ".join(value for value, name in names.items() if str(name) == twice[0])
        raise UserError(
            f"{file}: the labels {values} have one name, {twice[0]!r}; without labels in the file, --labels can merge "
            "values"
        )
    return {str(name): value for value, name in names.items()}


def _decathlon_images(image: Path) -> tuple[Path, ...]:
    """The named file; or, in folders of nnU-Net's first version, its channels `name_0000`, `name_0001`, ..."""
    if image.exists() or not image.parent.is_dir():
        return (image,)
    name = stem(image)
    own = [p for p in inputs_in(image.parent) if (m := NUMBERED.fullmatch(stem(p))) and m[1] == name]
    return group_files(own).get(name, (image,)) if own else (image,)


def _nnunet(root: Path) -> DataFolder:
    """nnU-Net v2. Regions are trained as exclusive classes, in the order of `regions_class_order`."""
    file = root / "dataset.json"
    content = read_json(file)
    notes: list[str] = []
    try:
        names = content["channel_names"]
        modalities = tuple(str(names[k]) for k in sorted(names, key=int)) if isinstance(names, dict) else tuple(names)
        labels = _nnunet_labels(content, file, notes)
        ending = content.get("file_ending", "")
        listed = content.get("dataset")
        if listed:
            entries = {n: (tuple(root / i for i in e["images"]), root / e["label"]) for n, e in listed.items()}
            cases = [Case(name, name, images, label) for name, (images, label) in entries.items()]
            _refuse_confusions(file, cases)
        else:
            cases = _pair(root / "imagesTr", root / "labelsTr", len(modalities))
    except (TypeError, KeyError, AttributeError, ValueError, OSError) as error:
        raise UserError(f"{file}: not an nnU-Net description: {error!r}") from error
    if _is_there(root / "imagesUn", folder=True):
        _require_numbers(inputs_in(root / "imagesUn"), len(modalities))
        groups = group_files(inputs_in(root / "imagesUn"))
        cases += [Case(name, name, images, None) for name, images in groups.items()]
    problems = [
        f"{path}: must end in {ending}, as dataset.json says"
        for case in cases
        for path in (*case.images, *([case.label] if case.label else []))
        if ending and not path.name.lower().endswith(str(ending).lower())
    ]
    for case in cases:
        if len(case.images) != len(modalities) and _channels_inside(case) != len(modalities):
            problems.append(f"{case.images[0]}: must have {len(modalities)} channel files, got {len(case.images)}")
    if problems:
        raise UserError(*problems)
    notes += _not_read(*(root / name for name in ("imagesTr", "labelsTr", "imagesUn")))
    notes += _not_listed(file, cases) if listed else []
    return DataFolder(root, "nnunet", cases, labels, modalities=modalities, notes=notes)


def _channels_inside(case: Case) -> int:
    """The number of channels in a case's files; 0 if one cannot be read, which is reported when all files are read.

    nnU-Net keeps a colour picture in one file, `name_0000.png`, but counts each colour as a channel.
    """
    try:
        return sum(read_source(path).channels for path in case.images)
    except UserError:
        return 0


def _nnunet_labels(content: Mapping[str, Any], file: Path, notes: list[str]) -> LabelMap | None:
    labels = dict(content["labels"])
    regions = {name: value for name, value in labels.items() if isinstance(value, list)}
    if not regions:
        return _named_values(labels, file)
    order = content.get("regions_class_order")
    foreground = [name for name in labels if name not in ("background", "ignore")]
    if not isinstance(order, list) or len(order) != len(foreground):
        raise UserError(
            f"{file}: labels that are lists (regions) need regions_class_order, a value for each of "
            f"{', '.join(foreground)}; got {order!r}"
        )
    parts = {value for name in foreground for value in (regions[name] if name in regions else [labels[name]])}
    if parts - set(order) - {0}:
        raise UserError(f"{file}: regions have the values {sorted(parts)}, regions_class_order {order} must have all")
    notes.append(
        "regions are trained as exclusive classes: "
        + ", ".join(f"value {value} is {name} alone" for name, value in zip(foreground, order))
    )
    named = {"background": 0, **{f"{name} alone": value for name, value in zip(foreground, order)}}
    return _named_values({**named, **{name: labels[name] for name in ("ignore",) if name in labels}}, file)


def _named_values(labels: Mapping[str, Any], file: Path) -> LabelMap | None:
    """The map of `labels`, which give a value for each name; None without any. Voxels called ignore are left out."""
    values: dict[int, str] = {}
    for name, value in labels.items():
        if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
            raise UserError(f"{file}: labels must be whole numbers from 0, got {value!r} for {name!r}")
        if int(value) in values:
            raise UserError(f"{file}: labels {values[int(value)]!r} and {name!r} have one value, {value}")
        if name.lower() == "background" and int(value):
            raise UserError(
                f"{file}: the background must have the value 0, got {value}; without labels in the file, --labels may "
                "begin with it"
            )
        if name.lower() == "ignore" and not int(value):  # else the next class would count as the background
            raise UserError(
                f"{file}: the value 0 is the background, and cannot be ignored; without labels in the file, --labels "
                "can say what it is"
            )
        values[int(value)] = name
    ignored = [value for value, name in values.items() if name.lower() == "ignore"]
    return LabelMap.of_values(set(values) - set(ignored), values, ignored) if labels else None


# --- SSL4MIS --------------------------------------------------------------------------------------------------------


def _ssl4mis(root: Path) -> DataFolder:
    """Volumes of `data/`, and slices of `data/slices/` whose volume is not there; list files give the parts."""
    volumes = _unique_names([p for p in _children(root, "data") if suffix_of(p) == ".h5" and is_input_file(p)])
    slices = _unique_names([p for p in _children(root, "data/slices") if suffix_of(p) == ".h5" and is_input_file(p)])
    alone = {name: path for name, path in slices.items() if re.sub(r"_slice_?\d+$", "", name) not in volumes}
    cases = []
    for name, path in {**volumes, **alone}.items():
        cases.append(Case(name, _ssl4mis_patient(name), (path,), path if hdf5.has_label(path) else None))
    data = DataFolder(root, "ssl4mis", cases)
    for part, files in {
        "train": ("train.list", "train_slices.list"),
        "validation": ("val.list",),
        "test": ("test.list",),
    }.items():
        listed = [name for file in files for name in _read_list(root / file)]
        patients = dict.fromkeys(_ssl4mis_patient(name) for name in listed)
        if patients:
            data.parts[part] = tuple(patients)
    _check_parts(data)
    return data


def _ssl4mis_patient(name: str) -> str:
    """The patient of a file name: patient001 for `patient001_frame01_slice_3`."""
    return re.sub(r"(_frame_?\d+)?(_slice_?\d+)?$", "", name)


def _read_list(file: Path) -> list[str]:
    if not _is_there(file):
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as a list of names: {error}") from error
    return [line.removesuffix(".h5") for line in lines if line]


def _check_parts(data: DataFolder) -> None:
    seen: dict[str, str] = {}
    for part, patients in data.parts.items():
        missing = sorted(set(patients) - set(data.patients))
        if missing:
            raise UserError(f"{data.root}: the list of {part} has {missing[0]!r}, which has no file")
        for patient in patients:
            if seen.setdefault(patient, part) != part:
                raise UserError(f"{data.root}: the lists of {seen[patient]} and {part} share the patient {patient!r}")


# --- a list of files ------------------------------------------------------------------------------------------------


def _list(file: Path) -> DataFolder:
    """Reads a CSV or JSON list. Each row has image, and may have label, patient, name, and channel... for channels."""
    content: Any = _csv_rows(file) if file.suffix.lower() == ".csv" else read_json(file)
    labels = None
    if isinstance(content, dict) and isinstance(content.get("cases"), list):
        if set(content) - {"cases", "labels"} or not isinstance(content.get("labels", {}), dict):
            raise UserError(
                f"{file}: must have cases, a list, and may have labels, name: value; got {', '.join(content)}"
            )
        labels = _named_values(content.get("labels", {}), file)
        content = content["cases"]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{file}: must be a list of objects with image, label, patient")
    cases, problems = [], []
    columns = _channel_columns(content[0]) if content else []
    for number, row in enumerate(content, start=1):
        try:
            cases.append(_listed_case(file, row, columns))
        except UserError as error:
            problems += [f"{file}: entry {number}: {line}" for line in error.lines]
    problems += _without_patient(file, content)
    if problems:
        raise UserError(*problems)
    _refuse_confusions(file, cases)
    return DataFolder(file, "list", cases, labels, columns=("image", *columns))


def _channel_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of further channels that an entry fills, in the order in which it has them."""
    return [str(key) for key in row if str(key).startswith("channel") and row[key]]


def _refuse_confusions(file: Path, cases: Iterable[Case]) -> None:
    """Raises UserError for files that a list or description names for two purposes."""
    cases = list(cases)
    images = Counter(path.resolve() for case in cases for path in case.images)
    twice = [f"{file}: {path} is listed {n} times" for path, n in images.items() if n > 1]
    twice += _wrong_labels(file, cases)
    if twice:
        raise UserError(*twice)


def _without_patient(file: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Lines for entries without a patient beside others with one.

    Each would become a patient of its own. Spreadsheets leave the cells below a merged one empty: so the volumes of a
    patient could come into training and test.
    """
    without = [number for number, row in enumerate(rows, start=1) if not row.get("patient")]
    if not without or len(without) == len(rows):
        return []
    numbers = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
    return [f"{file}: no patient in the entries {numbers}, while others have one; give it in all of them, or in none"]


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


def _listed_case(file: Path, row: Mapping[str, Any], columns: Sequence[str]) -> Case:
    """The case of an entry; `columns`: those of further channels, in their order, which every entry must fill."""
    known = ("image", "label", "patient", "name", "channels")
    foreign = [key for key in row if key not in known and not str(key).startswith("channel")]
    if foreign:
        raise UserError(f"has {foreign[0]!r}; columns are image, label, patient, name and channel...")
    if set(_channel_columns(row)) != set(columns):
        names = [", ".join(filled) or "no further channel" for filled in (columns, _channel_columns(row))]
        raise UserError(f"must have the channels of the first entry, {names[0]}, got {names[1]}")
    images = [row.get("image"), *(row[key] for key in columns)]
    flat = [item for value in images for item in (value if isinstance(value, list) else [value]) if item]
    texts = [*flat, *(row[key] for key in ("label", "patient", "name") if row.get(key))]
    if not row.get("image") or not all(isinstance(text, str) for text in texts):
        raise UserError("must have an image, and paths and names as text")
    paths = tuple(file.parent / text for text in flat)
    label = file.parent / row["label"] if row.get("label") else None
    missing = [path for path in (*paths, *([label] if label else [])) if "\0" in str(path) or not path.exists()]
    if missing:
        raise UserError(f"{missing[0]}: not found")
    match = NUMBERED.fullmatch(stem(paths[0])) if len(paths) > 1 else None
    # The name has the folders, too, since files often have the same name in every case: patient1/t1.nii.gz.
    folders = [part for part in Path(flat[0]).parts[:-1] if part not in ("/", ".", "..")]
    name = row.get("name") or "_".join([*folders, match[1] if match else stem(paths[0])])
    if "/" in name or is_hidden(Path(name)):
        raise UserError(f"the name {name!r} must be fit for a file: no / in it, and no dot before it")
    return Case(name, row.get("patient") or name, paths, label)


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file. Spreadsheets of many countries separate columns by semicolons or tabs, not commas."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            header = text.readline()
            separator = max(",;\t", key=header.count)  # the comma if there is one column
            text.seek(0)
            reader = csv.DictReader(text, strict=True, restkey="more than the header", delimiter=separator)
            columns = Counter(str(name).strip() for name in reader.fieldnames or ())
            twice = [name for name, count in columns.items() if count > 1]
            if twice:
                raise UserError(f"{file}: has the column {twice[0]!r} twice")
            rows = [{str(k).strip(): v.strip() if isinstance(v, str) else v for k, v in row.items()} for row in reader]
            return [row for row in rows if any(row.values())]  # spreadsheets leave rows of empty cells
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: not readable as CSV: {error}") from error


# --- inputs of predict ----------------------------------------------------------------------------------------------


def group_inputs(paths: Iterable[Path]) -> list[Case]:
    """The inputs of `predict`, files and folders of files, as cases without labels.

    Raises:
        UserError: a folder without images, or as for :func:`group_files`.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir() or is_dicom_folder(path):
            if os.path.lexists(path):
                is_input_file(path)
            files.append(path)
            continue
        found = inputs_in(path)
        if not found:
            raise UserError(f"{path}: no image in this folder; images end in {known_suffixes()}")
        files += found
    return [Case(name, name, images, None) for name, images in group_files(files).items()]
