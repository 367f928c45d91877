"""Shared fixtures. Every test of an op runs on the CPU, and also on a GPU if one is visible."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from pglcl_ext import build_info

hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")

DEVICES = ["cpu"]
if torch.cuda.is_available() and build_info()["cuda_built"]:
    DEVICES.append("cuda")

ROOT = Path(__file__).parent.parent
# Seconds of processor time of each test, written by `pytest --measure`.
DURATIONS = Path(__file__).with_name("durations.json")
MEASURED: dict[str, float] = {}
LONGEST_FAST = 0.15  # seconds of the longest test that `make test-fast` runs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated",
        type=int,
        metavar="CAPABILITY",
        help="run the ops' CUDA code, host and device, on an emulated device of this compute capability (75, 80, 86, "
        "90) instead of the CPU's code; tests of the CPU's own code are left out",
    )
    parser.addoption("--draw", type=int, metavar="COUNT", help="run COUNT of the tests, drawn by --draw-seed")
    parser.addoption("--draw-seed", type=int, default=0, metavar="SEED")
    parser.addoption(
        "--measure",
        type=Path,
        metavar="FILE",
        help="write the processor time of each test that takes a tenth of a second to FILE, e.g. tests/durations.json, "
        "from which the marks of slow tests come; FILE keeps its times of tests that do not run",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # in a shell's background job; processes that tests start would ignore it, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--emulated") is not None:
        from tests.simt import emulator

        emulator.use(emulator.DEVICES[config.getoption("--emulated")])


ABOUT_THE_CPU = (
    "test_every_instruction_set",
    "test_same_bits_for_any_number_of_threads",
    "test_memory_is_linear",
    "test_sums_over_a_million_keys",
    "test_products_of_long_rows",
    "test_labels_beyond_the_classes_are_refused_on_the_cpu",
    "test_every_number_of_16_bits_is_read_as_it_is",
)


def _processor_seconds() -> float:
    """Seconds of this process and of its ended children. Other processes on the machine do not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = _processor_seconds()
    result = yield
    MEASURED[item.nodeid] = round(_processor_seconds() - before, 1)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    file: Path | None = session.config.getoption("--measure")
    if file is not None:
        known = json.loads(file.read_text()) if file.exists() else {}
        durations = {name: seconds for name, seconds in (known | MEASURED).items() if seconds >= 0.1}
        file.write_text(json.dumps(dict(sorted(durations.items())), indent=1) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    durations = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    for item in items:
        if durations.get(item.nodeid, 0.0) > LONGEST_FAST:
            item.add_marker(pytest.mark.slow)
    kept = list(items)
    if config.getoption("--emulated") is not None:
        kept = [item for item in kept if not item.name.startswith(ABOUT_THE_CPU)]
    if config.getoption("--draw") is not None:
        drawn = random.Random(config.getoption("--draw-seed")).sample(kept, min(config.getoption("--draw"), len(kept)))
        kept = [item for item in kept if item in drawn]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


# An emulated device takes a microsecond for each access of each thread. So the largest problems of the ops' tests are
# cut to this many rows, which are several tiles of every kernel but no multiple of a tile.
MOST_EMULATED_ROWS = 150


@pytest.fixture(autouse=True)
def _size_of_problems(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the random problems that tests share smaller on an emulated device. No other place does this."""
    if request.config.getoption("--emulated") is not None and request.path.parent == ROOT / "tests":
        from tests import problems

        monkeypatch.setattr(problems, "MOST_ROWS", MOST_EMULATED_ROWS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        emulated = metafunc.config.getoption("--emulated") is not None
        sets = build_info()["cpu_instruction_sets"]
        metafunc.parametrize("isa", sets[:1] if emulated else sets, indirect=True)


def data_folder() -> Path | None:
    """The folder of real volumes for tests that need them: PGLCL_DATA, or shared/data beside the repository."""
    for place in (os.environ.get("PGLCL_DATA"), ROOT.parent / "shared" / "data", ROOT / "shared" / "data"):
        if place and Path(place).is_dir():
            return Path(place)
    return None


def free_ports(count: int = 1) -> list[int]:
    """Ports of this machine on which no process listens."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set of the CPU's kernels in this test: each in turn that the processor has."""
    name: str = request.param
    monkeypatch.setenv("PGLCL_CPU_ISA", name)
    if build_info()["cpu_instruction_set"] != name:
        pytest.skip(f"this processor has no {name}")
    return name


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, only for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _memory(field: str) -> int:
    """Bytes of this process as Linux counts them: VmRSS, resident now, or VmHWM, their peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@pytest.fixture
def peak_growth() -> Callable[[Callable[[], None]], int]:
    """Measures by how many bytes this process grows at most while a function runs."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("needs Linux, which counts the peak of a process's memory")

    def measure(function: Callable[[], None]) -> int:
        reset.write_text("5")  # resets the peak
        before = _memory("VmRSS")
        function()
        return _memory("VmHWM") - before

    return measure
