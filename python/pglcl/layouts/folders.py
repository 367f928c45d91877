"""The content of a folder. Something that cannot be read is refused, since it would seem not to be there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pglcl.errors import UserError
from pglcl.formats.names import is_input_file, list_folder, not_a


def is_there(path: Path, *, folder: bool = False) -> bool:
    """Whether a file or folder is there.

    Raises:
        UserError: something else has the name, such as a link to nothing. If it were silently left out, the folder
            would seem to hold other data.
    """
    if not os.path.lexists(path):
        return False
    if not (path.is_dir() if folder else path.is_file()):
        raise not_a("folder" if folder else "file", path)
    return True


def children(root: Path, name: str = "") -> list[Path]:
    folder = root / name
    return list_folder(folder) if folder.is_dir() else []


def files_below(root: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Every file of a known suffix, at any depth. Hidden folders and links to a folder `above` are left out."""
    here = root.resolve()
    if here in above:
        return []
    found = list_folder(root)
    files = [path for path in found if is_input_file(path)]
    for path in found:
        if path.is_symlink() and not path.exists():  # for example to a patient's folder that was moved
            raise UserError(f"{path}: is a link to {os.readlink(path)}, where nothing is")
    below = [path for folder in found if folder.is_dir() for path in files_below(folder, (*above, here))]
    return files + below


def holds_images(folder: Path) -> bool:
    """Whether images lie at any depth of a folder; False if a folder there cannot be read."""
    try:
        return bool(files_below(folder))
    except UserError:
        return False


def refuse_lonely(labels: Iterable[Path], images: Path) -> None:
    problems = [f"{path}: is a label without an image in {images}" for path in labels]
    if problems:
        raise UserError(*problems)
