"""The Medical Segmentation Decathlon: pairs of files, listed in dataset.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pglcl.errors import UserError, wrong_content
from pglcl.files import read_json
from pglcl.formats.names import inputs_in, stem
from pglcl.layouts.data_folder import Case, DataFolder, not_listed, other_count, refuse_confusions
from pglcl.layouts.grouping import NUMBERED, group_files
from pglcl.layouts.label_names import named_values


def read(root: Path) -> DataFolder:
    file = root / "dataset.json"
    content = read_json(file)
    cases, absent = [], 0
    try:
        for entry in content.get("training", []):
            images = _images(root / entry["image"])
            name = stem(root / entry["image"])
            cases.append(Case(name, name, images, root / entry["label"]))
        for entry in content.get("test", []):
            image = root / (entry["image"] if isinstance(entry, dict) else entry)
            images = _images(image)
            if images[0].exists():  # the official test images have no labels: they are unlabelled volumes
                cases.append(Case(stem(image), stem(image), images, None))
            else:
                absent += 1
        labels = named_values(_by_name(content.get("labels", {}), file), file)
        modalities = tuple(str(content.get("modality", {})[k]) for k in sorted(content.get("modality", {}), key=int))
        refuse_confusions(file, cases)
    except (TypeError, KeyError, AttributeError, ValueError, OSError) as error:
        raise UserError(f"{file}: not a Decathlon description: {wrong_content(error)}") from error
    notes = not_listed(file, cases)
    notes += other_count(file, content, sum(case.label is not None for case in cases))
    notes += [f"{file}: {absent} of the test images that it lists do not exist"] if absent else []
    return DataFolder(root, "decathlon", cases, labels, modalities=modalities, notes=notes)


def _by_name(names: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The value of each name, from the name of each value."""
    twice = [name for name, count in Counter(map(str, names.values())).items() if count > 1]
    if twice:
        values = ", ".join(value for value, name in names.items() if str(name) == twice[0])
        raise UserError(
            f"{file}: the labels {values} have the same name, {twice[0]!r}; give each its own name, or remove labels "
            "from the file and merge values with --labels"
        )
    return {str(name): value for value, name in names.items()}


def _images(image: Path) -> tuple[Path, ...]:
    """The named file; or, in folders of nnU-Net's first version, its channels `name_0000`, `name_0001`, ..."""
    if image.exists() or not image.parent.is_dir():
        return (image,)
    name = stem(image)
    own = [p for p in inputs_in(image.parent) if (m := NUMBERED.fullmatch(stem(p))) and m[1] == name]
    return group_files(own).get(name, (image,)) if own else (image,)
