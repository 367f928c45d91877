"""One rank among many."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pglcl.errors import UserError


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Any]:
    """The group that torchrun started, or None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    # The optimizer's first step imports this, which then keeps the group that it finds, and with it threads that still
    # run while the interpreter is taken down, which now and then abort it. Imported before, it finds none.
    import torch._dynamo  # noqa: F401

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.group.WORLD
        dist.barrier()  # no rank leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def rank_of(group: Any) -> int:
    return 0 if group is None else dist.get_rank(group)


def average_gradients(network: nn.Module, group: Any) -> None:
    """As DistributedDataParallel does, in one message; a parameter that a rank did not use counts as zero there."""
    if group is None:
        return
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    offset = 0
    for p in parameters:
        assert p.grad is not None
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()


def _agree(problem: list[str], group: Any) -> None:
    """Every rank stops when one has something to say."""
    if group is not None:
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, problem, group=group)
        problem = next((p for p in everyone if p), [])
    if problem:
        raise UserError(*problem, everywhere=True)


def _any(flagged: bool, group: Any, device: torch.device) -> bool:
    value = torch.tensor([int(flagged)], device=device)
    dist.all_reduce(value, group=group)
    return bool(value.item())
