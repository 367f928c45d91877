"""The layouts of data folders: which files are the channels and the label of a case, and who is its patient.

Each layout has a module, whose `read` returns a :class:`DataFolder`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from pglcl.errors import UserError
from pglcl.files import read_json
from pglcl.formats.names import inputs_in, is_dicom_folder, is_input_file, known_suffixes, list_folder, stem, suffix_of
from pglcl.layouts import acdc, decathlon, file_list, kits, nnunet, plain, ssl4mis
from pglcl.layouts.data_folder import Case, DataFolder, alike_names, alike_patients
from pglcl.layouts.folders import children, is_there
from pglcl.layouts.grouping import group_files

__all__ = ["Case", "DataFolder", "group_files", "group_inputs", "open_folder"]

LAYOUTS = """patientXXX/patientXXX_frameYY.nii.gz (ACDC), dataset.json (Decathlon, nnU-Net), images/ beside labels/, \
case_XXXXX/imaging.nii.gz (KiTS), data/*.h5 and data/slices/*.h5 (SSL4MIS), or a .csv or .json list of files"""


def open_folder(root: Path) -> DataFolder:
    """Recognises the layout of a data folder, or reads a list of files; `docs/data.md` has a table of them.

    Raises:
        UserError: no layout fits, or the files break the rules of the one that does.
    """
    if root.is_file() and root.suffix.lower() in (".csv", ".json"):
        data = file_list.read(root)
    elif not root.is_dir():
        raise UserError(f"{root}: " + ("must be a folder, or a .csv or .json list" if root.exists() else "not found"))
    else:
        data = _layout_of(root)(root)
    if not data.cases:
        raise UserError(f"{root}: no volumes found. Expected {LAYOUTS}")
    data.cases.sort(key=lambda case: case.name)
    names = Counter(case.name for case in data.cases)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"{root}: several volumes have the same name: {', '.join(twice[:5])}")
    data.notes += [*alike_names(data.cases), *alike_patients(data.cases)]
    return data


def _layout_of(root: Path) -> Callable[[Path], DataFolder]:
    list_folder(root)  # raises UserError for a folder that cannot be read
    if is_there(root / "dataset.json"):
        content = read_json(root / "dataset.json")
        v2 = isinstance(content, dict) and ("channel_names" in content or "file_ending" in content)
        return nnunet.read if v2 else decathlon.read
    if is_there(root / "images", folder=True):
        return plain.read
    if (root / "data" / "slices").is_dir() or any(suffix_of(p) == ".h5" for p in children(root, "data")):
        return ssl4mis.read
    if any(stem(path) == "imaging" for path in kits.images_in(root)):
        return kits.read
    return acdc.read


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
            raise UserError(f"{path}: this folder has no image; images end in {known_suffixes()}")
        files += found
    return [Case(name, name, images, None) for name, images in group_files(files).items()]
