"""Runs tests against planted faults: for each fault, the tests that reach it run until one fails.

pytest collects the tests once. Forked processes run all of them without a fault, and record for each its time and the
faults that it reaches. Then each fault gets a forked process, in which it is switched on. First come the tests that
noticed this fault before, or others in its function; then one of each kind, the quickest first, and so on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from tests.simt import emulator

SLOWER = 20.0  # a fault is noticed if a test takes this many times its usual time and SECONDS more
SECONDS = 3.0
MEMORY = 12 << 30  # bytes that a test may allocate beyond those of the process


@dataclass(frozen=True)
class Measured:
    """One test without a fault: its processor time in seconds, and the numbers of the faults that it reaches."""

    test: str
    seconds: float
    reached: frozenset[int]


@dataclass(frozen=True)
class Result:
    """The result of a fault.

    Attributes:
        fault: its number.
        killer: the test that failed; "" if none did.
        how: "failed", "stopped" (the process crashed, or took far too long), "survived" or "not reached".
        seconds: of its process.
    """

    fault: int
    killer: str
    how: str
    seconds: float

    @property
    def killed(self) -> bool:
        return bool(self.killer)


class Stopped(Exception):
    """The tests fail without a fault."""


def passes(item: pytest.Item) -> bool:
    """Runs one test, with its fixtures."""
    return all(not report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def forked(work: Callable[[Path], None]) -> tuple[int, Path]:
    """Starts `work` in a forked process without output. It gets the path of a file for its result."""
    handle, name = tempfile.mkstemp(prefix="pglcl_fault_")
    os.close(handle)
    process = os.fork()
    if process:
        return process, Path(name)
    faulthandler.disable()  # it keeps its own copy of stderr
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    code = 1
    with contextlib.suppress(BaseException):
        work(Path(name))
        code = 0
    os._exit(code)


def measure(items: list[pytest.Item], faults: int, processes: int) -> list[Measured]:
    """Measures every test without a fault, in forked processes: after a backward pass, a process cannot be forked."""

    def work(share: list[pytest.Item], to: Path) -> None:
        found = []
        for item in share:
            emulator.take_reached(faults + 1)
            began = time.process_time()
            passed = passes(item)
            seconds = time.process_time() - began
            found.append((passed, Measured(item.nodeid, seconds, frozenset(emulator.take_reached(faults + 1)))))
        to.write_bytes(pickle.dumps((found, list(sys.modules))))

    shares = [items[first::processes] for first in range(processes)]
    made = [forked(functools.partial(work, share)) for share in shares]
    by_test: dict[str, tuple[bool, Measured]] = {}
    for process, path in made:
        _, status = os.waitpid(process, 0)
        if status != 0:
            raise Stopped(f"the tests end with status {status} without a fault")
        found, modules = pickle.loads(path.read_bytes())
        path.unlink()
        by_test.update({measured.test: (passed, measured) for passed, measured in found})
        for module in modules:  # imported before the fork, so that no forked process has to
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    failed = [test for test, (passed, _) in by_test.items() if not passed]
    if failed:
        raise Stopped(f"{len(failed)} tests fail without a fault: {', '.join(failed[:5])}")
    return [by_test[item.nodeid][1] for item in items]


def measured_once(
    items: list[pytest.Item], faults: int, processes: int, cache: Callable[[str], Path]
) -> list[Measured]:
    """As `measure`, or the result of an earlier run. `cache` gives the path for a test file's result.

    The path depends on everything that the result depends on.
    """
    found: dict[str, Measured] = {}
    files = {item.nodeid.split("::")[0] for item in items}
    for place in map(cache, files):
        if place.exists():
            found.update({measured.test: measured for measured in pickle.loads(place.read_bytes())})
    unknown = [item for item in items if item.nodeid not in found]
    if unknown:
        found.update({measured.test: measured for measured in measure(unknown, faults, processes)})
    for file in files:
        place = cache(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pickle.dumps([m for m in found.values() if m.test.split("::")[0] == file]))
    return [found[item.nodeid] for item in items]


Test = tuple[pytest.Item, Measured]


def one_of_each(tests: Sequence[Test]) -> list[Test]:
    """The tests in the order: the quickest of every function, the second of every function, and so on."""
    count: Counter[str] = Counter()
    rounds: dict[int, list[Test]] = defaultdict(list)
    for test in sorted(tests, key=lambda t: t[1].seconds):
        function = test[1].test.split("[")[0]
        rounds[count[function]].append(test)
        count[function] += 1
    return [test for number in sorted(rounds) for test in rounds[number]]


def within(tests: list[Test], seconds: float) -> list[Test]:
    """The first tests, at least one, that together take at most `seconds`."""
    total = 0.0
    chosen: list[Test] = []
    for test in tests:
        total += test[1].seconds
        if chosen and total > seconds:
            break
        chosen.append(test)
    return chosen


def run_with_fault(fault: int, tests: list[Test]) -> tuple[int, Path]:
    """Starts a process that runs the tests with a fault until one fails; it writes the number of the current one."""

    def work(to: Path) -> None:
        gc.disable()
        emulator.plant(fault)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for at, (item, measured) in enumerate(tests):
            to.write_text(str(at))
            signal.setitimer(signal.ITIMER_PROF, SLOWER * measured.seconds + SECONDS)  # its signal ends the process
            if not passes(item):
                raise Stopped
        to.write_text("all")

    return forked(work)


class Campaign:
    """A plugin of pytest that replaces its loop over the tests.

    Args:
        faults: the numbers of the faults to try, in order, each with the name of its group (file and function).
        most: the highest number of a fault.
        hints: for each group, how often each test noticed a fault in it.
        first: for each fault, the test to begin with: the one that noticed it last time.
        report: is called with each result.
        processes: the number of processes at the same time.
        patience: a fault gets tests that, without it, take at most this many seconds.
        cache: gives the path where the measured tests of a file are kept.
    """

    def __init__(
        self,
        faults: Sequence[tuple[int, str]],
        most: int,
        hints: dict[str, Counter[str]],
        first: dict[int, str],
        report: Callable[[Result], None],
        processes: int,
        patience: float,
        cache: Callable[[str], Path],
    ) -> None:
        self.faults, self.most, self.hints, self.first = faults, most, hints, first
        self.report, self.processes, self.patience, self.cache = report, processes, patience, cache
        self.error = ""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        try:
            measured = measured_once(session.items, self.most, self.processes, self.cache)
            tests = list(zip(session.items, measured, strict=True))
            seconds = sum(one.seconds for one in measured)
            print(f"{len(tests)} tests, {seconds:.0f} s without a fault", flush=True)
            gc.collect()
            gc.freeze()
            for result in self.results(one_of_each(tests)):
                self.report(result)
        except Stopped as error:
            self.error = str(error)
        return True

    def tests_of(self, fault: int, near: str, tests: list[Test]) -> list[Test]:
        """The tests that reach the fault, the most promising first."""
        hints = self.hints.get(near, Counter())

        def rank(test: Test) -> float:
            name = test[1].test
            return -float("inf") if name == self.first.get(fault) else -hints[name] / (0.05 + test[1].seconds)

        return within(sorted((t for t in tests if fault in t[1].reached), key=rank), self.patience)

    def results(self, tests: list[Test]) -> Iterator[Result]:
        waiting = list(self.faults)
        running: dict[int, tuple[int, str, Path, float, list[Test]]] = {}
        while waiting or running:
            while waiting and len(running) < self.processes:
                fault, near = waiting.pop(0)
                mine = self.tests_of(fault, near, tests)
                if not mine:
                    yield Result(fault, "", "not reached", 0.0)
                    continue
                process, notes = run_with_fault(fault, mine)
                running[process] = (fault, near, notes, time.monotonic(), mine)
            if not running:
                continue
            process, status = os.waitpid(-1, 0)
            if process not in running:
                continue
            fault, near, notes, began, mine = running.pop(process)
            reached = notes.read_text()
            notes.unlink()
            seconds = time.monotonic() - began
            if status == 0 and reached == "all":
                yield Result(fault, "", "survived", seconds)
                continue
            how = "failed" if os.WIFEXITED(status) else "stopped"
            killer = mine[int(reached or 0)][1].test
            self.hints.setdefault(near, Counter())[killer] += 1
            yield Result(fault, killer, how, seconds)
