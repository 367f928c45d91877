"""Predicts masks, probabilities and entropy maps of volumes, in the geometry of their files."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.files import replacing
from pglcl.formats import Source, result_suffix
from pglcl.formats.names import is_dicom_folder
from pglcl.intensity import describe_constant, describe_few, few_values
from pglcl.labels import LabelMap
from pglcl.layouts import Case
from pglcl.levels import Level, levels_of
from pglcl.model import TrainedModel
from pglcl.outputs import check_outputs, check_outside_data
from pglcl.postprocess import POSTPROCESS, Organ, each_class, keep_largest
from pglcl.prepare import Prepared, constant_of, prepare, read_suitable
from pglcl.run_folder import data_of
from pglcl.training_data import files_of
from pglcl.volumes import Geometry, write_like
from pglcl_ext.patch_statistics import pixel_entropy

SLICES_AT_ONCE = 16  # or windows of slices
VOLUMES_AT_ONCE = 4  # windows of volumes
SLAB_ELEMENTS = 1 << 24  # probabilities that are held at once while a volume is restored: 64 MiB
TTA = ("none", "flips")

# Called with the share of a volume that is done, 0 to 1.
Report = Callable[[float], None]


class FlipAverage(nn.Module):
    """A network that averages over its input mirrored along every set of axes.

    It returns the logarithm of the mean probability, whose softmax is that mean.
    """

    def __init__(self, network: nn.Module, spatial_dims: int) -> None:
        super().__init__()
        self.network = network
        axes = range(2, 2 + spatial_dims)
        self.flips = [chosen for n in range(spatial_dims + 1) for chosen in itertools.combinations(axes, n)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) to (B, K, *S)."""
        total: Tensor | None = None
        for axes in self.flips:
            p = self.network(x.flip(axes)).float().softmax(dim=1).flip(axes)
            total = p if total is None else total.add_(p)
        assert total is not None
        return (total / len(self.flips)).clamp_(min=1e-12).log_()


@torch.no_grad()
def network_output(network: nn.Module, image: Tensor, config: TrainConfig, report: Report | None = None) -> Tensor:
    """Logits (K, X, Y, Z), float32 on the CPU, of a prepared image (C, X, Y, Z)."""
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
        if config.spatial_dims == 3:
            return _by_windows(network, image[None], config.size, device, report)[0]
        if config.whole_slices:
            return _slice_by_slice(lambda slices: network(slices.to(device)).float().cpu(), image, report)
        return _slice_by_slice(lambda slices: _by_windows(network, slices, config.size, device), image, report)


def _slice_by_slice(predict: Callable[[Tensor], Tensor], image: Tensor, report: Report | None) -> Tensor:
    slices = image.movedim(-1, 0)
    logits: Tensor | None = None
    for first in range(0, len(slices), SLICES_AT_ONCE):
        part = predict(slices[first : first + SLICES_AT_ONCE])
        if logits is None:
            logits = part.new_empty(len(slices), *part.shape[1:])
        logits[first : first + len(part)] = part
        if report:
            report((first + len(part)) / len(slices))
    assert logits is not None
    return logits.movedim(0, -1)


