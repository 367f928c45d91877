"""File formats of images and labels: one module for each kind of file, chosen by the suffix.

:func:`read` gives voxels in the axes of the file, and a :class:`Source`. :func:`write` writes a result in the geometry
of a source. :func:`result_suffix` tells the suffix of a result: that of the input, if its format can hold the result.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from pglcl.errors import UserError, first_line
from pglcl.files import require_file
from pglcl.formats import hdf5, itk, nifti, picture
from pglcl.formats.names import READERS, known_suffixes, suffix_of
from pglcl.formats.source import Source

__all__ = ["Source", "read", "read_source", "result_suffix", "write"]


def read(path: Path, *, label: bool = False) -> tuple[Source, np.ndarray]:
    """The source, and voxels (X, Y, Z, C) in the dtype and axes of the file.

    Args:
        path: a file, or a folder of DICOM slices.
        label: read it as a label, for which JPEG is refused and the numbers of a palette are kept.

    Raises:
        UserError: the file is missing, damaged or of a kind that is not read; one line names it and the reason.
    """
    match _reader_of_file(path):
        case "nifti":
            return nifti.read(path)
        case "itk":
            return itk.read(path)
        case "picture":
            return picture.read(path, label=label)
        case _:
            return hdf5.read(path, label=label)


def read_source(path: Path, *, label: bool = False) -> Source:
    """The source of a file, from its header; voxels are not read. Arguments and errors as for :func:`read`."""
    match _reader_of_file(path):
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
    with contextlib.suppress(OSError):  # the reader explains why a file cannot be opened
        require_file(path)
    return READERS[suffix]


def _reader_of_file(path: Path) -> str:
    reader = _reader(path)
    with contextlib.suppress(OSError):
        if not path.is_dir() and path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty (0 bytes)")
    return reader


def result_suffix(image: Path, dtype: np.dtype) -> str:
    """The suffix of a result of `image`: a mask (an integer dtype), or probabilities or entropies (floats).

    NIfTI, DICOM and HDF5 get NIfTI. NRRD and MetaImage (as .mha) keep their format. Masks of pictures are PNG, BMP or
    TIFF like the picture; they are PNG for JPEG, and for BMP if they need 16 bits. Floats of pictures are TIFF, and so
    are masks with values that uint16 does not hold.
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
