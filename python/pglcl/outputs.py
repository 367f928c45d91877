"""Checks the files that a command will write before it computes anything, so that no existing file is lost."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pglcl.errors import UserError
from pglcl.files import check_writable

NAMED = 5  # files that a message names; more of the same kind are counted


def check_outputs(
    outputs: Sequence[Path],
    *,
    inputs: Iterable[Path] = (),
    overwrite: bool = False,
    renewed: Callable[[Path], bool] = lambda path: False,
) -> None:
    """Refuses to write over a file that is read, over another output, or over a file that exists.

    Files are compared by device and inode, not by path: symbolic and hard links, ``..`` and file systems that ignore
    case may lead to the same file.

    Args:
        outputs: the files that will be written.
        inputs: files that the command reads. They are never written over, not even with `overwrite`.
        overwrite: whether files that exist may be replaced.
        renewed: tells whether an existing file comes from an earlier call, so that it may be replaced anyway.

    Raises:
        UserError: a line for each file that stands in the way, or for a folder that cannot be written to.
    """
    for folder in dict.fromkeys(path.parent for path in outputs):
        _no_file_above(folder)
    read = {identity for path in inputs if (identity := _identity(path)) is not None}
    problems = [*_written_twice(outputs)]
    existing = []
    for path in outputs:
        if not _exists(path):
            continue
        if path.is_dir() and not path.is_symlink():
            problems.append(f"{path}: must be a file, is a folder")
        elif _identity(path) in read:
            problems.append(f"{path}: would be replaced, but this command reads it; choose another --output")
        elif not overwrite and (path.is_symlink() or not renewed(path)):
            existing.append(path)
    problems += [f"{path}: exists; add --overwrite to replace it, or choose another --output" for path in existing]
    if problems:
        rest = len(problems) - NAMED
        raise UserError(*problems[:NAMED], *([f"and {rest} more files"] if rest > 0 else []))
    for folder in dict.fromkeys(path.parent for path in outputs):
        check_writable(folder)


def check_outside_data(folder: Path, root: Path) -> None:
    """Refuses an output folder whose files would be read as images or labels of the data folder `root`."""
    from pglcl.layouts import open_folder

    inner, outer = _resolved(folder), _resolved(root)
    is_list = root.is_file()
    if not (is_list or inner.is_relative_to(outer)):
        return
    try:
        data = open_folder(root)
    except UserError:
        return  # not a data folder, so nothing there is read as an image
    if is_list:  # it names its files, so others beside them are not read; yet their names may be those of masks
        if any(_resolved(case.label).parent == inner for case in data.cases if case.label):
            raise UserError(f"{folder}: holds the labels that {root} lists; choose another --output")
        return
    first = inner.relative_to(outer).parts[:1]
    files = [path for case in data.cases for path in (*case.images, case.label) if path is not None]
    used = {_resolved(path).relative_to(outer).parts[0] for path in files if _resolved(path).is_relative_to(outer)}
    beside = not first or any(_resolved(path).parent == outer for path in files)
    if data.layout == "acdc" or beside or first[0] in used or first[0].startswith(("images", "labels")):
        raise UserError(
            f"{folder}: lies in the data folder {root}, where its files would be read as images or labels; "
            "choose another --output"
        )


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _exists(path: Path) -> bool:
    """Whether a path is taken, even by a link to nothing."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # the name is too long, or the folder cannot be searched
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return True


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file that a path leads to; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _no_file_above(folder: Path) -> None:
    for above in (folder, *folder.parents):
        if _exists(above):
            if not above.is_dir():
                raise UserError(f"{above}: must be a folder, but is a file")
            return


def _written_twice(outputs: Sequence[Path]) -> list[str]:
    """A line for each output that would be written twice.

    Names that differ only in case, or in the encoding of an accent, are one file on many file systems.
    """
    seen: dict[str, Path] = {}
    problems = []
    for path in outputs:
        key = unicodedata.normalize("NFC", str(_resolved(path.parent) / path.name)).casefold()
        if key in seen:
            other = seen[key]
            problems.append(f"{path}: would be written twice" + ("" if other == path else f", as {other.name} too"))
        seen[key] = path
    return problems
