"""What every reader returns: where voxels came from, and how results go back beside them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pglcl.errors import UserError


@dataclass(frozen=True)
class Source:
    """What a file says of its voxels, and what is needed to write a result of its geometry.

    reader: nifti, itk, dicom, picture or hdf5. shape: (X, Y, Z) in the axes of the file; a picture is (rows, columns,
    1). axes: how many the file has, 2 or 3. dtype: of the file. affine: (4, 4), voxels to R, A, S in units of `scale`
    mm. unit: of distances, mm, or pixel (voxel) where the format knows none. native: what the reader keeps for its
    writer.
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
        return tuple(float(s) * self.scale for s in np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)))


def check_affine(affine: np.ndarray, path: Path) -> np.ndarray:
    if not np.isfinite(affine).all():
        raise UserError(f"{path}: the affine is not usable: it has entries that are NaN or infinite")
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    # The volume of the unit cell, were its axes of length 1: 0 where they lie in a plane.
    if not (lengths > 0).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
        raise UserError(f"{path}: the affine is singular")
    return affine


def check_shape(shape: tuple[int, ...], path: Path) -> None:
    if any(n < 1 for n in shape):
        raise UserError(f"{path}: has no voxels, shape {tuple(int(n) for n in shape)}")


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever a library raises for a bad file becomes one line that names the file."""
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


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "SimpleITK" in lines[0]:  # says first where in its sources it was raised
        return lines[-1].removeprefix("ITK ERROR: ")
    return lines[0] if lines else repr(error)


def library(module: str, package: str, path: Path) -> ModuleType:
    """Imports what reads a format, or names the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'{path}: is read with {package}, which is missing; pip install ".[formats]"') from None
