"""The results of one kind of attack."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """The number of each outcome, and the faults with their causes."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def good(self, outcome: str) -> None:
        self.counts[outcome] += 1

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def row(self) -> str:
        seen = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
        return f"| {self.name} | {seen} | {len(self.faults)} |"
