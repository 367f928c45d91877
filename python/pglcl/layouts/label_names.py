"""The classes that a description declares by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pglcl.errors import UserError
from pglcl.labels import LabelMap


def named_values(labels: Mapping[str, Any], file: Path) -> LabelMap | None:
    """The map of `labels`, which give a value for each name; None without any. Voxels called ignore are left out."""
    values: dict[int, str] = {}
    for name, value in labels.items():
        if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
            raise UserError(f"{file}: labels must be whole numbers from 0, got {value!r} for {name!r}")
        if int(value) in values:
            raise UserError(f"{file}: labels {values[int(value)]!r} and {name!r} have the same value, {value}")
        if name.lower() == "background" and int(value):
            raise UserError(
                f"{file}: the background must have the value 0, got {value}; change it, or remove labels from the file "
                "and give them with --labels, background first"
            )
        if name.lower() == "ignore" and not int(value):  # else the next class would count as the background
            raise UserError(
                f"{file}: the value 0 is the background and cannot be ignored; change it, or remove labels from the "
                "file and give them with --labels"
            )
        values[int(value)] = name
    ignored = [value for value, name in values.items() if name.lower() == "ignore"]
    return LabelMap.of_values(set(values) - set(ignored), values, ignored) if labels else None
