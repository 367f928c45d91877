"""Progress on a terminal; a line now and then where there is none."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import rich.progress
from rich.console import Console
from rich.table import Table


class Progress:
    """Step, losses, validation Dice and the time left.

    Args:
        steps: of the run.
        quiet: nothing at all (ranks other than the first).
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

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start(self, first: int, text: str) -> None:
        self.say(text)
        self.task = self.bar.add_task("training", total=self.steps, completed=first, numbers="")
        self.bar.start()

    def step(self, done: int, losses: dict[str, float]) -> None:
        if self.task is not None:
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            numbers += "" if math.isnan(self.dice) else f"  Dice {self.dice:.3f}"
            self.bar.update(self.task, completed=done, numbers=numbers)

    def validated(self, done: int, dice: float) -> None:
        self.dice = dice
        if not math.isnan(dice):
            self.say(f"step {done}: validation Dice {dice:.4f}")

    def stop(self) -> None:
        self.bar.stop()

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print_table(self.console, title, head, rows)


def print_table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
