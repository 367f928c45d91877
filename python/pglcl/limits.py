"""Compares what a training needs with what the machine has, before the training begins."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from pglcl.batches import PREFETCHED, StepBatches
from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.memory import available_memory, in_words
from pglcl.model import network_for

WORKERS_PER_CORE = 8
THREADS = 64  # largest number of threads on a machine with fewer cores
SHARED_MEMORY = Path("/dev/shm")


def check_threads(threads: int) -> None:
    """Raises UserError for a number of CPU threads with which OpenMP may crash; 0 is PyTorch's choice."""
    most = max(THREADS, os.cpu_count() or 1)
    if not 0 <= threads <= most:
        raise UserError(f"--threads must be 0 to {most}, got {threads}", everywhere=True)


def check_resources(config: TrainConfig, device: torch.device, ranks: int) -> None:
    """Raises UserError for options that this machine cannot meet, whatever the data are.

    Args:
        ranks: training processes on this machine, which share its cores.
    """
    cores = os.cpu_count() or 1
    most = max(1, WORKERS_PER_CORE * cores // ranks)
    if config.workers > most:
        raise UserError(f"--workers must be at most {most} on the {cores} cores of this machine, got {config.workers}")
    check_memory(config, device)


def check_memory(
    config: TrainConfig, device: torch.device, channels: int = 1, num_classes: int = 2, prepared: int = 0
) -> None:
    """Raises UserError for a training that needs more memory than there is.

    Args:
        config: its options.
        device: where it computes.
        channels, num_classes: of the data; the default is the smallest, for a check before the data are read.
        prepared: bytes of the prepared volumes, which are kept in the memory of the CPU, or in `--cache`.
    """
    step, has = bytes_of_a_step(config, channels, num_classes), _memory_of(device)
    if step > has:
        sizes = f"--batch-size {config.batch_size}, --image-size {'x'.join(map(str, config.size))}"
        raise UserError(
            f"a step takes at least {in_words(step)}, but {device} has {in_words(has)}: reduce {sizes}, "
            f"--channels {config.channels}, --queue-length {config.queue_length} or --embedding-dim "
            f"{config.embedding_dim}"
        )
    there = available_memory()
    beside = step if device.type == "cpu" else 0
    if prepared + beside > there and not config.cache:
        and_step = f" and a step at least {in_words(beside)}" if beside else ""
        raise UserError(
            f"the prepared volumes take {in_words(prepared)}{and_step}, but {in_words(there)} of memory are free; "
            f"--cache DIR keeps them on the disk; {_smaller_volumes(config)} makes them smaller"
        )


def _smaller_volumes(config: TrainConfig) -> str:
    """The options that make prepared volumes smaller. Those of which the network sees parts are kept whole."""
    if config.whole_slices:
        return "a smaller --image-size"
    return "a larger --spacing" + (" or --slices whole" if config.spatial_dims == 2 and not config.spacing else "")


def bytes_of_a_step(config: TrainConfig, channels: int = 1, num_classes: int = 2) -> float:
    """A lower bound: tensors of the student's backward pass, parameters, optimiser and queue."""
    classes = max(num_classes, config.num_classes)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    try:
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            network = network_for(config, channels, classes)
            network(torch.empty(config.batch_size, channels, *config.size))
    except (RuntimeError, OverflowError):  # more numbers than 64 bits can count
        return float("inf")
    parameters = sum(p.numel() for p in network.parameters())
    activations = sum(storage.nbytes() for storage in kept.values())
    queue = classes * config.queue_length * config.embedding_dim if config.contrast else 0
    # Activations may take half the bytes; student, teacher, gradient and two moments do not.
    return (0.5 if config.amp else 1.0) * activations + 4.0 * (5 * parameters + queue)


def most_workers(batches: StepBatches, asked: int, ranks: int = 1) -> int:
    """The largest number of workers whose batches fit into shared memory, through which they reach the training.

    Args:
        batches: of the run.
        asked: the number of workers that the user asks for; -1: none.
        ranks: number of training processes on this machine, each with that many workers.

    Raises:
        UserError: `asked` is larger. Without room, a worker would hang or be killed, and the training would stop.
    """
    if not SHARED_MEMORY.is_dir():
        return max(asked, 64)
    free = shutil.disk_usage(SHARED_MEMORY).free
    each = (PREFETCHED + 1) * batches.bytes_of_a_batch()
    most = int(free // (each * ranks))
    if asked > most:
        theirs = "their batches" if ranks == 1 else f"the batches of {ranks} training processes"
        raise UserError(
            f"--workers {asked}: {theirs} take {in_words(asked * each * ranks)} of shared memory, but {SHARED_MEMORY} "
            f"has {in_words(free)}. Use --workers {most}, or give the container more (docker run --shm-size=1g)"
        )
    return most


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return available_memory()
