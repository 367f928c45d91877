"""Starts and ends several processes that train together on one machine.

torchrun also works on many machines, but prints forty lines of its own when a process fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARENT = "PGLCL_PARENT"  # the environment variable with the launching process; when that one ends, all others stop
GRACE = 20.0  # seconds that the others get to end after one has failed


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs ``pglcl`` with `arguments` in several processes.

    Signals that ask to stop are passed on to them.

    Returns:
        The first exit code that is not 0; 0 if all processes succeed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common: dict[str, object] = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common[PARENT] = os.getpid()
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // processes)
    children: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []  # the signals so far

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        for rank in range(processes):
            if asked:
                break
            own = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            command = [sys.executable, "-m", "pglcl", *arguments]
            # A session of its own; otherwise Ctrl-C in the terminal would reach it twice.
            children.append(subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True))
        if asked:
            pass_on(asked[0], None)  # also to the process that was being started
        code = _wait(children)
        # A rank that is not yet in its steps ends by SIGTERM or SIGHUP without a word.
        killed = bool(asked) and asked[0] != signal.SIGINT and code == 128 + asked[0]
        if killed or (asked and code == 0 and len(children) < processes):
            raise KeyboardInterrupt
        return code
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """The first exit code that is not 0. A signal counts as in a shell: 128 plus its number."""
    code, until = 0, float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.05)
        ended = [child.returncode for child in children if child.returncode]
        if ended and not code:
            code, until = ended[0], time.monotonic() + GRACE
    code = code or next((child.returncode for child in children if child.returncode), 0)
    return 128 - code if code < 0 else code


def own_rank() -> int:
    """The rank of this process among those that a launcher started; 0 for a process that runs alone."""
    size, rank = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK"))
    return int(rank) if rank.isdecimal() and size.isdecimal() and int(size) > 1 else 0


def is_first_process() -> bool:
    """Whether this is rank 0 of a launch, or no part of one: the process that prints and writes."""
    return own_rank() == 0


def tell_launcher(lines: Sequence[str]) -> None:
    """Writes `lines` to the file from which torchrun takes the error of this process for its final summary."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        text = "\n".join(lines)
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}), encoding="utf-8")


def parent_has_ended() -> bool:
    """Whether the process that launched this one has ended."""
    return PARENT in os.environ and os.getppid() != int(os.environ[PARENT])
