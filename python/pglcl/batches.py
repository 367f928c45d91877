"""Training batches.

A batch depends on the seed, the rank and its step alone, whoever prepares it and when: so a run that is resumed meets
the same batches, and so does one with another number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    NormalizeIntensity,
    RandAdjustContrast,
    RandAffined,
    RandFlipd,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandShiftIntensity,
    ScaleIntensityRangePercentiles,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pglcl.cases import Case
from pglcl.config import TrainConfig
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


class StepBatches(Dataset[dict[str, Tensor]]):
    """Item `step` is the batch of that step.

    image (L, C, *S) and label (L, *S) of labelled images; and, when semi-supervised steps have begun, weak and strong
    (U, C, *S), two views of the same unlabelled images that differ in intensities alone.
    """

    def __init__(
        self,
        labelled: list[Prepared],
        unlabelled: list[Prepared],
        config: TrainConfig,
        rank: int = 0,
        *,
        semi: bool = True,
    ) -> None:
        self.labelled, self.unlabelled, self.config, self.rank = labelled, unlabelled, config, rank
        self.semi = semi and bool(unlabelled)
        self.slices = {
            id(pool): [(v, z) for v in range(len(pool)) for z in range(pool[v].image.shape[-1])]
            for pool in (labelled, unlabelled)
        }
        dims = config.spatial_dims
        angle = math.radians(config.rotation)
        axes = range(dims) if config.flips == "all" else ()
        flips = [RandFlipd(["image", "label"], prob=0.5, spatial_axis=d) for d in axes]
        self.geometric = Compose([
            RandAffined(
                ["image", "label"], prob=0.9, rotate_range=angle if dims == 2 else [angle] * 3,
                scale_range=[config.scaling] * dims, translate_range=[s * 0.06 for s in config.size],
                mode=["bilinear", "nearest"], padding_mode="border",
            ),
            *flips,
        ])  # fmt: skip
        # Labelled images and the student's view of unlabelled ones, whatever the method.
        self.intensities = Compose([
            RandScaleIntensity(0.4, prob=0.8), RandShiftIntensity(0.4, prob=0.8), RandAdjustContrast(0.6, (0.5, 2.0)),
            RandGaussianNoise(0.5, std=0.2),
            RandGaussianSmooth((0.3, 1.5), (0.3, 1.5), (0.3, 1.5), prob=0.3),
        ])  # fmt: skip

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        set_track_meta(False)
        config = self.config
        random = np.random.RandomState(np.random.SeedSequence([config.seed, step, self.rank]).generate_state(4))
        semi = self.semi and step >= config.warmup
        count = config.batch_size // 2 if semi else config.batch_size
        images, labels = zip(*(self._labelled(random) for _ in range(count)))
        batch = {"image": torch.stack(images), "label": torch.stack(labels)}
        if semi:
            views = [self._unlabelled(random) for _ in range(config.batch_size - count)]
            batch["weak"], batch["strong"] = (torch.stack(side) for side in zip(*views))
        return batch

    def _labelled(self, random: np.random.RandomState) -> tuple[Tensor, Tensor]:
        item = self._pick(self.labelled, random, foreground=True)
        self.geometric.set_random_state(state=random)
        item = self.geometric(item)
        self.intensities.set_random_state(state=random)
        return torch.as_tensor(self.intensities(item["image"])), torch.as_tensor(item["label"])[0].round().long()

    def _unlabelled(self, random: np.random.RandomState) -> tuple[Tensor, Tensor]:
        self.geometric.set_random_state(state=random)
        item = self._pick(self.unlabelled, random, foreground=False)
        weak = torch.as_tensor(self.geometric(item)["image"])
        self.intensities.set_random_state(state=random)
        return weak, torch.as_tensor(self.intensities(weak.clone()))

    def _pick(self, pool: list[Prepared], random: np.random.RandomState, *, foreground: bool) -> dict[str, Tensor]:
        """A slice, or a patch; every other labelled patch is centred on a voxel that is not background."""
        if self.config.spatial_dims == 2:
            places = self.slices[id(pool)]
            v, z = places[random.randint(len(places))]
            image, label = pool[v].image[..., z], pool[v].label
            label = torch.zeros(image.shape[1:]) if label is None else label[..., z]
        else:
            prepared = pool[random.randint(len(pool))]
            shape, size = prepared.image.shape[1:], self.config.size
            first = [random.randint(n - s + 1) for n, s in zip(shape, size)]
            label = prepared.label
            if foreground and label is not None and random.rand() < 0.5:
                inside = (label > 0).nonzero()
                if len(inside):
                    centre = inside[random.randint(len(inside))].tolist()
                    first = [min(max(c - s // 2, 0), n - s) for c, s, n in zip(centre, size, shape)]
            place = tuple(slice(f, f + s) for f, s in zip(first, size))
            image = prepared.image[(slice(None), *place)]
            label = torch.zeros(image.shape[1:]) if label is None else label[place]
        return {"image": image.clone(), "label": label[None].float()}


def loader(batches: StepBatches, first: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """The batches from step `first` on."""
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": 4, "persistent_workers": False, "multiprocessing_context": "fork"}
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, len(batches)),
            num_workers=workers,
            worker_init_fn=_one_thread,
            **options,
        )
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
