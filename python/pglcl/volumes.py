"""One volume: reading, checking, canonical axes, and the way back to a NIfTI file of the source's geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from torch import Tensor

from pglcl.errors import UserError
from pglcl.files import replacing

CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass
class Volume:
    """A volume in canonical (closest to R, A, S) axes.

    data: (C, X, Y, Z) float32. spacing: mm along these axes. source: the header and affine to write results with.
    """

    data: np.ndarray
    spacing: tuple[float, ...]
    source: nib.Nifti1Image
    path: Path


def open_image(path: Path) -> nib.Nifti1Image:
    """The header; voxels are read when they are asked for."""
    try:
        image = nib.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (ImageFileError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not readable as NIfTI: {error}") from error
    if not isinstance(image, (nib.Nifti1Image, nib.Nifti1Pair)):
        raise UserError(f"{path}: must be NIfTI, got {type(image).__name__}")
    if len(image.shape) not in (3, 4):
        raise UserError(f"{path}: must have three axes, or a fourth for channels, got shape {image.shape}")
    if 0 in image.shape:
        raise UserError(f"{path}: has no voxels, shape {image.shape}")
    return image


def _voxels(image: nib.Nifti1Image, path: Path, dtype: type) -> np.ndarray:
    try:
        data = np.asarray(image.dataobj, dtype=dtype)
    except Exception as error:  # a truncated file fails in gzip, in mmap or in numpy
        raise UserError(
            f"{path}: truncated or damaged: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    return data[..., None] if data.ndim == 3 else data


def orientation_of(image: nib.Nifti1Image, path: Path) -> np.ndarray:
    try:
        orientation = io_orientation(image.affine)
    except Exception as error:
        raise UserError(f"{path}: the affine is not usable: {error}") from error
    if np.isnan(orientation).any():
        raise UserError(f"{path}: the affine is singular")
    return orientation


def read_volume(paths: Sequence[Path]) -> Volume:
    """The channels, one file each or along the fourth axis of one."""
    first = open_image(paths[0])
    channels = []
    for path in paths:
        image = open_image(path)
        if image.shape[:3] != first.shape[:3]:
            raise UserError(f"{path}: must have the shape of {paths[0].name}, {first.shape[:3]}, got {image.shape[:3]}")
        data = _voxels(image, path, np.float32)
        if not np.isfinite(data).all():
            raise UserError(f"{path}: has {int((~np.isfinite(data)).sum())} voxels that are NaN or infinite")
        transform = ornt_transform(orientation_of(image, path), CANONICAL)
        channels.append(np.moveaxis(apply_orientation(data, transform), -1, 0))
    zooms = np.sqrt((first.affine[:3, :3] ** 2).sum(axis=0))
    order = np.argsort(orientation_of(first, paths[0])[:, 0])
    spacing = tuple(float(z) for z in zooms[order])
    return Volume(np.ascontiguousarray(np.concatenate(channels)), spacing, first, paths[0])


def read_label(path: Path, image_path: Path, num_classes: int | None = None) -> np.ndarray:
    """(X, Y, Z) int64 in canonical axes, checked against its image."""
    label, image = open_image(path), open_image(image_path)
    if label.shape[:3] != image.shape[:3]:
        raise UserError(f"{path}: must have the shape of its image, {image.shape[:3]}, got {label.shape[:3]}")
    if not np.allclose(label.affine, image.affine, atol=1e-3):
        raise UserError(f"{path}: must have the affine of its image {image_path.name}")
    data = _voxels(label, path, np.float64)
    if data.shape[-1] != 1:
        raise UserError(f"{path}: a label must have three axes, got shape {label.shape}")
    if not np.isfinite(data).all() or (data != np.round(data)).any() or data.min() < 0:
        raise UserError(f"{path}: labels must be whole numbers from 0, got {_some_values(data)}")
    if num_classes is not None and data.max() >= num_classes:
        raise UserError(f"{path}: labels must lie in 0..{num_classes - 1}, got {_some_values(data)}")
    transform = ornt_transform(orientation_of(label, path), CANONICAL)
    return np.ascontiguousarray(apply_orientation(data[..., 0], transform)).astype(np.int64)


def _some_values(data: np.ndarray) -> str:
    values = np.unique(data)
    return ", ".join(f"{v:g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")


def to_source_axes(data: np.ndarray, source: nib.Nifti1Image) -> np.ndarray:
    """(X, Y, Z, ...) from canonical axes back to those of the file."""
    return apply_orientation(data, ornt_transform(CANONICAL, io_orientation(source.affine)))


def write_like(data: np.ndarray, source: nib.Nifti1Image, path: Path) -> None:
    """(X, Y, Z) or (X, Y, Z, C) in canonical axes as NIfTI with the source's affine and header geometry."""
    data = np.ascontiguousarray(to_source_axes(data, source))
    image = nib.Nifti1Image(data, source.affine)
    header, old = image.header, source.header
    if isinstance(old, nib.Nifti1Header):
        header.set_qform(old.get_qform(), int(old["qform_code"]))
        header.set_sform(old.get_sform() if old["sform_code"] > 0 else source.affine, int(old["sform_code"]))
        zooms = [*old.get_zooms()[:3], *[1.0] * (data.ndim - 3)]
        header.set_zooms(zooms)
        header.set_xyzt_units(*old.get_xyzt_units())
    with replacing(path) as partial:
        nib.save(image, partial)


