"""Counts the results of kills, flipped bits and bad inputs, and prints them.

python -m tests.torture --kills 50 --flips 200 --seed 0 --output docs/reliability.md
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.torture import bad_inputs, flips, kills
from tests.torture.tally import Tally

MARKS = ("<!-- torture -->", "<!-- end -->")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of one process, and half as many of two ranks")
    parser.add_argument("--flips", type=int, default=200, help="number of bits to flip in each kind of file")
    parser.add_argument("--inputs", type=int, default=-1, help="bad inputs, drawn; -1: all")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--only", default="", help="attacks whose name has this in it; the other rows of the page stay")
    parser.add_argument("--output", type=Path, help="page whose table is written anew")
    chosen = parser.parse_args()
    tallies = run(chosen.kills, chosen.flips, chosen.inputs, chosen.seed, chosen.only)
    faults = [f"{tally.name}: {fault}" for tally in tallies for fault in tally.faults]
    rows = [tally.row() for tally in tallies]
    print("\n".join(rows))
    for fault in faults:
        print(f"FAULT {fault}")
    if chosen.output and chosen.only:
        replace_rows(chosen.output, rows)
    elif chosen.output:
        table = "\n".join(["| attack | outcomes | faults |", "| --- | --- | ---: |", *rows])
        day = datetime.date.today().isoformat()
        made = f"`python -m tests.torture --kills {chosen.kills} --flips {chosen.flips} --seed {chosen.seed}`"
        replace_table(
            chosen.output, f"{made}, {day}, {platform.machine()}, Python {platform.python_version()}:\n\n{table}"
        )
    return 1 if faults else 0


def run(kill_count: int, flip_count: int, input_count: int, seed: int, only: str = "") -> list[Tally]:
    """Runs the attacks whose name contains `only`. Each has its own random numbers."""
    attacks: dict[str, Callable[[Tally, Path, random.Random], None]] = {
        "kill -9 in a training, 1 process": lambda t, f, d: kills.kill_and_resume(t, f, kill_count, 1, d),
        "kill -9 in a training, 2 processes": lambda t, f, d: kills.kill_and_resume(t, f, (kill_count + 1) // 2, 2, d),
        "a bit flipped in a compressed image": lambda t, f, d: flips.flip_volumes(t, f, flip_count, d),
        "a bit flipped in a run's files, then resumed": lambda t, f, d: flips.flip_run_files(t, f, flip_count // 4, d),
        "a bit flipped in a model, then used": lambda t, f, d: flips.flip_models(t, f, flip_count // 4, d),
        "bad volumes, folders, options and runs": lambda t, f, d: bad_inputs.attack_inputs(t, f, d, input_count),
    }
    tallies = []
    with tempfile.TemporaryDirectory(prefix="torture-") as top:
        for name, attack in attacks.items():
            if only in name:
                print(f"{name} ...", file=sys.stderr, flush=True)
                tallies.append(Tally(name))
                attack(tallies[-1], Path(tempfile.mkdtemp(dir=top)), random.Random(f"{seed} {name}"))
    return tallies


def replace_table(page: Path, text: str) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def replace_rows(page: Path, rows: list[str]) -> None:
    """Replaces the row of each attack in a page."""
    new = {row.split("|")[1]: row for row in rows}
    lines = [new.get(f"{line}||".split("|")[1], line) for line in page.read_text(encoding="utf-8").splitlines()]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
