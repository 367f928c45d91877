"""The sizes and directions of voxels that a network was trained on, and whether those of another image differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pglcl.config import TrainConfig
from pglcl.formats import Source, nifti
from pglcl.prepare import resized_for
from pglcl.volumes import canonical_shape, canonical_spacing

CLEARLY = 1.5  # factor; training itself changes sizes by --scaling, 0.15


@dataclass(frozen=True)
class Resolution:
    """The sizes of voxels of training images, as the network sees them: after `--slices whole` or `--spacing`.

    least, most: mm along each axis of the network; empty where no file says how large its voxels are. units: those of
    the files, sorted: mm, pixel or voxel. directed: whether every file says which way its axes point; None: no NIfTI
    file, or not recorded.
    """

    least: tuple[float, ...]
    most: tuple[float, ...]
    units: tuple[str, ...]
    directed: bool | None = None

    @classmethod
    def of(cls, sources: Iterable[Source], config: TrainConfig, slice_axis: int | None) -> Resolution:
        """The resolution of some images, prepared with these options."""
        sources = list(sources)
        units = tuple(sorted({source.unit for source in sources}))
        sizes = [sizes_seen(source, config, slice_axis) for source in sources if source.unit == "mm"]
        scans = [source for source in sources if source.reader == "nifti"]
        directed = all(map(nifti.says_orientation, scans)) if scans else None
        if not sizes:
            return cls((), (), units, directed)
        least, most = (tuple(float(size) for size in f(sizes, axis=0)) for f in (np.min, np.max))
        return cls(least, most, units, directed)

    def problem(self, source: Source, config: TrainConfig, slice_axis: int | None) -> str:
        """A message if an image clearly differs; empty if it does not. Sizes in pixels are not compared."""
        if source.unit not in self.units and "mm" in (source.unit, *self.units):
            says = "says how large its voxels are" if source.unit == "mm" else "does not say how large its voxels are"
            return f"{says}, unlike the training images"
        if source.unit != "mm":
            return ""
        sizes = sizes_seen(source, config, slice_axis)
        if all(a / CLEARLY <= size <= b * CLEARLY for size, a, b in zip(sizes, self.least, self.most)):
            return ""
        return f"its voxels are {_times(sizes)} mm as the network sees them, in the training {self.describe()}"

    def other_sizes(self, other: Resolution) -> str:
        """A message if, along an axis, all sizes clearly differ from those of another training; else empty."""
        apart = any(
            a > d * CLEARLY or b < c / CLEARLY for a, b, c, d in zip(self.least, self.most, other.least, other.most)
        )
        return f"voxels are {self.describe()} as the network sees them, in that run {other.describe()}" if apart else ""

    def direction_problem(self, source: Source) -> str:
        """A message if a file does not say which way its axes point, as those of the training do; else empty."""
        if not self.directed or source.reader != "nifti" or nifti.says_orientation(source):
            return ""
        return (
            "does not say which way its axes point, unlike the training images (sform, qform code 0). They are taken "
            "to point left, anterior and superior"
        )

    @property
    def spread(self) -> float:
        """The largest quotient of two sizes along one axis; 1 without sizes."""
        return max((b / a for a, b in zip(self.least, self.most)), default=1.0)

    def describe(self) -> str:
        if not self.least:
            return "of unknown size"
        return f"{_times(self.least)}" + ("" if self.spread < 1.005 else f" to {_times(self.most)}") + " mm"

    def state(self) -> dict[str, Any]:
        """Plain lists, for JSON and checkpoints; :meth:`from_state` reads them back."""
        return {
            "least": list(self.least),
            "most": list(self.most),
            "units": list(self.units),
            "directed": self.directed,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Resolution:
        least, most = (tuple(float(size) for size in state[name]) for name in ("least", "most"))
        return cls(least, most, tuple(str(unit) for unit in state["units"]), state.get("directed"))


def sizes_seen(source: Source, config: TrainConfig, slice_axis: int | None) -> tuple[float, ...]:
    """The size of a voxel along each axis of the network, in the unit of the file; without the slice axis."""
    shape, spacing = canonical_shape(source), canonical_spacing(source)
    resized = resized_for(config, shape, spacing, slice_axis)
    sizes = [extent * size / now for extent, size, now in zip(shape, spacing, resized)]
    return tuple(size for axis, size in enumerate(sizes) if axis != slice_axis)


def _times(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:.3g}" for size in sizes)
