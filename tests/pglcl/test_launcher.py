"""The launcher of several processes. test_train and test_ranks have tests of what the processes do."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from pglcl import launcher


@pytest.mark.parametrize("late", [1, 2])
def test_a_signal_while_the_processes_are_started_reaches_all_of_them(
    late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one that is just being started; no other one starts after it."""
    started: list[Process] = []

    class Process:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.returncode: int | None = None
            started.append(self)
            if len(started) == late:
                signal.raise_signal(signal.SIGTERM)

        def poll(self) -> int | None:
            return self.returncode

        def send_signal(self, number: int) -> None:
            self.returncode = -number

    monkeypatch.setattr(launcher.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        launcher.launch(2, ["train"])
    assert [process.returncode for process in started] == [-signal.SIGTERM] * late
