"""What images and labels are kept in: one module each kind of file, chosen by the suffix.

:func:`read` gives voxels in the axes of the file and a :class:`Source`; :func:`write` puts a result of that geometry
into a file whose suffix :func:`result_suffix` tells: the format of the input, where it can hold the result.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from pglcl.errors import UserError
from pglcl.files import require_file
from pglcl.formats import hdf5, itk, nifti, picture
from pglcl.formats.names import READERS, known_suffixes, suffix_of
from pglcl.formats.source import Source, first_line

__all__ = ["Source", "read", "read_source", "result_suffix", "write"]


def read(path: Path, *, label: bool = False) -> tuple[Source, np.ndarray]:
    """Voxels (X, Y, Z, C) in the dtype and axes of the file; label: as a label is read (JPEG refused, palettes kept).

    Raises:
        UserError: whatever is wrong with the file, in one line that names it.
    """
    match _reader(path):
        case "nifti":
            return nifti.read(path)
        case "itk":
            return itk.read(path)
        case "picture":
            return picture.read(path, label=label)
        case _:
            return hdf5.read(path, label=label)


def read_source(path: Path, *, label: bool = False) -> Source:
    """What the header says; voxels are not read."""
    match _reader(path):
        case "nifti":
            return nifti.read_source(path)
        case "itk":
            return itk.read_source(path)
        case "picture":
            return picture.read_source(path, label=label)
        case _:
            return hdf5.read_source(path, label=label)


def _reader(path: Path) -> str:
    if path.is_dir():
        return "itk"  # a folder of DICOM slices
    suffix = suffix_of(path)
    if not suffix:
        raise UserError(f"{path}: must be a folder of DICOM slices, or end in {known_suffixes()}")
    with contextlib.suppress(OSError):  # which its reader explains, where the file is there to be read
        require_file(path)
    return READERS[suffix]


def result_suffix(image: Path, dtype: np.dtype) -> str:
    """The suffix of a result of `image`: of a mask (an integer dtype), or of probabilities or entropies (floats).

    NIfTI for NIfTI, DICOM and HDF5; NRRD and MetaImage (.mha) for themselves; masks of pictures as PNG, BMP or TIFF
    like the picture (PNG for JPEG, and where BMP's 8 bits do not do), their floats as TIFF, and masks of values that 16
    bits without a sign do not hold.
    """
    suffix, reader = suffix_of(image), "itk" if image.is_dir() else _reader(image)
    if reader == "itk" and not image.is_dir():
        return ".mha" if suffix == ".mhd" else suffix
    if reader != "picture":
        return ".nii.gz"
    if np.dtype(dtype) not in (np.uint8, np.uint16) or suffix in (".tif", ".tiff"):
        return ".tif"
    return ".bmp" if suffix == ".bmp" and dtype == np.uint8 else ".png"


def write(data: np.ndarray, source: Source, path: Path) -> None:
    """Writes (X, Y, Z) or (X, Y, Z, C), in the axes of the source, in the format of the path's suffix."""
    writers = {"nifti": nifti.write, "itk": itk.write, "picture": picture.write}
    reader = _reader(path)
    if reader not in writers:
        raise UserError(f"{path}: results are not written as HDF5")
    try:
        writers[reader](data, source, path)
    except (OSError, UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be written: {first_line(error)}") from error
