"""A case as the network sees it: read, normalised, resized, padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    NormalizeIntensity,
    ScaleIntensityRangePercentiles,
)
from torch import Tensor

from pglcl.config import TrainConfig
from pglcl.layouts import Case
from pglcl.volumes import Geometry, Volume, read_label, read_volume, resize_image, resize_label, resized_shape


@dataclass
class Prepared:
    """A volume as the network sees it.

    image: (C, X, Y, Z) float32, normalised, resized, padded to at least the network's size. label: (X, Y, Z) int64, -1
    where padded; or None. The slice axis of 2-D training comes last.
    """

    case: Case
    image: Tensor
    label: Tensor | None
    geometry: Geometry
    volume: Volume


def normalise(image: Tensor) -> Tensor:
    """Clipped to its percentiles 0.5 and 99.5, then mean 0 and deviation 1, channel by channel."""
    steps = Compose([
        ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True, channel_wise=True),
        NormalizeIntensity(channel_wise=True),
    ])  # fmt: skip
    return torch.as_tensor(steps(image)).float()


def prepare(
    case: Case, config: TrainConfig, num_classes: int | None, slice_axis: int | None, *, label: bool
) -> Prepared:
    """Reads a case; its label file only if asked to."""
    set_track_meta(False)
    volume = read_volume(case.images)
    image = normalise(torch.from_numpy(volume.data))
    shape = resized_shape(
        image.shape[1:], volume.spacing, slice_axis=slice_axis, size=config.size, target=config.target_spacing
    )
    geometry = Geometry(tuple(image.shape[1:]), shape)
    image = resize_image(image, shape)
    target = None
    if label and case.label is not None:
        target = resize_label(torch.from_numpy(read_label(case.label, case.images[0], num_classes)), shape)
    least = list(config.size) if slice_axis is None else _with_slice_axis(config.size, slice_axis)
    padding = [max(0, n - now) for n, now in zip(least, shape)]
    around = [side for extra in reversed(padding) for side in (0, extra)]
    # Padded with the darkest value: what a scanner sees beside the body.
    darkest = image.amin(dim=(1, 2, 3), keepdim=True)
    image = F.pad(image - darkest, around) + darkest
    if target is not None:
        target = F.pad(target, around, value=-1)
    if slice_axis is not None:
        image = image.movedim(slice_axis + 1, -1)
        target = None if target is None else target.movedim(slice_axis, -1)
    return Prepared(case, image.contiguous(), target, geometry, volume)


def _with_slice_axis(size: Sequence[int], slice_axis: int) -> list[int]:
    inside = iter(size)
    return [1 if axis == slice_axis else next(inside) for axis in range(3)]


def choose_slice_axis(config: TrainConfig, shape: Sequence[int]) -> int | None:
    """The axis (of canonical ones) with the fewest voxels: slices are thick there."""
    if config.spatial_dims == 3:
        return None
    return config.slice_axis if config.slice_axis >= 0 else int(np.argmin(shape))
