"""Reads and checks volumes, turns them to canonical axes, and writes results in the geometry of their source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from pglcl import formats
from pglcl.errors import UserError
from pglcl.formats import Source
from pglcl.labels import LabelMap, whole_numbers
from pglcl.memory import require_memory

CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])
LEVELS = 1024  # numbers that float32 must have between the smallest and the largest value of a channel
CORNERS_APART = 0.1  # voxels: how far the corners of a label, or of a channel, may lie from those of the image


@dataclass
class Volume:
    """A volume in canonical (closest to R, A, S) axes; a picture or an HDF5 array stays in its own.

    data: (C, X, Y, Z) float32. spacing: mm along these axes (pixels where `source.unit` says so). source: of the first
    channel, for :func:`write_like`.
    """

    data: np.ndarray
    spacing: tuple[float, ...]
    source: Source
    path: Path


def read_volume(paths: Sequence[Path]) -> Volume:
    """Reads the channels of a volume: a file for each, or all along the fourth axis of one file.

    Raises:
        UserError: unreadable or damaged files, voxels that are NaN or infinite, values that float32 cannot tell apart,
            channels of different geometry.
    """
    sources = [formats.read_source(path) for path in paths]
    first = sources[0]
    for source in sources[1:]:
        check_same_grid(source, first, "the first channel,")
    shape = canonical_shape(first)
    channels = sum(source.channels for source in sources)
    voxels = channels * int(np.prod(shape, dtype=object))
    require_memory(4 * voxels, f"{first.path}: as float32, shape {(channels, *shape)},")
    data = np.empty(0, np.float32)
    filled = 0
    for path, checked in zip(paths, sources):
        source, stored = _read_as_checked(path, checked)
        if not filled:  # allocated only now, since the first file was found to hold what its header claims
            data = np.empty((channels, *shape), np.float32)
        with np.errstate(over="ignore"):  # values that overflow become infinite, and are refused below
            for channel in np.moveaxis(to_canonical_axes(stored, source), -1, 0):
                data[filled] = channel
                if why := _lost(channel, data[filled]):
                    raise UserError(f"{path}: {why}")
                filled += 1
    return Volume(data, canonical_spacing(first), first, paths[0])


def _lost(stored: np.ndarray, single: np.ndarray) -> str:
    """The reason why a channel cannot be used in single precision; empty if it can.

    Args:
        stored: as the file has it, which may be of 64 bits.
        single: the same in float32.
    """
    bad = ~np.isfinite(single)
    if bad.any():
        beyond = int((bad & np.isfinite(stored)).sum())
        if beyond:
            return f"has {beyond} voxels beyond the range of float32, {np.finfo(np.float32).max:.2g}"
        return f"has {int(bad.sum())} voxels that are NaN or infinite"
    if stored.dtype.itemsize < 4 or stored.dtype == np.float32:
        return ""
    low, high = float(single.min()), float(single.max())
    step = float(np.spacing(np.float32(max(-low, high))))
    if high - low >= LEVELS * step or np.array_equal(single.astype(stored.dtype), stored):
        return ""
    least, most = stored.min(), stored.max()
    if least == most:
        return ""  # a constant image, which others name
    return (
        f"has values from {least:.12g} to {most:.12g}, between which float32 has steps of {step:.2g}: "
        "store it with another offset or factor"
    )


def read_label_values(path: Path, image: Path) -> np.ndarray:
    """The whole numbers of a label file (X, Y, Z) in canonical axes, in an integer type; checked against its image."""
    label, of_image = formats.read_source(path, label=True), formats.read_source(image)
    check_same_grid(label, of_image, "its image")
    source, stored = _read_as_checked(path, label, label=True)
    if source.channels != 1:
        raise UserError(f"{path}: a label must have one channel, got {source.channels}")
    return whole_numbers(np.ascontiguousarray(to_canonical_axes(stored[..., 0], source)), path)


def _read_as_checked(path: Path, checked: Source, *, label: bool = False) -> tuple[Source, np.ndarray]:
    """The source and voxels of a file. Raises UserError if its header is no longer that of `checked`."""
    source, stored = formats.read(path, label=label)
    same = (source.shape, source.channels) == (checked.shape, checked.channels)
    if not same or not np.array_equal(source.affine, checked.affine):
        raise UserError(f"{path}: was changed while it was read")
    return source, stored


def read_label(path: Path, image: Path, labels: LabelMap) -> np.ndarray:
    """The classes of a label file (X, Y, Z) in canonical axes, int8 or int16; -1 where it is to be ignored."""
    return labels.encode(read_label_values(path, image), path)


def check_same_grid(source: Source, first: Source, role: str) -> None:
    """Checks that two files have the same voxels at the same places, in canonical axes; their own axes may differ.

    Args:
        source: of the file to check.
        first: of the file that it must fit.
        role: what `first` is to `source`, for messages.

    Raises:
        UserError: shapes, units or affines differ.
    """
    must, name = f"{source.path}: must have", first.path.name
    if sorted(source.shape) != sorted(first.shape):
        raise UserError(f"{must} the shape of {role} {name}, {first.shape}, got {source.shape}")
    if (source.unit == "mm") != (first.unit == "mm"):
        raise UserError(f"{must} a geometry like {role} {name}: only one of both files says where its voxels lie")
    shape = canonical_shape(first)
    if canonical_shape(source) != shape:
        what = "shape" if source.shape != first.shape else "affine"
        raise UserError(f"{must} the {what} of {role} {name}: along R, A, S {shape}, got {canonical_shape(source)}")
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape))], np.float64)
    apart = (_canonical_affine(source) - _canonical_affine(first)) @ corners.T
    distance = float(np.sqrt((apart**2).sum(axis=0)).max())
    if distance > CORNERS_APART * min(first.spacing):
        raise UserError(f"{must} the affine of {role} {name}: corners lie up to {distance:.3g} {first.unit} apart")


def orientation_of(source: Source) -> np.ndarray:
    """nibabel's orientation of the axes of a file."""
    orientation: np.ndarray = io_orientation(source.affine)
    if np.isnan(orientation).any():
        raise UserError(f"{source.path}: the affine is singular")
    return orientation


