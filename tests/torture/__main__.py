"""``python -m tests.torture``: kills, turned bits and bad inputs; prints what came of them.

python -m tests.torture --kills 50 --flips 200 --seed 0 --output docs/reliability.md
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
import sys
import tempfile
from pathlib import Path

from tests.torture import bad_inputs, flips, kills
from tests.torture.tally import Tally

MARKS = ("<!-- torture -->", "<!-- end -->")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of one process, and half as many of two ranks")
    parser.add_argument("--flips", type=int, default=200, help="bits turned in each kind of file")
    parser.add_argument("--inputs", type=int, default=-1, help="bad inputs, drawn; -1: all")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--output", type=Path, help="page whose table is written anew")
    chosen = parser.parse_args()
    tallies = run(chosen.kills, chosen.flips, chosen.inputs, chosen.seed)
    faults = [f"{tally.name}: {fault}" for tally in tallies for fault in tally.faults]
    table = "\n".join(["| attack | outcomes | faults |", "| --- | --- | ---: |", *(tally.row() for tally in tallies)])
    print(table)
    for fault in faults:
        print(f"FAULT {fault}")
    if chosen.output:
        day = datetime.date.today().isoformat()
        made = f"`python -m tests.torture --kills {chosen.kills} --flips {chosen.flips} --seed {chosen.seed}`"
        replace_table(
            chosen.output, f"{made}, {day}, {platform.machine()}, Python {platform.python_version()}:\n\n{table}"
        )
    return 1 if faults else 0


def run(kill_count: int, flip_count: int, input_count: int, seed: int) -> list[Tally]:
    tallies: list[Tally] = []

    def attack(name: str) -> tuple[Tally, Path, random.Random]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        tallies.append(Tally(name))
        return tallies[-1], Path(tempfile.mkdtemp(dir=top)), random.Random(f"{seed} {name}")

    with tempfile.TemporaryDirectory(prefix="torture-") as top:
        for ranks, count in ((1, kill_count), (2, (kill_count + 1) // 2)):
            tally, folder, draw = attack(f"kill -9 in a training, {ranks} process{'es' if ranks > 1 else ''}")
            kills.kill_and_resume(tally, folder, count, ranks, draw)
        tally, folder, draw = attack("a bit turned in a compressed image")
        flips.flip_volumes(tally, folder, flip_count, draw)
        tally, folder, draw = attack("a bit turned in a run's files, then resumed")
        flips.flip_run_files(tally, folder, flip_count // 4, draw)
        tally, folder, draw = attack("a bit turned in a model, then used")
        flips.flip_models(tally, folder, flip_count // 4, draw)
        tally, folder, draw = attack("bad volumes, folders, options and runs")
        bad_inputs.attack_inputs(tally, folder, draw, input_count)
    return tallies


def replace_table(page: Path, text: str) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
