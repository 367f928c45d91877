"""HDF5 as SSL4MIS keeps it, with h5py: `image` and `label` in one file, slices along the first of three axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pglcl.errors import UserError
from pglcl.formats.source import Source, check_shape, library, reading
from pglcl.memory import check_claim


def read_source(path: Path, *, label: bool = False) -> Source:
    """The source, without reading voxels."""
    return _read(path, label=label, voxels=False)[0]


def read(path: Path, *, label: bool = False) -> tuple[Source, np.ndarray]:
    """The source, and voxels (rows, columns, slices, 1) of the key `image` or `label`."""
    return _read(path, label=label, voxels=True)


def has_label(path: Path) -> bool:
    """Whether a file has the key `label`."""
    with reading(path, "not readable as HDF5"), library("h5py", "h5py", path).File(path, "r") as file:
        return "label" in file


def _read(path: Path, *, label: bool, voxels: bool) -> tuple[Source, np.ndarray]:
    key = "label" if label else "image"
    h5py = library("h5py", "h5py", path)
    if not path.is_file():
        raise UserError(f"{path}: not found")
    with reading(path, "not readable as HDF5"), h5py.File(path, "r") as file:
        if not isinstance(file.get(key), h5py.Dataset):
            raise UserError(f"{path}: must have an array {key!r}, got {', '.join(file) or 'nothing'}")
        data = file[key]
        check_shape(data.shape, path)
        if data.ndim not in (2, 3):
            raise UserError(f"{path}: {key} must be (rows, columns) or (slices, rows, columns), got {data.shape}")
        if data.dtype.kind not in "iufb":
            raise UserError(f"{path}: {key} must have real numbers, got {data.dtype}")
        check_claim(path, int(np.prod(data.shape, dtype=object)) * data.dtype.itemsize)
        rows, columns = data.shape[-2:]
        slices = data.shape[0] if data.ndim == 3 else 1
        source = Source(path, "hdf5", (rows, columns, slices), data.ndim, 1, data.dtype, np.eye(4), "voxel")
        if not voxels:
            return source, np.empty(0)
        array = data[()]
    array = array if array.ndim == 3 else array[None]
    return source, np.moveaxis(array, 0, -1)[..., None]
