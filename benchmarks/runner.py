"""Times contenders side by side: interleaved repetitions after warm-up, every sample kept, medians compared.

A question makes its contenders with a function `make(**case)`, which returns for each contender its passes, usually
"forward" and "forward+backward", as calls without arguments. `measure` times them all in one process, in turns, and
finds the peak memory of each in a process of its own.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import multiprocessing
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from pglcl.record import processor
from torch import Tensor
from torch.utils.benchmark import Timer

from pglcl_ext import build_info

RESULTS = Path(__file__).parent / "results"
LIMIT_SECONDS = 60.0
LIMIT_BYTES = 12 * 2**30

Call = Callable[[], Any]
Calls = dict[str, dict[str, Call]]

# Children are forked from a process that has imported everything and computed nothing. So they start at once, and the
# fork loses no thread.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "benchmarks.runner",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "monai.losses",
        "pytorch_metric_learning.losses",
    ]
)


def machine() -> dict[str, Any]:
    """The machine and the versions behind the figures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit or None,
        "date": datetime.date.today().isoformat(),
        **build_info(),
    }


def name_of(info: dict[str, Any]) -> str:
    """The GPU; or the processor and the instruction set of the kernels, since different processors may share a name."""
    return info["gpu"] or f"{info['processor']}, {info['cpu_instruction_set']}"


def folder_of(info: dict[str, Any]) -> Path:
    """The folder of the results of one kind of processor."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name_of(info).lower()).strip("-")


def headed(info: dict[str, Any], table: str) -> str:
    """A table with a heading that tells on what it was measured."""
    where = f"{name_of(info)}, {info['threads']} threads, torch {info['torch_running']}"
    return f"{where}, {info['date']}, commit {info['commit']}.\n\n{table}"


def passes(function: Callable[..., Any], arguments: Sequence[Any], inputs: Sequence[Tensor], **options: Any) -> dict:
    """The forward pass without autograd, and both passes, with the gradient of ones with respect to `inputs`."""

    def forward() -> Any:
        with torch.no_grad():
            return function(*arguments, **options)

    def both() -> Any:
        outputs = function(*arguments, **options)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])

    return {"forward": forward, "forward+backward": both}


def compare(
    contenders: dict[str, Call], *, repetitions: int, threads: int = 0, seconds: float = 6.0, long: float = 2.0
) -> dict[str, list[float]]:
    """Seconds per call of each contender, measured in turns after a warm-up.

    There are `repetitions` samples of each; fewer, but at least two, if they would take more than `seconds` in all.
    Timer itself calls twice before each sample, so a call of over `long` seconds gets no other warm-up.
    """
    threads = threads or torch.get_num_threads()
    timers = {n: Timer("f()", globals={"f": f}, num_threads=threads) for n, f in contenders.items()}
    counts = {}
    samples: dict[str, list[float]] = {}
    whole = 0.0
    for name, timer in timers.items():
        first = timer.timeit(1).mean
        samples[name] = [first] if first > long else []
        first = first if first > 0.02 else timer.timeit(2).mean
        counts[name] = max(1, min(100, int(0.02 / max(first, 1e-7))))  # about 20 ms a sample, so that ticks do not show
        whole += first * counts[name]
    rounds = max(2, min(repetitions, int(seconds / whole)))
    for _ in range(rounds):
        for name, timer in timers.items():
            if len(samples[name]) < rounds:
                samples[name].append(timer.timeit(counts[name]).mean)
    return samples


def peak_growth(function: Call, device: str = "cpu") -> int:
    """Bytes by which memory grows at most while `function` runs: memory of the GPU, or the resident memory of this
    process, which is read every 2 ms."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
        peak[0] = max(peak[0], process.memory_info().rss)
        del result
    finally:
        done.set()
        watcher.join()
    return max(0, peak[0] - before)


def _child(answers: Connection, device: str, function: Callable[..., Any], arguments: tuple) -> None:
    if device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    try:
        answers.send(("answer", function(*arguments)))
    except Exception as error:
        short = isinstance(error, MemoryError) or "memory" in str(error) or "bad_alloc" in str(error)
        answers.send(("problem", "out of memory") if short else ("error", f"{type(error).__name__}: {error}"))


