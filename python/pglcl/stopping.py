"""A run that is asked to stop ends its step first."""

from __future__ import annotations

import contextlib
import signal
from types import TracebackType
from typing import Any

from pglcl.launcher import parent_has_ended


class StopRequest:
    """The first Ctrl-C, SIGTERM or SIGHUP in the block is noted; the second raises KeyboardInterrupt there and then.

    Attributes:
        asked: whether one came.
    """

    def __init__(self) -> None:
        self.asked = False
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
