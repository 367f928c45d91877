"""Times contenders side by side: interleaved repetitions after warm-up, every sample kept, medians compared."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.benchmark import Timer

from pglcl_ext import build_info

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit or None,
        "date": datetime.date.today().isoformat(),
        **build_info(),
    }


def compare(contenders: dict[str, Callable[[], Any]], *, repetitions: int, threads: int = 0) -> dict[str, list[float]]:
    """Seconds per call of each contender, `repetitions` samples each, taken in turns."""
    threads = threads or torch.get_num_threads()
    timers = {n: Timer("f()", globals={"f": f}, num_threads=threads) for n, f in contenders.items()}
    counts = {}
    for name, timer in timers.items():
        first = timer.timeit(2).mean
        counts[name] = max(1, min(100, int(0.02 / max(first, 1e-7))))  # about 20 ms a sample, so that ticks do not show
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repetitions):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(counts[name]).mean)
    return samples


def peak_growth(function: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of this process grows at most while `function` runs, looked at every 2 ms."""
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
        peak[0] = max(peak[0], process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    return max(0, peak[0] - before)


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def milliseconds(samples: list[float]) -> str:
    """Median and, in brackets, the quartiles."""
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return f"{median(samples) * 1e3:.3g} ({low * 1e3:.3g}-{high * 1e3:.3g})"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def save(question: str, command: str, results: list[dict[str, Any]], table: str) -> None:
    """results/<question>.json with every sample, and the table beside it; both are written whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps({"command": command, "machine": machine(), "results": results}, indent=1)
    for name, text in ((f"{question}.json", content), (f"{question}.md", table)):
        partial = RESULTS / f"{name}.partial"
        partial.write_text(text + "\n")
        partial.replace(RESULTS / name)
