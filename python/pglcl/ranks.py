"""The processes that train together (ranks): how they start, and what they exchange."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.meeting import WORKING, form_group, lost_ranks_explained, number_from_environment


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    group: their group in torch.distributed, or None for a single process. rank: the number of this process. size: the
    number of processes. device: holds the tensors that are exchanged. on_machine: the number of ranks on this machine.
    """

    group: Any = None
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_machine: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that prints and writes files."""
        return self.rank == 0

    def raise_together(self, lines: Sequence[str]) -> None:
        """Raises :class:`UserError` on every rank if one has `lines`; all raise those of the first such rank."""
        lines = next((lines for lines in self.gather(list(lines)) if lines), [])
        if lines:
            raise UserError(*lines, everywhere=True)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A :class:`UserError` that one rank raises in the block is raised on every rank at its end."""
        lines: Sequence[str] = ()
        try:
            yield
        except UserError as error:
            lines = error.lines
        self.raise_together(lines)

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over the ranks."""
        if self.group is None:
            return list(numbers)
        # float32 where a device has no float64
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(numbers, dtype=dtype, device=self.device)
        dist.all_reduce(total, group=self.group)
        return [float(value) for value in total]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of each rank, in their order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """The first rank's `value`."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


def device_of_rank(device: torch.device) -> torch.device:
    """`device`; under a launcher, the GPU of this rank, which becomes the current one.

    Raises:
        UserError: there are fewer GPUs than ranks.
    """
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    own, count = number_from_environment("LOCAL_RANK"), torch.cuda.device_count()
    if own >= count:
        raise UserError(f"each rank needs its own GPU: rank {own} of this machine finds {count} GPUs")
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


@contextlib.contextmanager
def launched_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone.

    Raises:
        UserError: a rank does not connect in time, or ends early.
    """
    size = number_from_environment("WORLD_SIZE", 1, least=1)
    if size == 1:
        yield Ranks(device=device)
        return
    # The optimizer's first step imports this module, which then keeps any process group that exists. Threads of that
    # group would still run while the interpreter shuts down, and sometimes abort it. At this point there is no group.
    import torch._dynamo  # noqa: F401

    rank = number_from_environment("RANK", most=size - 1)
    with lost_ranks_explained():
        form_group("nccl" if device.type == "cuda" else "gloo", rank, size)
        try:
            yield Ranks(
                dist.group.WORLD,
                rank,
                size,
                device,
                number_from_environment("LOCAL_WORLD_SIZE", size, least=1, most=size),
            )
            dist.barrier()  # no rank leaves while another still talks to it
        finally:
            dist.destroy_process_group()


def averaging(loss: nn.Module, config: TrainConfig) -> nn.Module:
    """The same loss; its gradients are averaged over the ranks while ``backward`` runs.

    With `find_unused_parameters`, no rank has to wait for one that has no anchors. The buckets of gradients also stay
    as they are first made, so that a resumed run adds up in the same order.
    """
    # Without a queue, the contrast exchanges messages in its backward pass. A single bucket is sent after all of them,
    # and a group of its own keeps the two kinds of messages apart.
    options: dict[str, Any] = {} if config.queue_length or not config.contrast else {"bucket_cap_mb": 1 << 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions change a name
        return DistributedDataParallel(
            loss,
            process_group=dist.new_group(timeout=WORKING),
            find_unused_parameters=True,
            broadcast_buffers=False,
            **options,
        )
