"""The range of intensities that a network was trained on, and whether an image clearly lies outside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pglcl.intensity import Intensity

SAMPLES = 100_000  # voxels of a channel that are looked at
ELSEWHERE = 0.25  # share of the usual distance of both percentiles, by which both must lie outside
FAR = 0.5  # share of that distance, by which both must lie away from most images of the training
NARROWER = 10.0  # factor between distances, as between shares from 0 to 1 and numbers of a scanner
# The other kinds standardise each image by itself, so that the network sees no shift and no factor; rgb has its limits.
COMPARED = ("ct", "window", "none")

# Of a channel: the percentiles 5 and 95 of its values.
Level = tuple[float, float]


def levels_of(image: np.ndarray) -> tuple[Level, ...]:
    """The levels of each channel of (C, X, Y, Z)."""
    flat = image.reshape(len(image), -1)
    step = -(-flat.shape[1] // SAMPLES) | 1  # odd, so that it does not meet the same column of each row
    found = np.percentile(flat[:, ::step].astype(np.float64), [5, 95], axis=1)
    return tuple((float(low), float(high)) for low, high in found.T)


@dataclass(frozen=True)
class Levels:
    """The percentiles 5 and 95 of the intensities of training images, for each channel.

    low: the smallest and the largest percentile 5. high: the smallest and the largest percentile 95. distance: the mean
    distance between both percentiles of an image.
    """

    low: tuple[tuple[float, float], ...]
    high: tuple[tuple[float, float], ...]
    distance: tuple[float, ...]

    @classmethod
    def of(cls, images: Iterable[Sequence[Level]]) -> Levels:
        """The levels of some images, which have the same number of channels."""
        found = np.array([list(image) for image in images])  # (N, C, 2)
        least, most = found.min(axis=0), found.max(axis=0)
        low, high = (tuple((float(a), float(b)) for a, b in zip(least[:, i], most[:, i])) for i in (0, 1))
        return cls(low, high, tuple(float(d) for d in (found[..., 1] - found[..., 0]).mean(axis=0)))

    def problem(self, image: Sequence[Level], intensity: Intensity) -> str:
        """A message if an image clearly differs; empty if it does not.

        An image differs if both percentiles lie far above those of every training image, or both far below; or if they
        are much closer together, or much farther apart. So a larger field of view or a bright implant makes no
        difference.
        """
        for c, (channel, (low, high)) in enumerate(zip(intensity.channels, image)):
            usual = self.distance[c]
            if channel.kind not in COMPARED or usual <= 0:
                continue
            (low_least, low_most), (high_least, high_most) = self.low[c], self.high[c]
            above = min(low - low_most, high - high_most) > ELSEWHERE * usual
            below = min(low_least - low, high_least - high) > ELSEWHERE * usual
            scaled = not usual / NARROWER <= high - low <= usual * NARROWER
            if above or below or (scaled and low < high):
                which = f"channel {c} has" if len(image) > 1 else "it has"
                return (
                    f"{which} values from {low:.4g} to {high:.4g} (percentiles 5 and 95); the training images have "
                    f"values from {low_least:.4g} to {high_most:.4g}"
                )
        return ""

    def state(self) -> dict[str, Any]:
        """Plain lists, for JSON and checkpoints; :meth:`from_state` reads them back."""
        return {
            "low": [list(pair) for pair in self.low],
            "high": [list(pair) for pair in self.high],
            "distance": list(self.distance),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Levels:
        low, high = (tuple((float(a), float(b)) for a, b in state[name]) for name in ("low", "high"))
        return cls(low, high, tuple(float(d) for d in state["distance"]))


def apart_from_most(images: Sequence[Sequence[Level]], intensity: Intensity) -> dict[int, str]:
    """A message for each image that clearly differs from most of the others, by its place among `images`.

    An image differs if both percentiles lie above, or both below, the medians of all images by more than half of the
    usual distance, as a CT does that begins at 0 instead of -1024. It also differs if they are much closer together or
    farther apart.
    """
    found = np.array([list(image) for image in images])  # (N, C, 2)
    usual = np.median(found, axis=0)
    lines: dict[int, str] = {}
    for c, channel in enumerate(intensity.channels):
        low, high = (float(v) for v in usual[c])
        if channel.kind not in COMPARED or low >= high:
            continue
        shift = (found[:, c] - usual[c]) / (high - low)
        distance = (found[:, c, 1] - found[:, c, 0]) / (high - low)
        moved = (shift.min(axis=1) > FAR) | (shift.max(axis=1) < -FAR)
        scaled = (distance > NARROWER) | ((distance < 1 / NARROWER) & (distance > 0))
        for i in np.flatnonzero(moved | scaled):
            which = f"channel {c} has" if len(intensity.channels) > 1 else "it has"
            least, most = found[i, c]
            lines.setdefault(
                int(i),
                f"{which} values from {least:.4g} to {most:.4g} (percentiles 5 and 95), most training images have "
                f"values from {low:.4g} to {high:.4g}",
            )
    return lines
