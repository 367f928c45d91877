"""The meanings of channels and classes in a data folder. A model keeps them to compare other folders with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pglcl.layouts import DataFolder


@dataclass(frozen=True)
class Description:
    """The names of a folder's channels and classes, from dataset.json or from the columns of a list.

    channels: the names, in the order of the channels. classes: the label values of each name. Both are empty where the
    folder does not name them.
    """

    channels: tuple[str, ...] = ()
    classes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataFolder) -> Description:
        """The description of a data folder."""
        labels = data.labels
        return cls(data.columns or data.modalities, {} if labels is None else dict(zip(labels.names, labels.values)))

    def contradictions(self, other: Description) -> list[str]:
        """A line for each name that means another channel or class in `other`.

        Different names alone are no contradiction, since there are many for one thing.
        """
        lines = []
        if _places_differ(self.channels, other.channels):
            lines.append(f"channels are {', '.join(other.channels)}, in the training {', '.join(self.channels)}")
        theirs = {name.casefold(): values for name, values in other.classes.items()}
        for name, values in self.classes.items():
            now = theirs.get(name.casefold(), values)
            if not set(now) & set(values):
                lines.append(f"the class {name!r} has the value {_listed(now)}, in the training {_listed(values)}")
        return lines

    def state(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON and checkpoints; :meth:`from_state` reads them back."""
        return {"channels": list(self.channels), "classes": {k: list(v) for k, v in self.classes.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Description:
        classes = {str(name): tuple(int(v) for v in values) for name, values in state["classes"].items()}
        return cls(tuple(str(name) for name in state["channels"]), classes)


def _places_differ(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether a name stands at different places of two lists."""
    a, b = ([name.strip().casefold() for name in names] for names in (first, second))
    return any(name in b and b.index(name) != a.index(name) for name in a)


def _listed(values: Sequence[int]) -> str:
    return "+".join(map(str, values))
