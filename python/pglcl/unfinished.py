"""The temporary files that this process is writing. It imports next to nothing, since Ctrl-C must soon be handled."""

from __future__ import annotations

import contextlib
import os

unfinished: set[os.PathLike[str]] = set()


def remove_unfinished() -> None:
    """Removes what an interrupted process has not removed by itself."""
    while unfinished:
        with contextlib.suppress(OSError):
            os.unlink(unfinished.pop())
