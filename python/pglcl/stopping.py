"""Requests to stop a run, which then ends its step first."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from typing import Any

from pglcl.unfinished import remove_unfinished

STOPPED = 130  # exit code
SAME_REQUEST = 1.0  # seconds in which signals are one request
_interrupts: list[int] = []  # signals that came after `remember_interrupts`
_handled: set[int] = set()  # signals with the handler of `remember_interrupts`


def remember_interrupts() -> None:
    """From now on, Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, or end the process while modules are imported.

    A library that is being imported may catch the exception and go on, and one in C++ may abort. The exception is
    remembered, since a library may catch it later, too.

    A rank of a training keeps the usual meaning of SIGTERM and SIGHUP here: it may wait for another rank in C++, where
    no handler of Python would run.
    """

    def interrupt(number: int, frame: Any) -> None:
        if _is_importing(frame):
            remove_unfinished()
            with contextlib.suppress(OSError):
                os.write(2, b"pglcl: stopped\n")
            os._exit(STOPPED)
        _interrupts.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, *(() if "RANK" in os.environ else (signal.SIGTERM, signal.SIGHUP))):
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):  # nohup and shells ignore some
            signal.signal(number, interrupt)
            _handled.add(number)


def forget_interrupts() -> None:
    """From now on, these signals end the process at once: there, an exception would only be printed."""
    while _handled:
        signal.signal(_handled.pop(), signal.SIG_DFL)


def _is_importing(frame: Any) -> bool:
    """Whether a frame or one of its callers executes an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class StopRequest:
    """Notes the first Ctrl-C, SIGTERM or SIGHUP in the block. A later one raises KeyboardInterrupt at once.

    Signals within a second of the first are the same request: a terminal that is closed sends SIGHUP twice, once by its
    shell, and a rank may get a signal from the scheduler and from its launcher.

    Attributes:
        asked: whether a signal came in the block, or was caught by a library before it.
    """

    def __init__(self) -> None:
        self.asked = bool(_interrupts)
        self._since = math.inf  # the time of the first signal
        self._before: dict[int, Any] = {}

    def look_at_parent(self) -> None:
        """Counts the end of the process that launched this one as a request, too."""
        from pglcl.launcher import parent_has_ended  # late: this module is imported before Ctrl-C is handled

        if parent_has_ended():  # no assignment otherwise: it would undo a request that comes in this line
            self.asked = True

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if now - self._since > SAME_REQUEST:
            raise KeyboardInterrupt
        self._since = min(self._since, now)
        self.asked = True

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup
            with contextlib.suppress(ValueError):  # not in the main thread
                self._before[number] = signal.signal(number, self._ask)
        if _interrupts:
            self.asked = True
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
