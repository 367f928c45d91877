"""The records of a run: its environment, the time of each section of a step, its metrics."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pglcl_ext
from pglcl.errors import UserError, WriteError
from pglcl.files import check_writable, read_bytes, write_text


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a source folder, and whether files were changed since; None outside of git."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(git("status", "--porcelain"))} if commit else None
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """The model of the CPU where the system tells it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """The versions and the machine that a run is computed with."""
    import monai

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "pglcl_ext": pglcl_ext.build_info(),
        "machine": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": git_state(Path(__file__).parent),
    }


class Profile:
    """Measures the seconds of each section of a step; does nothing unless `enabled`."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.device, self.enabled = device, enabled
        self.seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rows(self, steps: int) -> list[tuple[str, float, float]]:
        """(section, milliseconds per step, share of the step), over the last `steps` steps."""
        means = {name: float(np.sum(v[-steps:])) / steps for name, v in self.seconds.items()}
        total = sum(means.values()) or 1.0
        return [(name, 1e3 * seconds, seconds / total) for name, seconds in means.items()]


class MetricsLog:
    """Writes metrics.jsonl and TensorBoard's files. Rows after step `first`, which a resumed run repeats, are removed.

    Raises:
        WriteError: a file cannot be written. A thread writes TensorBoard's files, so their error comes a row later.
    """

    def __init__(self, output: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.folder = output / "metrics.jsonl", output / "tensorboard"
        kept = [row for row in read_metrics(output) if row["step"] <= first]
        # Seconds that the run has taken so far, without those of the steps that are repeated.
        self.start = time.monotonic() - max((row.get("seconds", 0.0) for row in kept), default=0.0)
        write_text(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
        with _written(self.path):
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed with the run)
        check_writable(self.folder)
        _quieten_the_thread_of_tensorboard()
        with _written(self.folder):
            self.board = SummaryWriter(str(self.folder), purge_step=first + 1 if first else None)

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row, and in metrics.jsonl also the seconds of training so far."""
        timed = {**row, "seconds": round(time.monotonic() - self.start, 3)}
        with _written(self.path):
            self.file.write(json.dumps(timed, allow_nan=False) + "\n")
            self.file.flush()
        with _written(self.folder):
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Closes both files. Errors are ignored, so that they do not replace the one that ended the run."""
        for closing in (self.file.close, self.board.close):
            with contextlib.suppress(OSError):
                closing()


@functools.cache
def _quieten_the_thread_of_tensorboard() -> None:
    """Keeps its thread from printing the traceback of an OSError: the next number raises it again, as one line."""
    before = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        if not (isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
            before(error)

    threading.excepthook = hook


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a kill cut off is left out.

    Raises:
        UserError: another line is not an object of numbers, or its step is not a whole number.
    """
    path = output / "metrics.jsonl"
    lines = read_bytes(path).decode("utf-8", errors="replace").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not all(map(_is_number, row.values())):
            raise UserError(
                f"{path}, line {number}: must be an object of numbers with a whole number as step, got {line[:60]!r}"
            )
        rows.append(row)
    return rows
