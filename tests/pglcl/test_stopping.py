"""Requests to stop. test_train has tests of what a training does with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pglcl import stopping

from tests.conftest import ROOT


def test_an_interrupt_that_a_library_swallows_stops_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that catches every exception takes Ctrl-C with it."""
    monkeypatch.setattr(stopping, "_interrupts", [])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopping.remember_interrupts()
        assert not stopping.StopRequest().asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stopping.StopRequest().asked
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_requests_are_interrupts_too(number: signal.Signals, rank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may wait for another one in C++, where no handler of Python runs."""
    monkeypatch.setattr(stopping, "_interrupts", [])
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", "0")
    three = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)}
    three[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopping.remember_interrupts()
        assert (signal.getsignal(number) is signal.SIG_DFL) == rank
        if not rank:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        stopping.forget_interrupts()
        assert signal.getsignal(number) is signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        for n, handler in three.items():
            signal.signal(n, handler)


STOPPED_WHILE_WRITING = """
import signal, sys
from pathlib import Path
from pglcl import __main__, cli
from pglcl.files import replacing

def write():
    with replacing(Path(sys.argv[1])) as partial:
        partial.write_text("half")
        {stop}

cli.main = write
sys.exit(__main__.main())
"""


@pytest.mark.parametrize(
    "stop", ["signal.raise_signal(signal.SIGTERM)", "signal.raise_signal(signal.SIGHUP)", "import greedy"]
)
def test_a_stopped_command_leaves_no_part_of_a_file(stop: str, tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\n")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have left it ignored
    folder = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-c", STOPPED_WHILE_WRITING.format(stop=stop), folder / "mask"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (130, "pglcl: stopped\n")
    assert list(folder.iterdir()) == []


def test_a_hang_up_that_comes_twice_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell of a closed terminal sends SIGHUP, and so does the system."""
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with stopping.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        now += 0.9
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        now += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_is_swallowed_between_the_request_and_its_block_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopping, "_interrupts", [])
    stop = stopping.StopRequest()
    stopping._interrupts.append(signal.SIGINT)
    with stop:
        assert stop.asked


def test_a_request_that_comes_while_the_parent_is_looked_at_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled() -> bool:
        signal.raise_signal(signal.SIGTERM)
        return False

    monkeypatch.setattr("pglcl.launcher.parent_has_ended", signalled)
    with stopping.StopRequest() as stop:
        stop.look_at_parent()
        assert stop.asked


def test_an_ignored_interrupt_stays_ignored() -> None:
    """Shells start background jobs with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stopping.remember_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("closed", ["", "2>&-"])
def test_ctrl_c_during_an_import_ends_the_process_at_once(closed: str, tmp_path: Path) -> None:
    """A library that is being imported may catch the exception, and C++ code of its own may abort."""
    (tmp_path / "greedy.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    print('caught')\n"
    )
    program = "from pglcl.stopping import remember_interrupts as r; r(); import greedy; print('went on')"
    result = subprocess.run(
        f'"{sys.executable}" -c "{program}" {closed}',
        shell=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == ("" if closed else "pglcl: stopped\n")


def test_hardly_anything_is_imported_before_ctrl_c_is_handled() -> None:
    """Until then, Ctrl-C prints a traceback."""
    program = "import sys; before = set(sys.modules); import pglcl.stopping; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT / "python", capture_output=True, text=True)
    assert not {"socket", "subprocess", "json", "typer", "torch"} & set(result.stdout.split())
    assert "pglcl.stopping" in result.stdout
