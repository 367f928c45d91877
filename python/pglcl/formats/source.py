"""The description of a file's voxels, which readers return and writers need; checks and errors of all readers."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes

from pglcl.errors import UserError, first_line


@dataclass(frozen=True)
class Source:
    """The description of the voxels of a file, which is also needed to write a result in its geometry.

    reader: nifti, itk, dicom, picture or hdf5. shape: (X, Y, Z) in the axes of the file; a picture is (rows, columns,
    1). axes: of the file, 2 or 3. dtype: of the file. affine: (4, 4), from voxels to R, A, S in units of `scale` mm.
    unit: of distances: mm, or pixel or voxel if the format has none. native: data that the reader keeps for its writer.
    """

    path: Path
    reader: str
    shape: tuple[int, int, int]
    axes: int
    channels: int
    dtype: np.dtype
    affine: np.ndarray
    unit: str = "mm"
    scale: float = 1.0
    native: Any = None

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm (or pixels) along the axes of the file."""
        return tuple(float(s) * self.scale for s in voxel_sizes(self.affine))


def check_affine(affine: np.ndarray, path: Path) -> np.ndarray:
    """`affine` itself; raises UserError if it is singular or not finite."""
    if not np.isfinite(affine).all():
        raise UserError(f"{path}: the affine is not usable: it has entries that are NaN or infinite")
    lengths = voxel_sizes(affine)
    # The determinant of axes of length 1 is 0 if they lie in a plane.
    if not (lengths > 0).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
        raise UserError(f"{path}: the affine is singular: a voxel has no volume")
    return affine


def check_shape(shape: tuple[int, ...], path: Path) -> None:
    """Raises UserError for a file without voxels."""
    if any(n < 1 for n in shape):
        raise UserError(f"{path}: has no voxels, shape {tuple(int(n) for n in shape)}")


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns any error that a library raises for a bad file into a UserError: one line with the file and `what`."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory") from None
    except Exception as error:
        raise UserError(f"{path}: {what}: {first_line(error)}") from error


def library(module: str, package: str, path: Path) -> ModuleType:
    """Imports the module that reads a format. If it is missing, UserError names the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'{path}: is read with {package}, which is missing; pip install ".[formats]"') from None
