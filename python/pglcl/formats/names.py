"""Names of input files: the known suffixes, and names without the suffix. Suffixes are compared without case."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pglcl.errors import UserError

# The reader of each suffix. Of two suffixes that fit a name, the longer must come first.
READERS = {
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".nrrd": "itk",
    ".mha": "itk",
    ".mhd": "itk",
    ".png": "picture",
    ".bmp": "picture",
    ".tif": "picture",
    ".tiff": "picture",
    ".jpg": "picture",
    ".jpeg": "picture",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
}
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
DICOM_MAGIC = (128, b"DICM")  # offset and bytes of the mark in a DICOM file


def suffix_of(path: Path) -> str:
    """The suffix that decides the reader, in lower case; empty for a file that no reader takes."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix) and len(name) > len(suffix)), "")


def stem(path: Path) -> str:
    """The name without that suffix: `scan.v2.NII.GZ` is `scan.v2`."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot: `._*` (macOS), `.partial-*` (left by a kill). Such files are never inputs."""
    return path.name.startswith(".")


def list_folder(folder: Path) -> list[Path]:
    """The files and folders in a folder, sorted by name, without hidden ones."""
    try:
        return sorted(path for path in folder.iterdir() if not is_hidden(path))
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be read: {error.strerror or error}") from error


def is_dicom_folder(folder: Path) -> bool:
    """Whether a folder directly holds the slices of a DICOM series. They often have no suffix."""
    return folder.is_dir() and any(_is_dicom_file(path) for path in list_folder(folder))


def _is_dicom_file(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if path.suffix and not path.suffix[1:].isdigit():  # names such as 1.2.840.113
        return False
    offset, magic = DICOM_MAGIC
    try:
        with path.open("rb") as file:
            return file.read(offset + len(magic))[offset:] == magic
    except OSError:
        return False


def inputs_in(folder: Path) -> list[Path]:
    """The images of a folder, sorted: files of a known suffix, and folders of DICOM slices."""
    found = list_folder(folder)
    return [path for path in found if is_input_file(path) or is_dicom_folder(path)]


def is_input_file(path: Path) -> bool:
    """Whether a path is a file of a known suffix.

    Raises:
        UserError: it has such a suffix but is no file, for example a link whose target was moved or never fetched. If
            it were silently left out, an image would be missing, or a labelled one would count as unlabelled.
    """
    if not suffix_of(path) or path.is_dir():
        return False
    if not path.is_file():
        raise not_a("file", path)
    return True


def not_a(kind: str, path: Path) -> UserError:
    """The error for a path that leads to no file, or no folder, but is there. It may be a link to nothing."""
    what = f"is a link to {os.readlink(path)}, where no {kind} is" if path.is_symlink() else "is something else"
    return UserError(f"{path}: must be a {kind}, {what}")


def known_suffixes(suffixes: Iterable[str] = READERS) -> str:
    return ", ".join(suffixes)
