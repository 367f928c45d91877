"""How time grows with patches and threads, and how much time and memory two and three ranks take."""

from __future__ import annotations

import datetime
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from benchmarks.runner import (
    Calls,
    cell,
    find,
    markdown,
    measure,
    mebibytes,
    median,
    milliseconds,
    passes,
    peak_growth,
)
from pglcl_ext import patch_contrast_loss

SIZES = (512, 1024, 2048, 4096, 8192, 16384)


def slope(xs: list[float], ys: list[float]) -> float:
    """The slope of the line through the logarithms; NaN for fewer than two points."""
    if len(xs) < 2:
        return math.nan
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    return sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True)) / sum((x - ma) ** 2 for x in a)


def make(N: int) -> Calls:
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(N, 128, generator=g), dim=1).requires_grad_()
    y, d = torch.randint(0, 4, (N,), generator=g), torch.rand(N, generator=g)
    return {"pglcl_ext": passes(patch_contrast_loss, (z, y, d), (z,), max_positive_disparity=0.5)}


def _rank(rank: int, world: int, folder: str, gather: str, n: int, repetitions: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(minutes=5))
    g = torch.Generator().manual_seed(rank)
    z = F.normalize(torch.randn(n, 128, generator=g), dim=1).requires_grad_()
    y = torch.randint(0, 4, (n,), generator=g)

    def both() -> None:
        loss = patch_contrast_loss(z, y, group=dist.group.WORLD, gather=gather)
        torch.autograd.grad(loss, z)

    tiny = F.normalize(torch.randn(64, 128), dim=1).requires_grad_()
    torch.autograd.grad(patch_contrast_loss(tiny, y[:64], group=dist.group.WORLD, gather=gather), tiny)
    grown = peak_growth(both)
    timer = Timer("both()", globals={"both": both}, num_threads=1)
    seconds = []
    for _ in range(repetitions):
        dist.barrier()
        seconds.append(timer.timeit(1).mean)
    if rank == 0:
        torch.save({"seconds": seconds, "bytes": grown}, os.path.join(folder, "result.pt"))
    dist.barrier()
    dist.destroy_process_group()


def ranks(world: int, gather: str, n: int, repetitions: int = 5) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, gather, n, repetitions), nprocs=world)
        return torch.load(Path(folder) / "result.pt", weights_only=True)


def run(*, threads: int, sizes: tuple[int, ...] = ()) -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    for n in sizes or SIZES:
        rows = measure(make, {"N": n}, ["pglcl_ext"], threads=threads, warm={"N": 64})
        results += [{"question": "N", "threads": threads, **row} for row in rows]
    for count in sorted({1, 2, os.cpu_count() or 1}):
        rows = measure(make, {"N": 4096}, ["pglcl_ext"], threads=count, warm={"N": 64})
        results += [{"question": "threads", "threads": count, **row} for row in rows]
    for world in (1, 2, 3):
        for gather in ("all", "ring"):
            found = ranks(world, gather, 4096)
            results.append({"question": "ranks", "N per rank": 4096, "ranks": world, "gather": gather, **found})
    return results, table(results)


def slopes(results: list[dict[str, Any]], smallest: int = 2048) -> tuple[float, float]:
    """The slopes of time and of memory against N, both passes, on a log-log plot from `smallest` patches on."""
    own = [r for r in results if r["question"] == "N" and r["passes"] == "forward+backward" and r["N"] >= smallest]
    sizes = [float(r["N"]) for r in own]
    return slope(sizes, [median(r["seconds"]) for r in own]), slope(sizes, [float(r["bytes"]) for r in own])


def table(results: list[dict[str, Any]]) -> str:
    texts = []
    for question, column in (("N", "N"), ("threads", "threads")):
        rows = []
        for value in dict.fromkeys(r[column] for r in results if r["question"] == question):
            pair = [
                find(results, question=question, passes=p, **{column: value}) for p in ("forward", "forward+backward")
            ]
            rows.append([str(value), *(cell(r, what) for r in pair for what in ("seconds", "bytes"))])
        if question == "N":
            time, memory = slopes(results)
            threads = results[0]["threads"]
            texts.append(
                f"D = 128, {threads} threads. Slopes from 2048 patches on, both passes: log time over log N {time:.2f} "
                f"(2 is the number of pairs), log memory over log N {memory:.2f} (1 is the number of patches)"
            )
        else:
            texts.append("Threads, N = 4096")
        texts.append(markdown([column, "forward ms", "MiB", "forward+backward ms", "MiB"], rows))
    rows = [
        [f"{r['ranks']}, {r['gather']}", milliseconds(r["seconds"]), mebibytes(r["bytes"])]
        for r in results
        if r["question"] == "ranks"
    ]
    texts.append("Ranks of one thread each (gloo; more ranks than cores wait for each other), 4096 patches a rank")
    texts.append(
        markdown(["ranks, gather", "forward+backward ms", "memory of the first rank beyond its inputs, MiB"], rows)
    )
    return "\n\n".join(texts)