@dataclass(frozen=True)
class Geometry:
    """How a volume was resampled, so that the result can be brought back.

    shape: (X, Y, Z) of the volume. resized: what it was interpolated to. The network sees `resized` padded at the end
    of each axis; a slice axis is never resized.
    """

    shape: tuple[int, ...]
    resized: tuple[int, ...]

    def restore(self, x: Tensor) -> Tensor:
        """(C, X', Y', Z') of the network's size to (C, X, Y, Z)."""
        x = x[(slice(None), *(slice(0, n) for n in self.resized))]
        if self.shape == self.resized:
            return x
        return F.interpolate(x[None], self.shape, mode="trilinear", align_corners=False)[0]


def _positions(extent: int, now: int) -> Tensor:
    """Where the voxels of an axis resized from `extent` to `now` come from, nearest."""
    return ((torch.arange(now) + 0.5) * extent / now).floor().long().clamp(max=extent - 1)


def resized_shape(
    shape: Sequence[int],
    spacing: Sequence[float],
    *,
    slice_axis: int | None,
    size: Sequence[int],
    target: Sequence[float] | None,
) -> tuple[int, ...]:
    """2-D: slices are scaled, aspect kept, to fit `size`; 3-D: resampled to the target spacing, if there is one."""
    if slice_axis is not None:
        inside = [n for axis, n in enumerate(shape) if axis != slice_axis]
        scale = min(s / n for s, n in zip(size, inside))
        return tuple(n if axis == slice_axis else max(1, round(n * scale)) for axis, n in enumerate(shape))
    if target is None:
        return tuple(shape)
    return tuple(max(1, round(n * now / then)) for n, now, then in zip(shape, spacing, target))


def resize_image(x: Tensor, shape: Sequence[int]) -> Tensor:
    """(C, X, Y, Z), linear; blurred first where it shrinks, so that nothing aliases."""
    if tuple(x.shape[1:]) == tuple(shape):
        return x
    for axis, (now, then) in enumerate(zip(x.shape[1:], shape)):
        if then < now:  # averaging is exact for whole factors and close between them
            x = (
                F.adaptive_avg_pool1d(x.movedim(axis + 1, -1).flatten(0, -2)[None], then)[0]
                .unflatten(0, [n for d, n in enumerate(x.shape) if d != axis + 1])
                .movedim(-1, axis + 1)
            )
    if tuple(x.shape[1:]) == tuple(shape):
        return x
    return F.interpolate(x[None], tuple(shape), mode="trilinear", align_corners=False)[0]


def resize_label(y: Tensor, shape: Sequence[int]) -> Tensor:
    """(X, Y, Z), nearest."""
    for axis, then in enumerate(shape):
        if y.shape[axis] != then:
            y = y.index_select(axis, _positions(y.shape[axis], then))
    return y
