"""The pictures of the report. Names of files and patients are not drawn into them: they are text of the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pglcl.labels import IGNORE
from pglcl.layouts import Case
from pglcl.model import TrainedModel
from pglcl.pairs import pairs_of_prediction
from pglcl.postprocess import components, each_class, keep_largest
from pglcl.predict import Predictor, network_output
from pglcl.prepare import Prepared, prepare
from pglcl.scores import score_volume
from pglcl.volumes import read_label, read_volume
from pglcl_ext import PatchRows, patch_embeddings, semantic_disparity
from pglcl_ext.class_patches import one_hot

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

# Colours that most colour-blind people can tell apart (Okabe and Ito).
COLOURS = ["#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442"]
CURVES = {"segmentation": "segmentation loss", "contrast": "contrastive loss", "validation_dice": "validation Dice"}
STRIP = 0.42  # inches: height of the scale below a panel
MANY_POINTS = 40  # a curve of more points is shown with its running mean


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URL. caption: the text below it. text: the text that screen readers read."""

    url: str
    caption: str
    text: str


def picture(figure: Figure, caption: str, text: str = "") -> Picture:
    """Draws the whole canvas of a figure, and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    plt.close(figure)
    return Picture("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), caption, text or caption)


def colour(k: int) -> str:
    """The colour of class k, as CSS and matplotlib write it."""
    return COLOURS[k % len(COLOURS)]


def panel(ratio: float, *, strip: bool) -> tuple[Figure, Axes]:
    """An empty panel for an image of `ratio`, height by width; `strip`: with a strip for a scale below it.

    Panels side by side need the same `ratio` and the same `strip`, to be of one size.
    """
    ratio = min(max(ratio, 0.4), 2.5)
    width, below = 3.0, STRIP if strip else 0.0
    figure = plt.figure(figsize=(width, width * ratio + below))
    share = below / (width * ratio + below)
    axis = figure.add_axes((0.0, share, 1.0, 1 - share))
    axis.axis("off")
    return figure, axis


def scale(figure: Figure, shown: Any) -> None:
    """A colour bar in the strip of a panel."""
    height = figure.get_size_inches()[1]
    place = figure.add_axes((0.1, 0.62 * STRIP / height, 0.8, 0.25 * STRIP / height))
    figure.colorbar(shown, cax=place, orientation="horizontal").locator = MaxNLocator(4)
    place.tick_params(labelsize=11, length=2, pad=1)


def curves(rows: Sequence[dict[str, Any]]) -> list[Picture]:
    """A picture for each number that training wrote down."""
    pictures = []
    for name, title in CURVES.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if not points:
            continue
        steps, values = zip(*points)
        figure, axis = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
        many = len(values) > MANY_POINTS
        axis.plot(steps, values, color="#0072B2", alpha=0.3 if many else 1, marker=None if many else "o", markersize=4)
        if many:
            width = max(1, len(values) // 25)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axis.plot(steps[width - 1 :], smooth, color="#0072B2", linewidth=2)
        axis.set_xlabel("step", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.locator_params(nbins=5)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        text = f"{title} from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}"
        pictures.append(picture(figure, title, text))
    return pictures


def outline(axis: Axes, inside: np.ndarray, **style: Any) -> None:
    """Draws the outline of a mask (rows, columns) over its image.

    The mask is closed at the border of the image, which a class may fill, and which may be one pixel wide.
    """
    rows, columns = (np.array([-0.5, *range(size), size - 0.5]) for size in inside.shape)
    axis.contour(columns, rows, np.pad(inside, 1), levels=[0.5], **style)


class Shown:
    """A volume with its truth and its prediction.

    Attributes:
        mask, plain: (X, Y, Z), the prediction after and before post-processing. entropy: (X, Y, Z), in nats.
        slice: the index along `axis` of the slice that is shown, the one with the most foreground.
    """

    def __init__(self, predictor: Predictor, case: Case) -> None:
        assert case.label is not None
        self.model, self.case = predictor.models[0], case
        prediction, self.prepared = predictor(case)
        self.plain = prediction.plain_mask()
        self.mask = prediction.change(self.plain)
        self.entropy = prediction.entropy()
        del prediction  # frees its probabilities
        self.image = torch.from_numpy(read_volume(case.images).data[0])
        self.truth = torch.from_numpy(read_label(case.label, case.images[0], self.model.labels))
        self.axis = 2 if self.model.slice_axis is None else self.model.slice_axis
        self.slice = _fullest((self.truth > 0), self.axis)
        first, second = (s for axis, s in enumerate(self.prepared.spacing) if axis != self.axis)
        self.upright = self.prepared.source.unit != "mm"  # a picture, whose rows already run from top to bottom
        self.aspect = first / second if self.upright else second / first  # of a pixel: height by width

    def dice(self, mask: Tensor) -> float:
        """The mean over the classes that the truth has."""
        known = torch.where(self.truth == IGNORE, IGNORE, mask.int())
        found = score_volume(known, self.truth, self.model.num_classes, (1, 1, 1), patient="", case="", distances=False)
        values = [score.dice for score in found if not math.isnan(score.dice)]
        return float(np.mean(values)) if values else math.nan

    def plane(self, x: Tensor, index: int) -> np.ndarray:
        """A slice as radiologists view it: first axis to the right, second axis up. A picture stays as it is."""
        array: np.ndarray = x.select(self.axis, index).numpy()
        return array if self.upright else array.T[::-1]

    def _image(self, index: int, *, strip: bool) -> tuple[Figure, Axes]:
        image = self.plane(self.image, index)
        figure, axis = panel(self.aspect * image.shape[0] / image.shape[1], strip=strip)
        low, high = np.percentile(image, [1, 99])
        axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=self.aspect)
        return figure, axis

    def _filled(self, axis: Axes, mask: Tensor, index: int, opacity: float = 0.45) -> None:
        plane = self.plane(mask, index)
        for k in range(1, self.model.num_classes):
            if (plane == k).any():
                rgb = matplotlib.colors.to_rgb(colour(k))
                axis.imshow(np.where((plane == k)[..., None], np.array([*rgb, opacity]), 0.0), aspect=self.aspect)
                outline(axis, plane == k, colors=[colour(k)], linewidths=0.9)

    def _outlines(self, axis: Axes, mask: Tensor, index: int, colours: str | None, style: str) -> None:
        plane = self.plane(mask, index)
        for k in range(1, self.model.num_classes):
            if (plane == k).any():
                outline(axis, plane == k, colors=[colours or colour(k)], linestyles=[style], linewidths=1.3)

    def overlay(self) -> list[Picture]:
        """Image, truth, prediction and the entropy of the prediction, in one slice."""
        dice = self.dice(self.mask)
        pictures = []
        for mask, caption in (
            (None, "image"),
            (self.truth, "truth"),
            (self.mask, f"prediction, Dice {dice:.3f}"),
        ):
            figure, axis = self._image(self.slice, strip=True)
            if mask is not None:
                self._filled(axis, mask, self.slice)
            pictures.append(picture(figure, caption))
        plane = self.plane(self.entropy, self.slice)
        figure, axis = panel(self.aspect * plane.shape[0] / plane.shape[1], strip=True)
        most = math.log(self.model.num_classes)
        shown = axis.imshow(plane, cmap="magma", vmin=0, vmax=most, aspect=self.aspect)
        scale(figure, shown)
        return [*pictures, picture(figure, "entropy [nats]")]

    def islands(self) -> list[Picture]:
        """Outlines of truth (white, dashed) and prediction, with all components and with only the largest ones."""
        largest = keep_largest(self.plain, each_class(self.model.num_classes))
        stray = self.plain != largest
        index = (
            _fullest(stray, self.axis)
            if stray.any()
            else _fullest((self.plain != self.truth) & (self.truth != IGNORE), self.axis)
        )
        pieces = sum(max(0, components(self.plain, k) - 1) for k in range(1, self.model.num_classes))
        before = f"as predicted, Dice {self.dice(self.plain):.3f}; {_count(pieces, 'stray piece')}"
        before += f" of {int(stray.sum())} voxels" if pieces else ""
        after = f"largest pieces alone, Dice {self.dice(largest):.3f}"
        pictures = []
        for mask, marked, caption in ((self.plain, stray, before), (largest, None, after)):
            figure, axis = self._image(index, strip=False)
            if marked is not None and marked.any():
                plane = self.plane(marked, index)
                axis.imshow(np.where(plane[..., None], np.array([1.0, 0.0, 0.0, 0.6]), 0.0), aspect=self.aspect)
            self._outlines(axis, self.truth, index, "white", "dashed")
            self._outlines(axis, mask, index, None, "solid")
            pictures.append(picture(figure, caption))
        return pictures

    def disparity(self) -> list[Picture]:
        """Entropies of patches, their disparity from an anchor, and its pairs; at the resolution of the network.

        A patch has a box for each class that it is paired by. Its colour is that of the class which covers most of it.
        """
        image, p, z = self._seen_by_the_network()
        pairs, size = pairs_of_prediction(self.model.config, p), self.model.config.patch_size
        keys = pairs.keys
        disparity = semantic_disparity(pairs.anchor.entropy, keys.entropy)[0]
        boxed = (pairs.positive | (pairs.negative & (keys.labels > 0))).nonzero().flatten()
        rows = PatchRows(*(torch.cat([anchor, key[boxed]]) for anchor, key in zip(pairs.anchor, keys)))
        solid = [True, *pairs.positive[boxed].tolist()]
        (top, bottom), (left, right) = _window(rows.index[:, 1:3], size, image.shape[:2])
        pictures = []
        for values, caption, boxes in (
            (None, "image", True),
            (keys.entropy, "entropy of the patches [nats]", False),
            (disparity, "disparity from the anchor [nats]", True),
        ):
            figure, axis = panel((bottom - top) / (right - left), strip=True)
            axis.imshow(image[..., z].numpy(), cmap="gray")
            if values is not None:
                painted = _painted(keys, values, size, image.shape[:2])
                scale(figure, axis.imshow(painted.numpy(), cmap="viridis", alpha=0.65))
            axis.set_xlim(left - 0.5, right - 0.5)
            axis.set_ylim(bottom - 0.5, top - 0.5)
            if boxes:
                _draw_boxes(axis, rows, solid, size)
            pictures.append(picture(figure, caption))
        return pictures

    def _seen_by_the_network(self) -> tuple[Tensor, Tensor, int]:
        """The image (X, Y, Z), the probabilities (1, K, X, Y) of its shown slice, and the index of the slice in it.

        What was padded is left out, but for sides that are smaller than a patch, or odd. With networks of volumes, the
        probabilities (1, K, X, Y, P) are those of the patches that the slice passes through.
        """
        config, image = self.model.config, self.prepared.image
        size, z = config.patch_size, min(self.slice, image.shape[-1] - 1)
        inside = [max(n, size) // 2 * 2 for axis, n in enumerate(self.prepared.geometry.resized) if axis != self.axis]
        logits = network_output(self.model.network, image, config)[:, : inside[0], : inside[1]]
        if config.spatial_dims == 2:
            logits = logits[..., z]
        else:
            first = min(z // size * size, image.shape[-1] - size)
            logits = logits[..., first : first + size]
        return image[0, : inside[0], : inside[1]], logits.softmax(dim=0)[None], z


def _painted(rows: PatchRows, values: Tensor, size: int, shape: Sequence[int]) -> Tensor:
    """(X, Y): the value of the class that covers most of each patch, NaN outside of all patches."""
    painted = torch.full(tuple(shape), math.nan)
    for j in rows.coverage.argsort(stable=True).tolist():
        x, y = rows.index[j, 1:3].tolist()
        painted[x : x + size, y : y + size] = values[j]
    return painted


def _draw_boxes(axis: Axes, rows: PatchRows, solid: Sequence[bool], size: int) -> None:
    """The first row in white, the others in the colours of their classes. Boxes of one patch lie in each other."""
    drawn: dict[tuple[int, ...], int] = {}
    for j, (_, x, y, *_) in enumerate(rows.index.tolist()):
        inset = 0.12 * size * drawn.get((x, y), 0)
        drawn[x, y] = drawn.get((x, y), 0) + 1
        edge, side = "white" if j == 0 else colour(int(rows.labels[j])), size - 1 - 2 * inset
        box = Rectangle((y + inset, x + inset), side, side, fill=False, edgecolor=edge)
        box.set_linestyle("-" if solid[j] else "--")
        box.set_linewidth(2.5 if j == 0 else 1.0)
        axis.add_patch(box)


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _fullest(mask: Tensor, axis: int) -> int:
    return int(mask.movedim(axis, 0).flatten(1).sum(dim=1).argmax())


def _window(corners: Tensor, size: int, shape: Sequence[int]) -> list[tuple[int, int]]:
    """The range of pixels to show along each axis: around boxes at `corners` (N, 2), which are small in an image."""
    window = []
    for places, extent in zip(corners.T, shape):
        low, high = int(places.min()), int(places.max())
        margin = 2 * size + (high - low) // 4
        window.append((max(0, low - margin), min(extent, high + size + margin)))
    return window


@torch.no_grad()
def embeddings(model: TrainedModel, cases: Sequence[Case]) -> Picture:
    """The first two principal components of the projected patches of `cases`, coloured by their true class."""
    found = [_case_embeddings(model, case) for case in cases]
    z, y = torch.cat([z for z, _ in found]), torch.cat([y for _, y in found])
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    if len(z) > 2:
        centred = z - z.mean(dim=0)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        flat = centred @ directions[:2].T
        for k in range(model.num_classes):
            own = flat[y == k]
            dots = own[:: max(1, len(own) // 400)]
            axis.scatter(dots[:, 0], dots[:, 1], s=12, color=colour(k), alpha=0.7)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return picture(figure, f"{len(z)} patches of {_count(len(cases), 'volume')}", "Embeddings coloured by class")


def _case_embeddings(model: TrainedModel, case: Case) -> tuple[Tensor, Tensor]:
    config, network = model.config, model.network
    device = next(network.parameters()).device
    prepared: Prepared = prepare(case, config, model.slice_axis, model.intensity, model.labels)
    assert prepared.label is not None
    images, target = prepared.image[None], prepared.label[None]
    if config.spatial_dims == 2:
        images, target = prepared.image.movedim(-1, 0), prepared.label.movedim(-1, 0)
        z = int((target > 0).flatten(1).sum(dim=1).argmax())  # the slice with the most foreground
        near = slice(max(0, z - 8), z + 8)
        images, target = images[near], target[near]
    shape = target.shape[1:]
    inside = (target > 0).nonzero()[:, 1:].float()
    centre = inside.mean(dim=0) if len(inside) else torch.tensor(shape) / 2
    first = [min(max(int(c) - s // 2, 0), n - s) for c, s, n in zip(centre, config.size, shape)]
    place = tuple(slice(f, f + s) for f, s in zip(first, config.size))
    images, target = images[(slice(None), slice(None), *place)], target[(slice(None), *place)]
    _, features = network.with_features(images.to(device))
    pool = F.avg_pool2d if config.spatial_dims == 2 else F.avg_pool3d
    weights = pool(one_hot(target, model.num_classes).float(), network.feature_stride).to(device)
    batch = patch_embeddings(features, weights, config.patch_size // network.feature_stride, coverage=0.2).compact()
    return network.projection(batch.embeddings).cpu(), batch.labels.cpu()
