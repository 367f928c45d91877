"""Progress on a terminal; without one, a line every few seconds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence

import rich.progress
from rich.console import Console
from rich.table import Table

LINE_EVERY = 15.0  # seconds between lines of progress where there is no terminal


def duration(seconds: float) -> str:
    """A time for people: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Lines:
    """Says when the next line is due."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self.last < LINE_EVERY:
            return False
        self.last = now
        return True

    def left(self, share: float) -> float:
        """Seconds that are left, at the speed so far."""
        return (time.monotonic() - self.start) * (1 - share) / share if share > 0 else math.inf


class Progress:
    """Shows step, losses, validation Dice and the time left.

    Args:
        steps: of the run.
        quiet: show nothing, as on ranks other than the first.
    """

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.live = not quiet and sys.stderr.isatty()
        self.steps = steps
        self.dice = math.nan
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.task: rich.progress.TaskID | None = None
        self.first = 0
        self.lines = _Lines()

    def print_line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start(self, first: int, text: str) -> None:
        self.print_line(text)
        self.first, self.lines = first, _Lines()
        self.task = self.bar.add_task("training", total=self.steps, completed=first, numbers="")
        self.bar.start()

    def step(self, done: int, losses: dict[str, float]) -> None:
        if self.task is not None:
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            numbers += "" if math.isnan(self.dice) else f"  Dice {self.dice:.3f}"
            self.bar.update(self.task, completed=done, numbers=numbers)
            if not self.live and self.lines.due():
                left = duration(self.lines.left((done - self.first) / max(1, self.steps - self.first)))
                self.print_line(f"step {done} of {self.steps}  {numbers}  {left} left")

    def validated(self, done: int, dice: float) -> None:
        self.dice = dice
        if not math.isnan(dice):
            self.print_line(f"step {done}: validation Dice {dice:.4f}")

    def stop(self) -> None:
        self.bar.stop()

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print_table(self.console, title, head, rows)


class Volumes:
    """Shows progress over volumes, and within each.

    Args:
        what: the word for it, such as "predicting".
        count: number of volumes.
        quiet: show nothing.
    """

    def __init__(self, what: str, count: int, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False)
        self.what, self.count, self.done = what, count, 0
        self.live = not quiet and sys.stderr.isatty()
        self.lines = _Lines()
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
            transient=True,
        )
        self.task = self.bar.add_task(what, total=max(1, count))

    def __enter__(self) -> Volumes:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, name: str) -> Callable[[float], None]:
        """Begins the next volume. Returns a function to call with the share of it that is done, 0 to 1."""
        before, self.done = self.done, self.done + 1

        def report(share: float) -> None:
            self.bar.update(self.task, completed=before + share, description=f"{self.what} {name}")
            if not self.live and self.lines.due():
                self.console.print(f"{self.what} {name}, {before + 1} of {self.count}: {share:.0%}")

        report(0.0)
        return report


def print_table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
