"""``pglcl`` in a process that is forked from this one: Python, PyTorch and MONAI are imported once."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pglcl.cli
import pglcl.evaluate
import pglcl.report
import pglcl.train
import torch
import torch._dynamo
import torch.utils.tensorboard
from pglcl.meeting import MEETING

# One thread in the parent. Otherwise a forked process could wait for a lock that another thread held.
torch.set_num_threads(1)
PATIENCE = 60  # seconds that a rank waits for the others
LONGEST = 300.0  # seconds that a command may take
MOST_A_TICK = (
    2.0  # longest time that counts between two looks at a child; else the machine slept, or the job was stopped
)


@dataclass
class Ended:
    """How a child ended.

    code: exit code, or minus the signal. output: of both streams. seconds: waiting time. memory: peak of the resident
    memory in MiB.
    """

    code: int
    output: str
    seconds: float
    memory: float

    @property
    def refused(self) -> bool:
        """Whether it named the fault in lines of its own, with a documented exit code."""
        return self.code in (1, 2) and "Traceback" not in self.output and bool(self.output.strip())


class Child:
    """Runs `work` in a forked process, in a group of its own.

    Args:
        work: returns the exit code.
        log: file of its output.
        environment: variables set for it.
    """

    def __init__(self, work: Callable[[], int], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(work, environment or {})

    def _live(self, work: Callable[[], int], environment: dict[str, str]) -> None:
        code = 70
        try:
            os.setsid()
            with open(self.log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            # The parent may have replaced these streams.
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.environ.update(environment)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or has ended
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, longest: float = LONGEST) -> Ended:
        """Waits for its end. Seconds count from now on, except those in which this process was stopped, too."""
        last, seconds = time.monotonic(), 0.0
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if seconds > longest:
                self.kill()
            time.sleep(0.005)
            now = time.monotonic()
            last, seconds = now, seconds + min(now - last, MOST_A_TICK)
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, text, seconds, usage.ru_maxrss / 1024)


def pglcl_child(arguments: Sequence[object], log: Path, environment: dict[str, str] | None = None) -> Child:
    return Child(lambda: pglcl.cli.main([str(a) for a in arguments]), log, environment)


def run_pglcl(arguments: Sequence[object], log: Path, *, address_space: int = 0) -> Ended:
    """Runs a command to its end, with at most `address_space` bytes if it is not 0."""

    def work() -> int:
        if address_space:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        return pglcl.cli.main([str(a) for a in arguments])

    return Child(work, log).wait()


def start_ranks(ranks: int, arguments: Sequence[object], folder: Path) -> list[Child]:
    """Starts ranks like torchrun; a single rank is an ordinary process."""
    if ranks == 1:
        return [pglcl_child(arguments, folder / "rank0.log")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common[MEETING] = str(PATIENCE)  # how long they wait for a rank that was killed before the meeting
    return [
        pglcl_child(arguments, folder / f"rank{rank}.log", {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def run_stopped_after(step: int, arguments: Sequence[object], log: Path) -> Ended:
    """Runs a training that is asked to stop, as by Ctrl-C, after `step` steps."""

    def work() -> int:
        after_step = pglcl.train.Training._after_step

        def stopping(self: pglcl.train.Training, learner: object, done: int, *rest: object) -> None:
            if done == step:
                os.kill(os.getpid(), signal.SIGTERM)
            after_step(self, learner, done, *rest)  # type: ignore[arg-type]

        pglcl.train.Training._after_step = stopping  # type: ignore[method-assign, assignment]
        return pglcl.cli.main([str(a) for a in arguments])

    return Child(work, log).wait()
