"""Plants faults into the CUDA code and counts those that the tests notice: ``python -m tests.mutants [--draw 40]``.

All faults are compiled into one library for the emulated device. Each is switched on in its own process, in which the
tests that reach it run until one fails (campaign.py). The last line reads
``planted A, killed B, equivalent C, survivors D``; survivors are listed with file and line. Faults that are proved to
change nothing are in equivalent.txt.

The result of each fault is appended to build/mutants/results.jsonl. A run that was stopped continues from there, as
long as the CUDA code, the emulator and the test that noticed a fault are the same.

killed.txt lists the killed faults by a digest of their function and text: with this text, a test noticed them.
``--new`` tries only the other faults. It adds those that are killed, and removes those that are no longer planted. If
it is stopped, the next run continues.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import native
from tests.mutants import campaign, plant
from tests.mutants.plant import Fault
from tests.simt import emulator

HERE = Path(__file__).parent
KILLED = HERE / "killed.txt"
RESULTS = native.ROOT / "build" / "mutants" / "results.jsonl"
MOST_FAULTS = 4095  # kMostFaults of simt_device.h


def equivalents() -> dict[str, str]:
    """The reasons of the faults that change nothing, by their key, from equivalent.txt."""
    found: dict[str, str] = {}
    for number, line in enumerate((HERE / "equivalent.txt").read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        key, separator, reason = line.rpartition(" || ")
        if not separator or key in found:
            raise ValueError(f"equivalent.txt:{number}: expected one line `key || reason` for each fault, got {line!r}")
        found[key] = reason
    return found


def name_of(fault: Fault) -> str:
    """The name of a fault in killed.txt. It stays the same as long as function and text do."""
    return hashlib.sha256(fault.key.encode()).hexdigest()[:12]


def killed_before() -> set[str]:
    return set(KILLED.read_text().split()) if KILLED.exists() else set()


def keep_killed(names: set[str]) -> None:
    KILLED.write_text("".join(f"{name}\n" for name in sorted(names)))


def build(faults: list[Fault]) -> None:
    """Loads the emulated ops with these faults, in place of the CPU's ops."""
    folder = native.cache(f"mutants_{os.getpid()}") / "csrc"
    shutil.copytree(native.CSRC, folder)
    try:
        for path in plant.sources():
            name = str(path.relative_to(native.CSRC))
            (folder / name).write_text(plant.planted(path.read_text(), [f for f in faults if f.file == name]))
        emulator.load(folder)
    finally:
        shutil.rmtree(folder.parent)


@functools.cache
def digest(file: str) -> str:
    """A digest of the sources and the emulator, on which all results depend, and of a test's file."""
    inputs = [path for path in native.CSRC.rglob("*") if path.is_file() and path.parent.name not in ("cpu", "isa")]
    test = native.ROOT / file
    return native.digest([*inputs, *emulator.HEADERS, *([test] if test.is_file() else [])])


