"""SSL4MIS: volumes and slices as HDF5 files, and lists of the patients of each part."""

from __future__ import annotations

import re
from pathlib import Path

from pglcl.errors import UserError
from pglcl.formats import hdf5
from pglcl.formats.names import is_input_file, suffix_of
from pglcl.layouts.data_folder import Case, DataFolder
from pglcl.layouts.folders import children, is_there
from pglcl.layouts.grouping import unique_names


def read(root: Path) -> DataFolder:
    """Volumes of `data/`, and slices of `data/slices/` whose volume is not there; list files give the parts."""
    volumes = unique_names([p for p in children(root, "data") if suffix_of(p) == ".h5" and is_input_file(p)])
    slices = unique_names([p for p in children(root, "data/slices") if suffix_of(p) == ".h5" and is_input_file(p)])
    alone = {name: path for name, path in slices.items() if re.sub(r"_slice_?\d+$", "", name) not in volumes}
    cases = []
    for name, path in {**volumes, **alone}.items():
        cases.append(Case(name, _patient(name), (path,), path if hdf5.has_label(path) else None))
    data = DataFolder(root, "ssl4mis", cases)
    for part, files in {
        "train": ("train.list", "train_slices.list"),
        "validation": ("val.list",),
        "test": ("test.list",),
    }.items():
        listed = [name for file in files for name in _read_list(root / file)]
        patients = dict.fromkeys(_patient(name) for name in listed)
        if patients:
            data.parts[part] = tuple(patients)
    _check_parts(data)
    return data


def _patient(name: str) -> str:
    """The patient of a file name: patient001 for `patient001_frame01_slice_3`."""
    return re.sub(r"(_frame_?\d+)?(_slice_?\d+)?$", "", name)


def _read_list(file: Path) -> list[str]:
    if not is_there(file):
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