def _by_windows(
    network: nn.Module, images: Tensor, size: tuple[int, ...], device: torch.device, report: Report | None = None
) -> Tensor:
    """Logits (B, K, *S) of images (B, C, *S). Windows overlap by half; their centres count most."""
    step = [max(1, n // 2) for n in size]
    windows = int(np.prod([1 + max(0, -(-(n - s) // t)) for n, s, t in zip(images.shape[2:], size, step)]))
    done = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal done
        done += len(x)
        if report:
            report(min(1.0, done / (len(images) * windows)))
        answer: Tensor = network(x).float()
        return answer

    logits = sliding_window_inference(
        images,
        size,
        SLICES_AT_ONCE if len(size) == 2 else VOLUMES_AT_ONCE,
        counted,
        overlap=0.5,
        mode="gaussian",
        sw_device=device,
        device=torch.device("cpu"),
    )
    assert isinstance(logits, Tensor)
    return logits


@dataclass(frozen=True)
class Part:
    """The prediction of one model for a volume, on the model's own grid.

    p: probabilities (K, X', Y', Z') in canonical axes. geometry: restores the resolution of the volume.
    """

    p: Tensor
    geometry: Geometry


class Prediction:
    """Probabilities of a volume, restored to its own resolution slab by slab.

    Only :meth:`probabilities` holds all of them at once: six classes of 512 x 512 x 300 voxels take 1.9 GB.

    Args:
        parts: one for each model, of the same volume and classes; they are averaged.
        change: post-processes a mask (X, Y, Z).
    """

    def __init__(self, parts: Sequence[Part], change: Callable[[Tensor], Tensor]) -> None:
        self.parts, self.change = parts, change
        self.shape = tuple(parts[0].geometry.shape)
        self.num_classes = len(parts[0].p)

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields places along the first axis and the probabilities (K, x, Y, Z) there, which sum to 1."""
        rows = max(1, SLAB_ELEMENTS // (self.num_classes * self.shape[1] * self.shape[2]))
        for first in range(0, self.shape[0], rows):
            place = slice(first, min(first + rows, self.shape[0]))
            total = restore_rows(self.parts[0], place)
            for part in self.parts[1:]:
                total = total + restore_rows(part, place)
            yield place, total / total.sum(dim=0, keepdim=True).clamp(min=1e-12)

    def mask(self) -> Tensor:
        """The most probable class (X, Y, Z), uint8 (int32 above 256 classes), after post-processing."""
        return self.change(self.plain_mask())

    def plain_mask(self) -> Tensor:
        """The most probable class (X, Y, Z) without post-processing."""
        mask = torch.empty(self.shape, dtype=torch.uint8 if self.num_classes <= 256 else torch.int32)
        for place, p in self.slabs():
            mask[place] = p.argmax(dim=0)
        return mask

    def probabilities(self) -> Tensor:
        """(K, X, Y, Z) float32. The classes of a voxel are adjacent in memory, as in files."""
        whole = torch.empty(*self.shape, self.num_classes)
        for place, p in self.slabs():
            whole[place] = p.movedim(0, -1)
        return whole.movedim(-1, 0)

    def entropy(self) -> Tensor:
        """(X, Y, Z) float32, nats."""
        whole = torch.empty(self.shape)
        for place, p in self.slabs():
            whole[place] = pixel_entropy(p, dim=0)
        return whole


def restore_rows(part: Part, place: slice) -> Tensor:
    """The rows `place` of ``part.geometry.restore(part.p)``, (K, x, Y, Z), without the other rows."""
    p, geometry = part.p, part.geometry
    inside = [slice(0, n) for n in geometry.resized[1:]]
    before, after = geometry.resized[0], geometry.shape[0]
    if before == after:
        rows = p[:, place][(slice(None), slice(None), *inside)]
    else:  # linear between the centres of voxels, as torch interpolates
        centre = ((torch.arange(place.start, place.stop) + 0.5) * (before / after) - 0.5).clamp(min=0)
        low = centre.floor().long().clamp(max=before - 1)
        weight = (centre - low).to(p.dtype)[:, None, None]
        p = p[(slice(None), slice(None), *inside)]
        rows = torch.lerp(p[:, low], p[:, (low + 1).clamp(max=before - 1)], weight)
    if tuple(rows.shape[2:]) == tuple(geometry.shape[1:]):
        return rows
    return F.interpolate(rows, tuple(geometry.shape[1:]), mode="bilinear", align_corners=False)


class Predictor:
    """One trained model, or several whose probabilities are averaged.

    Args:
        models: with the same classes and channels. Each gets the volume prepared in its own way.
        tta: "flips" also averages over mirrored images, and is refused for a model trained without such images.
        postprocess: one of :data:`POSTPROCESS`. "largest-component" keeps only the largest component of each class,
            "auto" does so for the organs of every model.

    Raises:
        UserError: models that do not fit together, or options that do not fit the models.
    """

    def __init__(self, models: Sequence[TrainedModel], *, tta: str = "none", postprocess: str = "auto") -> None:
        self.models = list(models)
        for name, value, choices in (("--tta", tta, TTA), ("--postprocess", postprocess, POSTPROCESS)):
            if value not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, got {value}")
        first = self.models[0]
        for number, other in enumerate(self.models[1:], start=2):
            for name in ("channels", "labels"):
                ours, theirs = getattr(first, name), getattr(other, name)
                if ours != theirs:
                    shown = [x.describe() if isinstance(x, LabelMap) else x for x in (ours, theirs)]
                    raise UserError(
                        f"runs that are averaged must agree: {name} of run 1 are {shown[0]}, of run {number} {shown[1]}"
                    )
            if first.description and other.description:
                lines = first.description.contradictions(other.description)
                if lines:
                    raise UserError(f"runs that are averaged must agree: of run {number}, {lines[0]}")
        if tta == "flips" and any(model.config.flips == "none" for model in self.models):
            raise UserError("--tta flips: the model was trained without mirrored images (--flips none)")
        self.tta, self.postprocess = tta, postprocess
        self.networks: list[nn.Module] = [
            FlipAverage(model.network, model.config.spatial_dims) if tta == "flips" else model.network
            for model in self.models
        ]

    def __call__(self, case: Case, report: Report | None = None) -> tuple[Prediction, Prepared]:
        """The prediction of a case, and the case as the first model saw it."""
        parts: list[Part] = []
        first: Prepared | None = None
        for number, (model, network) in enumerate(zip(self.models, self.networks)):
            prepared = prepare(case, model.config, model.slice_axis, model.intensity)
            parts.append(self._part(model, network, prepared, self._share_of(report, number)))
            first = first or prepared
        assert first is not None
        return Prediction(parts, self._changed), first

    def check(self, case: Case) -> str:
        """Reads the image of a case without predicting. Returns the message of :meth:`odd_intensities` about it.

        Raises:
            UserError: a damaged file, or an image that does not suit the models.
        """
        for model in self.models:
            volume = read_suitable(case, model.config, model.slice_axis, model.intensity)
        return self.odd_intensities(levels_of(volume.data), constant_of(volume), few_values(volume.data))

    def _part(self, model: TrainedModel, network: nn.Module, prepared: Prepared, report: Report | None) -> Part:
        p = network_output(network, prepared.image, model.config, report)
        step = max(1, SLAB_ELEMENTS // p[:, 0].numel())
        for first in range(0, p.shape[1], step):
            rows = p[:, first : first + step]
            if not torch.isfinite(rows).all():  # its most probable class would be background
                raise UserError(f"{prepared.case.images[0]}: the network gives NaN; check the intensities of the image")
            rows.copy_(rows.softmax(dim=0))  # in place: the logits are not needed again
        if model.slice_axis is not None:
            p = p.movedim(-1, model.slice_axis + 1)
        return Part(p, prepared.geometry)

    def _share_of(self, report: Report | None, number: int) -> Report | None:
        return None if report is None else lambda share: report((number + share) / len(self.models))

    def _changed(self, mask: Tensor) -> Tensor:
        return keep_largest(mask, self.organs)

    def unlike_training(self, source: Source) -> str:
        """A message if voxels clearly differ from those of the training images in size or direction; empty if not."""
        for model in self.models:
            known = model.resolution
            found = known and (known.problem(source, model.config, model.slice_axis) or known.direction_problem(source))
            if found:
                return found
        return ""

    def odd_intensities(self, levels: Sequence[Level], constant: Mapping[int, float], few: int) -> str:
        """A message if the intensities of an image clearly differ from those of the training images; empty if not.

        Args:
            levels: of each channel.
            few: the number of different values, if it is small.
            constant: the value of each constant channel. A single one is not named if it was constant in the training,
                too.
        """
        if len(constant) < len(levels):
            known = [model.levels.distance for model in self.models if model.levels]
            constant = {c: value for c, value in constant.items() if all(distance[c] > 0 for distance in known)}
        if constant:
            return describe_constant(constant, len(levels))
        if few:
            return describe_few(few)
        for model in self.models:
            found = model.levels.problem(levels, model.intensity) if model.levels else ""
            if found:
                return found
        return ""

    @property
    def organs(self) -> list[Organ]:
        """The organs of which a mask keeps only the largest component."""
        if self.postprocess == "auto":
            first, *others = (model.organs or () for model in self.models)
            return [organ for organ in first if all(organ in theirs for theirs in others)]
        return each_class(self.models[0].num_classes) if self.postprocess == "largest-component" else []


def data_folders(run: Path, inputs: Sequence[Path], output: Path) -> list[Path]:
    """The data folders of the run, of the inputs and around the output, where no mask may count as image or label."""
    found = []
    with contextlib.suppress(UserError):  # the model was moved out of its run
        found.append(data_of(run))
    folders = [path if path.is_dir() else path.parent for path in inputs]
    place = output.resolve()
    # Only folders that show what they are: to look for patients' folders would read all that lies below.
    around = [f for f in (place, *place.parents[:2]) if (f / "images").is_dir() or (f / "dataset.json").is_file()]
    return [
        *found,
        *around,
        *dict.fromkeys(f.resolve().parent for f in folders if f.resolve().name.startswith("images")),
    ]


@dataclass(frozen=True)
class Writer:
    """Writes the files of predictions to a folder.

    labels: gives masks their values. probabilities, entropy: whether to write these files, too. overwrite: replace
    files that exist.
    """

    folder: Path
    labels: LabelMap
    probabilities: bool = False
    entropy: bool = False
    overwrite: bool = False

    def files(self, case: Case) -> list[Path]:
        """The files of a case, the mask first."""
        image = case.images[0]
        mask, floats = (result_suffix(image, dtype) for dtype in (self.labels.dtype, np.dtype(np.float32)))
        endings = [mask, *[f"_probabilities{floats}"] * self.probabilities, *[f"_entropy{floats}"] * self.entropy]
        return [self.folder / f"{case.name}{ending}" for ending in endings]

    def check(self, cases: Sequence[Case], roots: Sequence[Path] = (), images: Sequence[Path] = ()) -> None:
        """Refuses outputs that would replace a file, or that would later count as images.

        Args:
            cases: those to write.
            roots: data folders.
            images: the inputs of the command, files and folders.

        Raises:
            UserError: a line for each file in the way, or for an output folder that holds images.
        """
        for root in roots:
            check_outside_data(self.folder, root)
        outputs = [path for case in cases for path in self.files(case)]
        read = [path for case in cases for image in case.images for path in files_of(image)]
        check_outputs(outputs, inputs=read, overwrite=self.overwrite)
        if any(os.path.samefile(path, self.folder) for path in images if path.is_dir() and not is_dicom_folder(path)):
            raise UserError(
                f"{self.folder}: holds the images, and masks in it would be read as images next time; choose another "
                "--output"
            )

    def write(self, prediction: Prediction, prepared: Prepared) -> list[Path]:
        """Writes the files of one case, in the axes and geometry of its image. Returns their paths.

        They get their names together, the mask last.
        """
        case, source = prepared.case, prepared.source
        paths = self.files(case)
        self.check([case])  # again, since files may have appeared after the first check
        with contextlib.ExitStack() as stack:
            partials = iter([stack.enter_context(replacing(path, new=not self.overwrite)) for path in paths])
            write_like(self.labels.decode(prediction.mask().numpy()), source, next(partials))
            if self.probabilities:
                write_like(prediction.probabilities().movedim(0, -1).numpy(), source, next(partials))
            if self.entropy:
                write_like(prediction.entropy().numpy(), source, next(partials))
        return paths
