"""A list of files, as CSV or JSON."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pglcl.errors import UserError
from pglcl.files import read_json
from pglcl.formats.names import is_hidden, stem
from pglcl.layouts.data_folder import Case, DataFolder, refuse_confusions
from pglcl.layouts.grouping import NUMBERED
from pglcl.layouts.label_names import named_values


def read(file: Path) -> DataFolder:
    """Reads a CSV or JSON list. The columns are image and, optionally, label, patient and name.

    Further channels of an image are in columns whose names begin with channel.
    """
    content: Any = _csv_rows(file) if file.suffix.lower() == ".csv" else read_json(file)
    labels = None
    if isinstance(content, dict) and isinstance(content.get("cases"), list):
        if set(content) - {"cases", "labels"} or not isinstance(content.get("labels", {}), dict):
            raise UserError(
                f"{file}: must have the list cases, and may have the object labels (name: value); got "
                f"{', '.join(content)}"
            )
        labels = named_values(content.get("labels", {}), file)
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
    refuse_confusions(file, cases)
    return DataFolder(file, "list", cases, labels, columns=("image", *columns))


def _channel_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of further channels that an entry fills, in the order in which it has them."""
    return [str(key) for key in row if str(key).startswith("channel") and row[key]]


def _without_patient(file: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Lines for entries without a patient beside others with one.

    Each would become a patient of its own. Spreadsheets leave the cells below a merged one empty: so the volumes of a
    patient could come into training and test.
    """
    without = [number for number, row in enumerate(rows, start=1) if not row.get("patient")]
    if not without or len(without) == len(rows):
        return []
    numbers = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
    return [f"{file}: the entries {numbers} have no patient, while others have one; give all of them one, or none"]


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
        raise UserError("must have an image; paths and names must be text")
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
        raise UserError(f"the name {name!r} must be usable as a file name: without a / and without a dot at its start")
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
