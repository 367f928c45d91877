"""Translates the values of label files into classes, and classes back into values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pglcl.errors import UserError

IGNORE = -1  # the class of voxels that are left out of losses and scores
MOST_CLASSES = 256  # TotalSegmentator has 118; a file with more values is an image, not a label
MOST_VALUE = 2**31 - 1  # the largest absolute value of a label
WHOLE = 1e-3  # how far a label of a float file may lie from a whole number
SHOWN = 8  # values that a message lists


@dataclass(frozen=True)
class LabelMap:
    """Class k consists of the voxels whose value is in values[k]; class 0 is the background.

    values: of each class; masks get the first one. names: of each class. ignore: values of voxels that are left out.
    rest: the class of all other values; None: other values are an error.
    """

    values: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    ignore: tuple[int, ...] = ()
    rest: int | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def class_names(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    def encode(self, data: np.ndarray, path: Path) -> np.ndarray:
        """The classes of whole-numbered values, int8 (int16 from 128 classes on); :data:`IGNORE` where ignored.

        Args:
            data: values in an integer type, of any shape.
            path: the label file, for messages.

        Raises:
            UserError: values outside the map, each with its number of voxels.
        """
        table = {value: k for k, values in enumerate(self.values) for value in values}
        table.update(dict.fromkeys(self.ignore, IGNORE))
        counts = count_values(data)
        self.check(counts, path)
        classes = np.empty(data.shape, np.int8 if len(self) <= 127 else np.int16)
        found = np.array(list(counts), np.int64)
        to_class = np.array([table.get(value, self.rest) for value in counts], classes.dtype)
        for part in _parts(data):
            classes[part] = to_class[np.searchsorted(found, data[part])]
        return classes

    def check(self, counts: Mapping[int, int], path: Path) -> None:
        """Raises UserError for values outside the map; `counts`: voxels of each value of the file `path`."""
        known = {*self.ignore, *(value for values in self.values for value in values)}
        foreign = {value: n for value, n in counts.items() if value not in known}
        if foreign and self.rest is None:
            raise UserError(f"{path}: {_outside(foreign)}; labels are {self.describe()}")

    def class_counts(self, counts: Mapping[int, int]) -> list[int]:
        """Voxels of each class, from those of each value."""
        total = [sum(counts.get(value, 0) for value in values) for values in self.values]
        if self.rest is not None:
            known = {*self.ignore, *(value for values in self.values for value in values)}
            total[self.rest] += sum(n for value, n in counts.items() if value not in known)
        return total

    def decode(self, classes: np.ndarray) -> np.ndarray:
        """The values of classes, in :attr:`dtype`."""
        written: np.ndarray = np.array([values[0] for values in self.values], self.dtype)[classes]
        return written

    @property
    def dtype(self) -> np.dtype:
        """The type of masks: the smallest that holds all values, unsigned unless one is negative."""
        least, most = (f(values[0] for values in self.values) for f in (min, max))
        kinds = (np.uint8, np.uint16, np.uint32) if least >= 0 else (np.int16, np.int32)
        return np.dtype(next(k for k in kinds if np.iinfo(k).min <= least and most <= np.iinfo(k).max))

    def describe(self) -> str:
        """The map as `--labels` takes it."""
        parts = []
        for k, values in enumerate(self.values):
            text = "+".join([str(v) for v in values] + (["*"] if self.rest == k else []))
            parts.append(text + ("" if self.names[k] == default_name(k, values) else f"={self.names[k]}"))
        return ",".join(parts + [f"{v}=ignore" for v in self.ignore])

    def state(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON and checkpoints; :meth:`from_state` reads them back."""
        return {
            "values": [list(v) for v in self.values],
            "names": list(self.names),
            "ignore": list(self.ignore),
            "rest": self.rest,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LabelMap:
        values = tuple(tuple(int(v) for v in of_class) for of_class in state["values"])
        rest = state["rest"]
        names, ignore = tuple(map(str, state["names"])), tuple(int(v) for v in state["ignore"])
        return cls(values, names, ignore, None if rest is None else int(rest))

    @classmethod
    def of_values(
        cls, values: Iterable[int], names: Mapping[int, str] | None = None, ignore: Iterable[int] = ()
    ) -> LabelMap:
        """A class for each value: 0, the background, even if it is not among `values`; then the others, ascending."""
        ignore = tuple(sorted(set(ignore)))
        each = sorted({0, *values} - set(ignore), key=lambda value: (value != 0, value))
        names = names or {}
        singles = tuple((v,) for v in each)
        return cls(singles, tuple(names.get(v) or default_name(k, (v,)) for k, v in enumerate(each)), ignore)


def default_name(k: int, values: tuple[int, ...]) -> str:
    return "background" if k == 0 else f"label {'+'.join(map(str, values))}"


def _outside(foreign: Mapping[int, int]) -> str:
    words = [f"{value} in {count} voxel{'s' * (count != 1)}" for value, count in [*foreign.items()][:SHOWN]]
    more = [f"and {len(foreign) - SHOWN} other values"] if len(foreign) > SHOWN else []
    return f"has values that are not labels: {', '.join(words + more)}"


def parse_labels(text: str) -> LabelMap:
    """Reads `--labels`: classes separated by commas, background first; + joins values, - makes a range, = gives a name.

    `0,85=RV,170`; `0,1+2=kidney`; `0+*,10-14=lung` (every other value is background); `0,1,255=ignore`.

    Raises:
        UserError: anything else, a value or a name that occurs twice, or fewer than two classes.
    """
    values: list[tuple[int, ...]] = []
    names: list[str] = []
    ignore: list[int] = []
    rest: int | None = None
    seen: set[int] = set()
    for part in text.split(","):
        numbers, _, name = (piece.strip() for piece in part.partition("="))
        own: list[int] = []
        everything_else = False
        for piece in numbers.split("+"):
            run = re.fullmatch(r"(-?\d{1,9})(?:-(\d{1,9}))?", piece.strip())
            if piece.strip() == "*":
                everything_else = True
            elif run and (run[2] is None or 0 <= int(run[1]) < int(run[2]) <= int(run[1]) + 10_000):
                own += range(int(run[1]), int(run[2] or run[1]) + 1)
            else:
                raise UserError(
                    f"--labels must be like 0,85=RV,1+2=kidney,10-14=lung, got {part.strip()!r} in {text!r}"
                )
        twice = sorted({v for v in own if v in seen or own.count(v) > 1})
        if twice:
            raise UserError(f"--labels must not have a value twice, got {twice[0]} twice in {text!r}")
        seen.update(own)
        if name.lower() == "ignore":
            if everything_else:
                raise UserError(f"--labels cannot ignore all other values (*), got {text!r}")
            ignore += own
            continue
        if everything_else:
            if rest is not None or not own:
                raise UserError(
                    f"--labels may have one *, together with the value that masks get for it, as in 0+*, got {text!r}"
                )
            rest = len(values)
        values.append(tuple(own))
        names.append(name or default_name(len(values) - 1, values[-1]))
    if not 2 <= len(values) <= MOST_CLASSES:
        raise UserError(f"--labels must name from 2 to {MOST_CLASSES} classes, background first, got {text!r}")
    if len(set(names)) < len(names):
        raise UserError(f"--labels must not have a name twice, got {text!r}")
    return LabelMap(tuple(values), tuple(names), tuple(ignore), rest)


def whole_numbers(data: np.ndarray, path: Path) -> np.ndarray:
    """Label values as whole numbers, in an integer type. Floats may differ from whole numbers by :data:`WHOLE`.

    Raises:
        UserError: other values, which the message shows with all digits, or values beyond :data:`MOST_VALUE`.
    """
    if data.dtype.kind == "b":
        return data.astype(np.uint8)
    if data.dtype.kind in "iu":
        _check_size(max(int(data.max(initial=0)), -int(data.min(initial=0))), path)
        return data
    bad = ~np.isfinite(data)
    if bad.any():
        raise UserError(f"{path}: labels must be whole numbers, got {int(bad.sum())} voxels that are NaN or infinite")
    rounded = np.round(data)
    off = np.abs(data - rounded) > WHOLE
    if off.any():
        values, counts = np.unique(data[off], return_counts=True)
        words = [f"{float(v)!r} in {n} voxel{'s' if n > 1 else ''}" for v, n in zip(values[:4], counts[:4])]
        more = f" and {len(values) - 4} other values" if len(values) > 4 else ""
        raise UserError(f"{path}: labels must be whole numbers within {WHOLE:g}, got {', '.join(words)}{more}")
    _check_size(float(np.abs(rounded).max(initial=0)), path)
    return rounded.astype(np.int32)


def _check_size(most: float, path: Path) -> None:
    if most > MOST_VALUE:
        raise UserError(f"{path}: labels must be whole numbers below 2^31, got {most:.12g}")


def value_counts(data: np.ndarray, path: Path) -> dict[int, int]:
    """Voxels of each value of a label.

    Raises:
        UserError: more values than a label can have, so the file is probably an image.
    """
    counts = count_values(data)
    if len(counts) > MOST_CLASSES:
        some = ", ".join(map(str, [*counts][:SHOWN]))
        raise UserError(
            f"{path}: has {len(counts)} different values ({some}, ...), but a label has at most {MOST_CLASSES}; is it "
            "an image?"
        )
    return counts


def count_values(data: np.ndarray) -> dict[int, int]:
    """Voxels of each value of an integer array, sorted by value. It counts plane by plane, to save memory."""
    counts: dict[int, int] = {}
    for part in _parts(data):
        for value, n in zip(*np.unique(data[part], return_counts=True)):
            counts[int(value)] = counts.get(int(value), 0) + int(n)
    return dict(sorted(counts.items()))


def _parts(data: np.ndarray) -> list[tuple[slice | int, ...]]:
    """Indices of the planes of an array, across the axis of the largest stride: each plane is compact in memory."""
    if data.ndim < 3:
        return [(slice(None),) * data.ndim]
    axis = int(np.argmax(np.abs(data.strides)))
    before = (slice(None),) * axis
    return [(*before, index) for index in range(data.shape[axis])]
