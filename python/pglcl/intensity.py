"""Normalises intensities, from the numbers of a file to those that the network sees. The model keeps the constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from monai.data import set_track_meta
from monai.transforms import Compose, NormalizeIntensity, ScaleIntensityRangePercentiles
from torch import Tensor

from pglcl.errors import UserError

AIR = -1024.0  # HU; lower values (-2048, -3024) are padding outside the scanner's round field of view
HOUNSFIELD = -500.0  # an image of whole numbers that reaches below this is a CT
# Mean and deviation of red, green and blue over ImageNet, for values from 0 to 1.
RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of largest and smallest value: beyond, float32 has no variance of them (zscore), or no quotient (percentile).
SPREAD = {"zscore": (1e-15, 1e15), "percentile": (1e-30, 1e30)}
KINDS = ("percentile", "zscore", "ct", "window", "rgb", "none")


@dataclass(frozen=True)
class Channel:
    """The way one channel is normalised.

    percentile: each volume is clipped to its own percentiles 0.5 and 99.5, then brought to mean 0 and deviation 1.
    zscore: the same without clipping. ct, window, rgb: clipped to [low, high], then (x - mean) / std, the same for all
    volumes. none: unchanged.
    """

    kind: str
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    def __call__(self, image: Tensor) -> Tensor:
        """Normalises (1, X, Y, Z); the result is float32."""
        set_track_meta(False)
        if self.kind == "percentile":
            clip = ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True, channel_wise=True)
            return torch.as_tensor(Compose([clip, NormalizeIntensity(channel_wise=True)])(image)).float()
        if self.kind == "zscore":
            return torch.as_tensor(NormalizeIntensity(channel_wise=True)(image)).float()
        if self.kind == "none":
            return image.float()
        return (image.float().clamp(self.low, self.high) - self.mean) / self.std

    def describe(self) -> str:
        if self.kind in ("percentile", "zscore", "none"):
            return self.kind
        return f"{self.kind} (clipped to {self.low:g}..{self.high:g}, mean {self.mean:.4g}, deviation {self.std:.4g})"


@dataclass(frozen=True)
class Intensity:
    """The normalisation of every channel, and the reason for it."""

    channels: tuple[Channel, ...]
    reason: str

    def __call__(self, image: Tensor) -> Tensor:
        """Normalises (C, X, Y, Z); the result is float32."""
        return torch.cat([channel(image[c : c + 1]) for c, channel in enumerate(self.channels)])

    def problem(self, image: np.ndarray) -> str:
        """A message if the range of an image (C, X, Y, Z) does not suit its normalisation; empty if it does."""
        for c, channel in enumerate(self.channels):
            if channel.kind not in ("rgb", *SPREAD):
                continue
            low, high = float(image[c].min()), float(image[c].max())
            if channel.kind in SPREAD:
                least, most = SPREAD[channel.kind]
                if low < high and not least <= high - low <= most:
                    return f"channel {c} has values from {low:g} to {high:g}, which {channel.kind} cannot normalise"
                continue
            share = high <= 1 and bool((image[c] != np.rint(image[c])).any())
            if low < 0 or high > 255 or share:
                return f"channel {c} must have values from 0 to 255 for --normalise rgb, got {low:g} to {high:g}"
        return ""

    def describe(self) -> str:
        kinds = [channel.describe() for channel in self.channels]
        words = kinds[0] if len(set(kinds)) == 1 else "; ".join(f"channel {c}: {k}" for c, k in enumerate(kinds))
        return f"{words}; {self.reason}"

    def state(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON and checkpoints; :meth:`from_state` reads them back."""
        return {"channels": [asdict(channel) for channel in self.channels], "reason": self.reason}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Intensity:
        return cls(tuple(Channel(**channel) for channel in state["channels"]), str(state["reason"]))


