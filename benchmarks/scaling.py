"""How time grows with patches and threads, and what two and three ranks cost."""

from __future__ import annotations

import datetime
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from benchmarks.runner import compare, markdown, median, milliseconds, peak_growth
from pglcl_ext import patch_contrast_loss


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the line through the logarithms."""
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    return sum((x - ma) * (y - mb) for x, y in zip(a, b)) / sum((x - ma) ** 2 for x in a)


def both_passes(n: int, depth: int = 128) -> Any:
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(n, depth, generator=g), dim=1).requires_grad_()
    y, h = torch.randint(0, 4, (n,), generator=g), torch.rand(n, generator=g)
    return lambda: torch.autograd.grad(patch_contrast_loss(z, y, h, max_positive_disparity=0.5), z)


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
    seconds = []
    for _ in range(repetitions):
        dist.barrier()
        start = time.perf_counter()
        both()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        torch.save({"seconds": seconds, "bytes": grown}, os.path.join(folder, "result.pt"))
    dist.barrier()
    dist.destroy_process_group()


def ranks(world: int, gather: str, n: int, repetitions: int = 5) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, gather, n, repetitions), nprocs=world)
        return torch.load(Path(folder) / "result.pt", weights_only=True)


def run(*, threads: int, repetitions: int = 7) -> tuple[list[dict], str]:
    results: list[dict[str, Any]] = []
    sizes = [512, 1024, 2048, 4096, 8192, 16384]
    times = []
    for n in sizes:
        samples = compare({"both": both_passes(n)}, repetitions=repetitions if n < 8192 else 3, threads=threads)["both"]
        times.append(median(samples))
        results.append({"question": "N", "N": n, "threads": threads, "seconds": samples})
    texts = [
        f"Forward and backward, D = 128, {threads} threads; slope of log time over log N from 2048 on: "
        f"{slope([float(n) for n in sizes[2:]], times[2:]):.2f} (2 is the number of pairs)",
        markdown(["N", "ms"], [[str(n), milliseconds(r["seconds"])] for n, r in zip(sizes, results)]),
    ]
    rows = []
    for count in sorted({1, 2, os.cpu_count() or 1}):
        samples = compare({"both": both_passes(4096)}, repetitions=repetitions, threads=count)["both"]
        results.append({"question": "threads", "N": 4096, "threads": count, "seconds": samples})
        rows.append([str(count), milliseconds(samples)])
    texts += ["Threads, N = 4096", markdown(["threads", "ms"], rows)]
    rows = []
    for world in (1, 2, 3):
        for gather in ("all", "ring"):
            found = ranks(world, gather, 4096)
            results.append({"question": "ranks", "N per rank": 4096, "ranks": world, "gather": gather, **found})
            rows.append([f"{world}, {gather}", milliseconds(found["seconds"]), f"{found['bytes'] / 2**20:.1f}"])
    note = "Ranks of one thread each (gloo; more ranks than cores wait for each other), 4096 patches a rank"
    texts += [note, markdown(["ranks, gather", "ms", "memory of the first rank beyond its inputs, MiB"], rows)]
    return results, "\n\n".join(texts)
