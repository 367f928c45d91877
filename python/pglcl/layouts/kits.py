"""KiTS: a folder for each case, with an image and a segmentation."""

from __future__ import annotations

from pathlib import Path

from pglcl.errors import UserError
from pglcl.formats.names import is_input_file, list_folder
from pglcl.layouts.data_folder import Case, DataFolder
from pglcl.layouts.folders import children
from pglcl.layouts.grouping import unique_names


def images_in(root: Path) -> list[Path]:
    folders = [p for p in [*children(root), *children(root, "data")] if p.is_dir() and p.name.startswith("case")]
    return [path for folder in folders for path in list_folder(folder) if is_input_file(path)]


def read(root: Path) -> DataFolder:
    files = images_in(root)
    cases, problems = [], []
    for folder in sorted({path.parent for path in files}):
        own = unique_names([path for path in files if path.parent == folder])
        if "imaging" in own:
            cases.append(Case(folder.name, folder.name, (own["imaging"],), own.get("segmentation")))
        elif "segmentation" in own:  # the images of KiTS are fetched by a program of their own
            problems.append(f"{own['segmentation']}: is a label without its image, {folder / 'imaging.nii.gz'}")
    if problems:
        raise UserError(*problems)
    names = {0: "background", 1: "kidney", 2: "tumor", 3: "cyst"}
    return DataFolder(root, "kits", cases, class_names=names, modalities=("CT",))