@dataclass
class Measured:
    """The measured intensities of one case.

    low, high: of each channel. whole: whether a channel's values are all whole numbers. eight_bits: whether all
    values are unsigned bytes. foreground: (C, n) float32, a sample of the labelled foreground, where there is a label.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    whole: tuple[bool, ...]
    eight_bits: bool
    foreground: np.ndarray | None = None

    @property
    def hounsfield(self) -> tuple[bool, ...]:
        return tuple(low < HOUNSFIELD and whole for low, whole in zip(self.low, self.whole))


def choose_intensity(
    normalise: str, window: tuple[float, float] | None, modalities: Sequence[str], measured: Sequence[Measured]
) -> Intensity:
    """The normalisation that `--normalise` and `--window` ask for. auto follows the description and the values.

    Args:
        normalise: auto, percentile, zscore, ct, rgb or none.
        window: level and width, or None.
        modalities: of each channel, from dataset.json; empty where unknown.
        measured: the intensities of every training case.

    Raises:
        UserError: the images or their labels do not fit the normalisation.
    """
    count = len(measured[0].low)
    if window:
        level, width = window
        channel = Channel("window", level - width / 2, level + width / 2, level, width / 2)
        return Intensity((channel,) * count, f"--window {level:g},{width:g}")
    if normalise != "auto":
        kinds, reasons = [normalise] * count, [f"--normalise {normalise}"]
    else:
        kinds, reasons = _guess(count, modalities, measured)
    if "rgb" in kinds and count != 3:
        raise UserError(f"--normalise rgb needs images with three channels, got {count}")
    channels = tuple(_fit(kind, c, measured) for c, kind in enumerate(kinds))
    return Intensity(channels, "; ".join(dict.fromkeys(reasons)))


def _guess(count: int, modalities: Sequence[str], measured: Sequence[Measured]) -> tuple[list[str], list[str]]:
    if count == 3 and all(m.eight_bits for m in measured):
        return ["rgb"] * 3, ["auto: three channels of 8 bits"]
    kinds, reasons = [], []
    for c in range(count):
        word = modalities[c].strip().lower() if c < len(modalities) else ""
        ct = sum(m.hounsfield[c] for m in measured)
        if word == "ct" and any(m.foreground is not None and m.foreground.size for m in measured):
            kinds.append("ct")
            reasons.append("auto: dataset.json says CT")
        elif word == "nonorm":
            kinds.append("none")
            reasons.append("auto: dataset.json says noNorm")
        elif word == "zscore":
            kinds.append("zscore")
            reasons.append("auto: dataset.json says zscore")
        elif 2 * ct > len(measured):
            kinds.append("ct")
            reasons.append(f"auto: whole numbers that reach below {HOUNSFIELD:g}, as Hounsfield units do")
        else:
            kinds.append("percentile")
            reasons.append("auto: neither CT nor 8-bit RGB, so each volume is normalised by itself")
    return kinds, reasons


def _fit(kind: str, c: int, measured: Sequence[Measured]) -> Channel:
    if kind == "rgb":
        mean, std = RGB_MEAN[c] * 255, RGB_STD[c] * 255
        return Channel("rgb", 0.0, 255.0, mean, std)
    if kind != "ct":
        return Channel(kind)
    samples = [m.foreground[c] for m in measured if m.foreground is not None and m.foreground.size]
    if not samples:
        raise UserError("--normalise ct needs labelled foreground, but no labelled volume has any; use --window")
    values = np.concatenate(samples).astype(np.float64)
    body = values[values >= AIR]
    values = body if len(body) else values
    low, high = (float(x) for x in np.percentile(values, [0.5, 99.5]))
    std = float(values.std())
    if not low < high or std <= 0:
        raise UserError(
            f"--normalise ct: the labelled foreground has only one value, {low:g}; use --window, or --normalise "
            "percentile"
        )
    return Channel("ct", low, high, float(values.mean()), std)


def constant_channels(low: Sequence[float], high: Sequence[float]) -> dict[int, float]:
    """The only value of each channel whose smallest and largest value are equal: the network sees nothing in it."""
    return {c: least for c, (least, most) in enumerate(zip(low, high)) if least == most}


def describe_constant(found: Mapping[int, float], channels: int) -> str:
    """A message about constant channels; empty if there are none.

    Args:
        found: what :func:`constant_channels` found.
        channels: of the image.
    """
    if not found:
        return ""
    values = ", ".join(f"{value:g}" for value in dict.fromkeys(found.values()))
    if len(found) == channels:
        return f"is a constant image: every voxel is {values}"
    which = ", ".join(map(str, found))
    return f"channel {which} is constant: every voxel is {values}"


FEW = 8  # values; a scanner gives more, and a label seldom has as many
CHUNK = 1 << 20  # voxels whose values are looked at together


def few_values(image: np.ndarray) -> int:
    """The number of different values of an image if there are two to :data:`FEW`; 0 if there are more, or one."""
    flat = image.reshape(-1)
    found: set[float] = set()
    # First a sample of all of it: nearly every image has more values there.
    for part in (flat[:: -(-flat.size // CHUNK)], *(flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))):
        found.update(np.unique(part).tolist())
        if len(found) > FEW:
            return 0
    return len(found) if len(found) > 1 else 0


def describe_few(values: int) -> str:
    """A message about the number that :func:`few_values` gives; empty for 0."""
    return f"has only {values} different values; is it a label?" if values else ""


SAMPLES = 100_000  # largest number of foreground voxels of a volume that are kept to measure percentiles


def measure(data: np.ndarray, dtype: np.dtype, foreground: np.ndarray | None) -> Measured:
    """Measures the intensities of a volume.

    Args:
        data: (C, X, Y, Z) float32.
        dtype: of the file.
        foreground: (X, Y, Z) bool, if it is known.
    """
    flat = data.reshape(len(data), -1)
    low, high = flat.min(axis=1), flat.max(axis=1)
    # A file of whole numbers may hold fractions, by the slope in its header.
    whole = [bool((channel == np.rint(channel)).all()) for channel in flat]
    sample = None
    if foreground is not None:
        inside = np.flatnonzero(foreground)
        sample = flat[:, inside[:: max(1, -(-len(inside) // SAMPLES))]]
    eight_bits = dtype == np.uint8 and all(whole) and bool(low.min() >= 0 and high.max() <= 255)
    return Measured(tuple(float(v) for v in low), tuple(float(v) for v in high), tuple(whole), eight_bits, sample)
