"""Chooses how many processes prepare batches beside the training."""

from __future__ import annotations

import copy
import os
import time

import torch

from pglcl.batches import StepBatches, loader
from pglcl.limits import most_workers
from pglcl.model import SegmentationNetwork
from pglcl.progress import Progress


def choose_workers(
    batches: StepBatches, network: SegmentationNetwork, device: torch.device, ranks: int, progress: Progress
) -> int:
    """The number of workers: that of `--workers`, or the one with which steps are fastest.

    Workers feed the network, but take cores from it.

    Args:
        batches: of the run.
        network: the one to train; a copy of it is timed.
        device: where it computes.
        ranks: number of training processes on this machine, which share its cores.
        progress: prints what was measured.

    Raises:
        UserError: shared memory has no room for the batches of the workers that `--workers` asks for.
    """
    most = most_workers(batches, batches.config.workers, ranks)
    if batches.config.workers >= 0:
        return batches.config.workers
    cores = (os.cpu_count() or 1) // ranks
    network = copy.deepcopy(network)
    seconds: dict[int, float] = {}
    for workers in sorted({0, 1, min(2, cores - 1), min(4, cores - 1)}):
        if workers == 0 or (0 < workers <= most and cores > 1):
            seconds[workers] = _seconds_of_a_step(batches, network, device, workers)
    best = min(seconds, key=lambda w: seconds[w])
    measured = ", ".join(f"{1e3 * s:.0f} ms with {w}" for w, s in seconds.items())
    progress.print_line(
        f"{best} workers prepare batches (measured: a step of the network alone takes {measured} workers)"
    )
    return best


def _seconds_of_a_step(batches: StepBatches, network: SegmentationNetwork, device: torch.device, workers: int) -> float:
    source = loader(batches, max(0, len(batches) - 40), workers)
    start, counted = time.perf_counter(), 0
    for step in range(min(14, len(batches))):
        if step == 4 or step == len(batches) - 1:  # the first ones fill the pipeline
            start, counted = time.perf_counter(), 0
        batch = next(source)
        images = torch.cat([batch["image"], batch.get("strong", batch["image"][:0])]).to(device)
        network(images).mean().backward()
        counted += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / counted
