"""ACDC: a folder for each patient, with the volumes of two frames."""

from __future__ import annotations

import re
from pathlib import Path

from pglcl.formats.names import stem
from pglcl.labels import LabelMap
from pglcl.layouts.data_folder import Case, DataFolder
from pglcl.layouts.folders import files_below, refuse_lonely
from pglcl.layouts.grouping import unique_names


def read(root: Path) -> DataFolder:
    pattern = re.compile(r"(patient\d+)_frame\d+(_gt)?")
    matches = [(path, match) for path in files_below(root) if (match := pattern.fullmatch(stem(path)))]
    images = unique_names([path for path, match in matches if not match[2]])
    labels = {name[: -len("_gt")]: path for name, path in unique_names([p for p, m in matches if m[2]]).items()}
    cases = [Case(name, name.split("_")[0], (path,), labels.pop(name, None)) for name, path in images.items()]
    refuse_lonely(labels.values(), root)
    names = {0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    return DataFolder(root, "acdc", cases, LabelMap.of_values(names, names), names)