def in_child(function: Callable[..., Any], *arguments: Any, device: str = "cpu", seconds: float = 600.0) -> Any:
    """Calls function(*arguments) in its own process with `LIMIT_BYTES` of memory; returns a text if it ran out."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_child, args=(sender, device, function, arguments), daemon=False)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return "over a minute" if seconds <= LIMIT_SECONDS else f"over {seconds:.0f} s"
        kind, value = receiver.recv()
        process.join(10)
    except EOFError:
        process.join()
        if process.exitcode not in (-signal.SIGABRT, -signal.SIGKILL):
            raise RuntimeError(f"the process ended with {process.exitcode}") from None
        return "out of memory"  # bad_alloc in a thread ends the process, or the system kills it
    finally:
        process.kill()
        process.join()
    if kind == "error":
        raise RuntimeError(value)
    return value


def _alone(make: Callable[..., Calls], case: dict, contender: str, which: str, warm: dict, threads: int) -> int:
    torch.set_num_threads(threads)
    make(**warm)[contender][which]()  # allocates what is needed only once: threads, handles, code
    call = make(**case)[contender][which]
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)  # otherwise memory that the warm-up freed would be used again, and not be counted
    return peak_growth(call, case.get("device", "cpu"))


def _together(make: Callable[..., Calls], case: dict, names: list[tuple[str, str]], threads: int, options: dict) -> Any:
    torch.set_num_threads(threads)
    calls = make(**case)
    found = compare({f"{c}|{w}": calls[c][w] for c, w in names}, threads=threads, **options)
    return {tuple(name.split("|")): samples for name, samples in found.items()}


def measure(
    make: Callable[..., Calls],
    case: dict[str, Any],
    contenders: Iterable[str],
    *,
    threads: int,
    warm: dict[str, Any] | None = None,
    compiled: str = "torch.compile",
    repetitions: int = 9,
) -> list[dict[str, Any]]:
    """A row per contender and pass: the case, seconds of every sample, and bytes of peak memory beyond the inputs.

    A contender that ran out of memory or time has a problem in place of both. `warm` replaces parts of the case for the
    warm-up before memory is measured. A contender whose name begins with `compiled` compiles for its shapes, so it
    warms up on the case itself.
    """
    device = case.get("device", "cpu")
    start = time.monotonic()
    rows = []
    for contender in contenders:
        small = case if contender.startswith(compiled) else {**case, **(warm or {})}
        problem = None
        for which in ("forward", "forward+backward"):
            if problem is None:
                # Compilation does not count as part of a call, so it gets more time.
                limit = LIMIT_SECONDS * (3 if contender.startswith(compiled) else 1)
                grown = in_child(_alone, make, case, contender, which, small, threads, device=device, seconds=limit)
                problem = grown if isinstance(grown, str) else None
            found = {"problem": problem} if problem else {"bytes": grown}
            rows.append({**case, "contender": contender, "passes": which, **found})
    well = [(row["contender"], row["passes"]) for row in rows if "problem" not in row]
    if not well:
        return rows
    timed = in_child(_together, make, case, well, threads, {"repetitions": repetitions}, device=device)
    if isinstance(timed, str):
        raise RuntimeError(f"{case}: {timed} while the contenders were timed")
    for row in rows:
        if "problem" not in row:
            row["seconds"] = timed[row["contender"], row["passes"]]
    print(", ".join(f"{k} {v}" for k, v in case.items()), f"({time.monotonic() - start:.0f} s)", file=sys.stderr)
    return rows


def find(results: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    """The first row with these fields."""
    return next((row for row in results if all(row.get(k) == v for k, v in wanted.items())), None)


def ratio(results: Iterable[dict[str, Any]], over: str, under: str, which: str, **case: Any) -> float | None:
    """The median time of one contender divided by that of another; None if one has no time."""
    results = list(results)
    rows = [find(results, contender=c, passes=which, **case) for c in (over, under)]
    if any(row is None or "seconds" not in row for row in rows):
        return None
    return median(rows[0]["seconds"]) / median(rows[1]["seconds"])  # type: ignore[index]


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def milliseconds(samples: list[float]) -> str:
    """Median and, in brackets, the quartiles."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return f"{significant(median(samples) * 1e3)} ({significant(low * 1e3)}-{significant(high * 1e3)})"


def significant(value: float) -> str:
    """A number with three figures, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.1f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def cell(row: dict[str, Any] | None, what: str) -> str:
    """A cell of a table: milliseconds or MiB of a row, its problem, or "-" if it was not measured."""
    if row is None:
        return "-"
    if "problem" in row:
        return str(row["problem"])
    return milliseconds(row["seconds"]) if what == "seconds" else mebibytes(row["bytes"])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def save(
    folder: Path,
    info: dict[str, Any],
    question: str,
    command: str,
    results: list[dict[str, Any]],
    table: str,
    took: float | None = None,
) -> None:
    """Writes <question>.json with every sample, and the table beside it; `info` comes from :func:`machine`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "machine": info, "results": results}
    if took is not None:
        content["took_seconds"] = round(took, 1)
    replace(folder / f"{question}.json", json.dumps(content, indent=1) + "\n")
    replace(folder / f"{question}.md", table + "\n")


def replace(path: Path, text: str) -> None:
    """Replaces a file by way of another name, so that it is either the whole new one or the old one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