def to_canonical_axes(data: np.ndarray, source: Source) -> np.ndarray:
    """Turns (X, Y, Z, ...) from the axes of the file to canonical ones; a view."""
    return np.asanyarray(_as_canonical(data, source).dataobj)


def to_source_axes(data: np.ndarray, source: Source) -> np.ndarray:
    """Turns (X, Y, Z, ...) from canonical axes back to those of the file; a view."""
    turned: np.ndarray = apply_orientation(data, ornt_transform(CANONICAL, orientation_of(source)))
    return turned


def _canonical_affine(source: Source) -> np.ndarray:
    """(3, 4), voxels in canonical axes to mm."""
    voxels = np.broadcast_to(np.uint8(0), source.shape)
    affine: np.ndarray = _as_canonical(voxels, source).affine[:3] * source.scale
    return affine


def _as_canonical(data: np.ndarray, source: Source) -> SpatialImage:
    orientation_of(source)  # refuses a singular affine by the file's name
    image: SpatialImage = nib.as_closest_canonical(SpatialImage(data, source.affine))
    return image


def _file_axes(source: Source) -> np.ndarray:
    """For each canonical axis, the axis of the file."""
    return np.argsort(orientation_of(source)[:, 0])


def canonical_shape(source: Source) -> tuple[int, ...]:
    """(X, Y, Z) of a file in canonical axes."""
    return tuple(source.shape[axis] for axis in _file_axes(source))


def canonical_spacing(source: Source) -> tuple[float, ...]:
    """mm (or pixels) along the canonical axes."""
    return tuple(source.spacing[axis] for axis in _file_axes(source))


def write_like(data: np.ndarray, source: Source, path: Path) -> None:
    """Writes data in the axes and geometry of a source.

    An interruption may leave a part of the file: `path` should be a temporary name (:func:`pglcl.files.replacing`).

    Args:
        data: (X, Y, Z) or (X, Y, Z, C) in canonical axes, a mask in an integer type, or float32.
        source: of the image that the data belong to.
        path: its suffix gives the format; :func:`pglcl.formats.result_suffix` tells the one that fits the image.
    """
    formats.write(to_source_axes(data, source), source, path)  # a view: writers copy what they must


@dataclass(frozen=True)
class Geometry:
    """The shapes of a volume before and after it was resampled, so that results can be restored to its resolution.

    shape: (X, Y, Z) of the volume. resized: what it was interpolated to. The network sees `resized` padded at the end
    of each axis; a slice axis is never resized.
    """

    shape: tuple[int, ...]
    resized: tuple[int, ...]

    def restore(self, x: Tensor) -> Tensor:
        """Restores (C, X', Y', Z') of the network's size to (C, X, Y, Z)."""
        x = x[(slice(None), *(slice(0, n) for n in self.resized))]
        if self.shape == self.resized:
            return x
        return F.interpolate(x[None], self.shape, mode="trilinear", align_corners=False)[0]


def _positions(extent: int, now: int) -> Tensor:
    """(now,): the nearest voxel of an axis of `extent` voxels for each voxel after it is resized to `now`."""
    return ((torch.arange(now) + 0.5) * extent / now).floor().long().clamp(max=extent - 1)


def resized_shape(
    shape: Sequence[int],
    spacing: Sequence[float],
    *,
    slice_axis: int | None,
    size: Sequence[int] | None,
    target: Sequence[float] | None,
) -> tuple[int, ...]:
    """The shape (X, Y, Z) after resizing.

    Args:
        shape, spacing: of the volume.
        slice_axis: of slices, which is not resized; None: there are no slices.
        size: slices are scaled to fit it, and keep their aspect; None: they are not.
        target: the spacing that the other axes are resampled to, if there is no `size`; None: the volume's own.
    """
    inside = [axis for axis in range(len(shape)) if axis != slice_axis]
    factors = [1.0] * len(shape)
    if size is not None:
        scale = min(s / shape[axis] for s, axis in zip(size, inside))
        factors = [scale] * len(shape)
    elif target is not None:
        for axis, then in zip(inside, target):
            factors[axis] = spacing[axis] / then
    return tuple(n if a == slice_axis else max(1, round(n * factors[a])) for a, n in enumerate(shape))


def resize_image(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Resizes (C, X, Y, Z) linearly. Axes that shrink are averaged first, which avoids aliasing."""
    if tuple(x.shape[1:]) == tuple(shape):
        return x
    shrunk = (min(x.shape[1], shape[0]), min(x.shape[2], shape[1]), min(x.shape[3], shape[2]))
    if tuple(x.shape[1:]) != shrunk:  # averaging is exact for whole factors and close between them
        x = F.adaptive_avg_pool3d(x[None], shrunk)[0]
    if tuple(x.shape[1:]) == tuple(shape):
        return x
    return F.interpolate(x[None], tuple(shape), mode="trilinear", align_corners=False)[0]


def resize_label(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Resizes (X, Y, Z); each voxel gets the value of the nearest one."""
    for axis, then in enumerate(shape):
        if y.shape[axis] != then:
            y = y.index_select(axis, _positions(y.shape[axis], then))
    return y