class Record:
    """results.jsonl, a line for each result. If a fault has several lines, the last one counts."""

    def __init__(self) -> None:
        self.killers: dict[str, str] = {}
        self.valid: set[str] = set()
        lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
        for line in lines:
            entry = json.loads(line)
            if entry["killer"]:
                self.killers[entry["key"]] = entry["killer"]
            same = entry["killer"] and entry["digest"] == digest(entry["killer"].split("::")[0])
            (self.valid.add if same else self.valid.discard)(entry["key"])

    def hints(self) -> dict[str, Counter[str]]:
        """The tests that noticed faults, by the function of the fault."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for key, killer in self.killers.items():
            found[" | ".join(key.split(" | ")[:2])][killer] += 1
        return found

    def add(self, fault: Fault, result: campaign.Result) -> None:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        entry = {"key": fault.key, "how": result.how, "killer": result.killer, "seconds": round(result.seconds, 2)}
        entry["digest"] = digest(result.killer.split("::")[0])
        with RESULTS.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def chosen(arguments: argparse.Namespace) -> list[Fault]:
    known = killed_before() if arguments.new else set()
    faults = [fault for fault in plant.plant() if arguments.only in f"{fault.file}:{fault.line} {fault.key}"]
    faults = [fault for fault in faults if name_of(fault) not in known]
    if arguments.draw is not None:
        drawn = random.Random(arguments.seed).sample(faults, min(arguments.draw, len(faults)))
        faults = sorted(drawn, key=lambda fault: fault.number)
    return faults


class Outcome:
    """Receives the result of each fault of a run: records it, prints survivors and keeps killed.txt.

    Args:
        faults: those of the run.
        record: gets every result.
        count: of faults to try.
        names: killed.txt is written with these and the faults that are killed now; None leaves it as it is.
    """

    def __init__(self, faults: list[Fault], record: Record, count: int, names: set[str] | None) -> None:
        self.by_number = {fault.number: fault for fault in faults}
        self.record, self.count, self.names = record, count, names
        self.alive: list[Fault] = []
        self.done = 0

    def __call__(self, result: campaign.Result) -> None:
        fault = self.by_number[result.fault]
        self.record.add(fault, result)
        self.done += 1
        if self.names is not None:
            (self.names.add if result.killed else self.names.discard)(name_of(fault))
            keep_killed(self.names)
        if not result.killed:
            self.alive.append(fault)
            print(f"{result.how.upper()} {fault.file}:{fault.line}\n  {fault.key}", flush=True)
        if self.done % 20 == 0:
            print(f"{self.done} of {self.count}", flush=True)


def run_tests(
    planted: list[Fault],
    todo: list[Fault],
    record: Record,
    report: Callable[[campaign.Result], None],
    arguments: argparse.Namespace,
) -> str:
    """Tries the faults `todo` in a build that holds `planted`. Returns why this ended early, or nothing."""
    build(planted)
    texts = [f"{fault.number} {fault.original} {fault.mutated}" for fault in planted]
    plugin = campaign.Campaign(
        [(fault.number, fault.near) for fault in todo],
        MOST_FAULTS,
        record.hints(),
        {fault.number: record.killers.get(fault.key, "") for fault in todo},
        report,
        arguments.processes,
        arguments.patience,
        lambda file: RESULTS.parent / f"measured_{native.digest([], digest(file), *texts)}.pickle",
    )
    plain = ["-o", "addopts=", "-s", "-p", "no:cacheprovider", "-p", "no:terminal", "-W", "ignore"]
    files = [file for file in emulator.TESTS if (native.ROOT / file).exists()]
    code = pytest.main([*plain, "--emulated", "80", "-k", arguments.tests, *files], plugins=[plugin])
    return plugin.error or ("" if code in (0, 5) else f"pytest ends with {code}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, help="so many faults, drawn by --seed; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--new", action="store_true", help="only faults that killed.txt does not have")
    parser.add_argument("--only", default="", help="faults whose file, line or key holds this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--patience", type=float, default=1e9, help="seconds of tests that a fault meets at most")
    parser.add_argument("--tests", default="", help="only these tests, as pytest -k has it: a first try, in less time")
    parser.add_argument("--afresh", action="store_true", help="try faults again that earlier runs have settled")
    parser.add_argument("--list", action="store_true", help="list the faults and stop")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    os.environ["OMP_NUM_THREADS"] = "1"  # a forked process does not get the threads of this one
    faults, proved, record = chosen(arguments), equivalents(), Record()
    if arguments.list:
        for fault in faults:
            print(f"{fault.number} {fault.file}:{fault.line} {fault.key}")
        return 0
    everything = plant.plant()
    assert len(everything) <= MOST_FAULTS
    stale = proved.keys() - {fault.key for fault in everything}
    if stale:
        print("equivalent.txt names faults that are no longer planted:", *sorted(stale), sep="\n  ")
    counted = [fault for fault in faults if fault.key not in proved]
    todo = [fault for fault in counted if arguments.afresh or fault.key not in record.valid]
    names = killed_before() & {name_of(fault) for fault in everything} if arguments.new else None
    outcome = Outcome(faults, record, len(todo), names)
    if todo:
        # A draw plants no other faults. Other runs may be stopped; they plant all, so that the next run need not build.
        planted = faults if arguments.draw is not None else everything
        if error := run_tests(planted, todo, record, outcome, arguments):
            print(error)
            return 2
    alive = outcome.alive
    killed = len(counted) - len(alive)
    print(f"planted {len(faults)}, killed {killed}, equivalent {len(faults) - len(counted)}, survivors {len(alive)}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
