"""A run that is asked to stop ends its step first."""

from __future__ import annotations

import contextlib
import signal
from types import TracebackType
from typing import Any

from pglcl.launcher import parent_has_ended

_interrupts: list[int] = []  # those that `remember_interrupts` has seen


def remember_interrupts() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, as ever, and is remembered: a library that is being imported may
    catch the exception and go on."""

    def interrupt(number: int, frame: Any) -> None:
        _interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


class StopRequest:
    """The first Ctrl-C, SIGTERM or SIGHUP in the block is noted; the second raises KeyboardInterrupt there and then.

    Attributes:
        asked: whether one came, in the block or lost before it.
    """

    def __init__(self) -> None:
        self.asked = bool(_interrupts)
        self._before: dict[int, Any] = {}

    def look_at_parent(self) -> None:
        """The end of the process that launched this one is a request, too."""
        self.asked = self.asked or parent_has_ended()

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup
            with contextlib.suppress(ValueError):  # not in the main thread
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
