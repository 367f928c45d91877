"""nnU-Net v2: a file for each channel, and dataset.json, which names channels and labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pglcl.errors import UserError, wrong_content
from pglcl.files import read_json
from pglcl.formats import read_source
from pglcl.formats.names import inputs_in
from pglcl.labels import LabelMap
from pglcl.layouts.data_folder import Case, DataFolder, not_listed, other_count, refuse_confusions
from pglcl.layouts.folders import is_there
from pglcl.layouts.grouping import group_files, require_numbers
from pglcl.layouts.label_names import named_values
from pglcl.layouts.plain import not_read, pair


def read(root: Path) -> DataFolder:
    """nnU-Net v2. Regions are trained as exclusive classes, in the order of `regions_class_order`."""
    file = root / "dataset.json"
    content = read_json(file)
    notes: list[str] = []
    try:
        names = content["channel_names"]
        modalities = tuple(str(names[k]) for k in sorted(names, key=int)) if isinstance(names, dict) else tuple(names)
        labels = _labels(content, file, notes)
        ending = content.get("file_ending", "")
        listed = content.get("dataset")
        if listed:
            entries = {n: (tuple(root / i for i in e["images"]), root / e["label"]) for n, e in listed.items()}
            cases = [Case(name, name, images, label) for name, (images, label) in entries.items()]
            refuse_confusions(file, cases)
        else:
            cases = pair(root / "imagesTr", root / "labelsTr", len(modalities))
    except (TypeError, KeyError, AttributeError, ValueError, OSError) as error:
        raise UserError(f"{file}: not an nnU-Net description: {wrong_content(error)}") from error
    if is_there(root / "imagesUn", folder=True):
        require_numbers(inputs_in(root / "imagesUn"), len(modalities))
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
    notes += not_read(*(root / name for name in ("imagesTr", "labelsTr", "imagesUn")))
    notes += not_listed(file, cases) if listed else []
    notes += other_count(file, content, sum(case.label is not None for case in cases))
    return DataFolder(root, "nnunet", cases, labels, modalities=modalities, notes=notes)


def _channels_inside(case: Case) -> int:
    """The number of channels in a case's files; 0 if one cannot be read, which is reported when all files are read.

    nnU-Net keeps a colour picture in one file, `name_0000.png`, but counts each colour as a channel.
    """
    try:
        return sum(read_source(path).channels for path in case.images)
    except UserError:
        return 0


def _labels(content: Mapping[str, Any], file: Path, notes: list[str]) -> LabelMap | None:
    labels = dict(content["labels"])
    regions = {name: value for name, value in labels.items() if isinstance(value, list)}
    if not regions:
        return named_values(labels, file)
    order = content.get("regions_class_order")
    foreground = [name for name in labels if name not in ("background", "ignore")]
    if not isinstance(order, list) or len(order) != len(foreground):
        raise UserError(
            f"{file}: labels that are lists (regions) need regions_class_order, a value for each of "
            f"{', '.join(foreground)}; got {order!r}"
        )
    parts = {value for name in foreground for value in (regions[name] if name in regions else [labels[name]])}
    if parts - set(order) - {0}:
        raise UserError(f"{file}: regions_class_order must have all values of regions, {sorted(parts)}, got {order}")
    notes.append(
        "regions are trained as exclusive classes: "
        + ", ".join(f"value {value} is {name} alone" for name, value in zip(foreground, order))
    )
    named = {"background": 0, **{f"{name} alone": value for name, value in zip(foreground, order)}}
    return named_values({**named, **{name: labels[name] for name in ("ignore",) if name in labels}}, file)
