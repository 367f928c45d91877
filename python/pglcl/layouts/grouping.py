"""The rule by which files become cases, in data folders and for `predict`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from pglcl.errors import UserError
from pglcl.formats.names import is_hidden, known_suffixes, stem, suffix_of

NUMBERED = re.compile(r"(.+)_([0-9]{4})", re.DOTALL)


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
    by_name = unique_names(files)
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


def unique_names(files: list[Path]) -> dict[str, Path]:
    by_name: dict[str, Path] = {}
    problems = []
    for path in files:
        name = stem(path)
        if name not in by_name:
            by_name[name] = path
        elif path.absolute() == by_name[name].absolute():
            problems.append(f"{path}: is given twice")
        else:
            problems.append(f"{path}: has the same name as {by_name[name]}; each case needs its own name")
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
            f"label {single[0]}: it is not clear whether it belongs to an image of this name, or to the case "
            f"{single[0][:-5]} with channels 0000 to {more:04d}. The label of a case with channels must have no "
            f"number: {single[0][:-5]}"
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


def require_numbers(files: Iterable[Path], channels: int) -> None:
    """Checks nnU-Net's names: each ends in the number of one of the channels that dataset.json names."""
    problems = []
    for path in files:
        match = NUMBERED.fullmatch(stem(path))
        if not match or int(match[2]) >= channels:
            problems.append(f"{path}: must end in _0000 to _{channels - 1:04d}, the channels that dataset.json names")
    if problems:
        raise UserError(*problems)
