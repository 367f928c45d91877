"""Values of label files that are probably not classes: two conventions for the same classes, or smoothed edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

WHITE = (255, 65535)  # the value of the last class where classes are spread over 8 or 16 bits
APART = 4  # factor between the largest value of one convention and the smallest of the other
LARGER = 10  # factor between the largest values of both
MANY = 5  # foreground values from which rare ones are looked at
RARE = 0.05  # share of the foreground that the rarer half of the values has, where they come from smoothed edges
SHOWN = 3  # files that a message names


@dataclass(frozen=True)
class Conventions:
    """Two groups of label files. Their foreground values differ, and no file has values of both groups.

    small, large: values of each group. with_small, with_large: its files. certain: `large` is `small` spread over 8 or
    16 bits, as programs do that save masks as pictures.
    """

    small: tuple[int, ...]
    large: tuple[int, ...]
    with_small: tuple[Path, ...]
    with_large: tuple[Path, ...]
    certain: bool

    def describe(self) -> str:
        """A line with the values, the files, and the options that settle what the values mean."""
        small, large = ((values, files) for values, files in self._sides())
        words = [f"{_listed(values)} in {_named(files)}" for values, files in (small, large)]
        kept = ",".join(map(str, (0, *self.small, *self.large)))
        joined = "joins values of one class with +"
        if len(self.small) == len(self.large):
            pairs = ",".join(f"{a}+{b}" for a, b in zip(self.small, self.large))
            joined = f"0,{pairs} makes them the same classes"
        return (
            f"label values {words[0]}, but {words[1]}, and no file has both: {self._judgement()}; --labels {joined}, "
            f"--labels {kept} keeps them apart"
        )

    def _sides(self) -> tuple[tuple[tuple[int, ...], tuple[Path, ...]], ...]:
        return (self.small, self.with_small), (self.large, self.with_large)

    def _judgement(self) -> str:
        if self.certain:
            return "the same classes in two conventions"
        return "if these are the same classes in two conventions, they count as different classes"


def two_conventions(files: Mapping[Path, Iterable[int]]) -> Conventions | None:
    """Two conventions in a set of label files, or None.

    Values that no file has together are not suspicious by themselves: an organ may be absent. They are if they are also
    much larger, as 255 is beside 1, or 128 and 255 beside 1 and 2. Numbers from 1 on without a gap never are.

    Args:
        files: the values in each label file.
    """
    groups = _groups(files)
    values = sorted(value for group, _ in groups for value in group)
    if len(groups) < 2 or values == list(range(1, len(values) + 1)):
        return None
    for cut in range(1, len(groups)):
        small, large = (
            tuple(sorted(value for group, _ in side for value in group)) for side in (groups[:cut], groups[cut:])
        )
        certain = _is_spread(small, large)
        if certain or (large[0] >= APART * small[-1] and large[-1] >= LARGER * small[-1]):
            with_small, with_large = (
                tuple(sorted(path for _, paths in side for path in paths)) for side in (groups[:cut], groups[cut:])
            )
            return Conventions(small, large, with_small, with_large, certain)
    return None


def _groups(files: Mapping[Path, Iterable[int]]) -> list[tuple[set[int], list[Path]]]:
    """Groups of foreground values, each with the files that have them.

    The values of one file are in one group. The group of the smallest values comes first.
    """
    groups: list[tuple[set[int], list[Path]]] = []
    for path, found in files.items():
        values, paths = {value for value in found if value > 0}, [path]
        if not values:
            continue
        for group in [group for group in groups if group[0] & values]:
            groups.remove(group)
            values, paths = values | group[0], paths + group[1]
        groups.append((values, paths))
    return sorted(groups, key=lambda group: max(group[0]))


def _is_spread(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Whether `small` are the numbers 1 to n, and `large` the same classes spread up to the value of white."""
    n = len(small)
    if small != tuple(range(1, n + 1)) or len(large) != n:
        return False
    return any(
        large[-1] == white and all(abs(value - white * k / n) <= 1 for k, value in zip(small, large)) for white in WHITE
    )


def smoothed_edges(voxels: Mapping[int, int]) -> str:
    """A line about many rare values between few frequent ones, or nothing.

    Interpolated masks, and masks that were once stored as JPEG, have such values at the edges of objects.

    Args:
        voxels: of each value, in all label files together.
    """
    foreground = {value: n for value, n in voxels.items() if value > 0}
    numbered = sorted(foreground) == list(range(1, len(foreground) + 1)) and len(foreground) < WHITE[0] - 1
    if len(foreground) < MANY or numbered:
        return ""
    rarer = sorted(foreground.values())[: (len(foreground) + 1) // 2]
    share = sum(rarer) / sum(foreground.values())
    if share > RARE:
        return ""
    return (
        f"the label files have {len(foreground)} values besides 0, each a class of its own, and {len(rarer)} of them "
        f"together have {share:.2%} of the labelled voxels: if masks were interpolated or stored as JPEG, these are no "
        "classes; --labels 0-127,128-255 joins ranges of values"
    )


def unusual_background(voxels: Mapping[int, int]) -> str:
    """A line about label files without a voxel of value 0, or nothing. Arguments as for :func:`smoothed_edges`."""
    if not voxels or 0 in voxels:
        return ""
    some = ",".join(map(str, sorted(voxels)[:4]))
    return (
        "no label file has the value 0, which counts as the background, so every voxel is of some class; if another "
        f"value is the background, --labels begins with it, for example --labels {some}"
    )


def maybe_ignored(voxels: Mapping[int, int]) -> str:
    """A line about the value 255 beside classes numbered from 1 on, or nothing. Arguments as above."""
    values = sorted(value for value in voxels if value > 0)
    if len(values) < 2 or values[-1] != WHITE[0] or values[:-1] != list(range(1, len(values))):
        return ""
    kept = ",".join(map(str, (0, *values[:-1])))
    return (
        f"the value 255 beside {_listed(tuple(values[:-1]))} counts as a class; if it marks voxels to be left out, "
        f"--labels {kept},255=ignore says so"
    )


def _listed(values: tuple[int, ...]) -> str:
    some = ", ".join(map(str, values[:8]))
    return some + (f", ... ({len(values)})" if len(values) > 8 else "")


def _named(files: tuple[Path, ...]) -> str:
    some = ", ".join(str(path) for path in files[:SHOWN]) + (", ..." if len(files) > SHOWN else "")
    return f"{len(files)} file{'s' * (len(files) != 1)} ({some})"
