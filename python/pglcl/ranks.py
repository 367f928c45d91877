"""One rank among many."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
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

MEETING = "PGLCL_MEETING_SECONDS"  # the environment variable for another time than this
MEETING_SECONDS = 120  # that ranks wait for each other at their start
WORKING = datetime.timedelta(minutes=30)  # that a rank waits for one that works, on an own share of volumes say


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    group: what torch.distributed calls them, or None for a single process. device: the tensors that are exchanged are
    there.
    """

    group: Any = None
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that speaks and writes."""
        return self.rank == 0

    def raise_together(self, lines: Sequence[str]) -> None:
        """Raises :class:`UserError` on every rank when one of them has `lines` to say, in the order of the ranks."""
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

    def is_any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sum over the ranks of each number."""
        if self.group is None:
            return list(numbers)
        # float32 where a device has no float64
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(numbers, dtype=dtype, device=self.device)
        dist.all_reduce(total, group=self.group)
        return [float(value) for value in total]

    def gather(self, value: Any) -> list[Any]:
        """`value` of each rank."""
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
    """`device`, or of several GPUs the one of this rank, which becomes the current one.

    Raises:
        UserError: there are fewer GPUs than ranks.
    """
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    own, count = _number("LOCAL_RANK"), torch.cuda.device_count()
    if own >= count:
        raise UserError(f"each rank needs a GPU of its own: rank {own} of this machine finds {count}")
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


@contextlib.contextmanager
def launched_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone.

    Raises:
        UserError: a rank does not come to the meeting, or is lost later.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    if size == 1:
        yield Ranks(device=device)
        return
    # The optimizer's first step imports this, which then keeps the group that it finds, and with it threads that still
    # run while the interpreter is taken down, which now and then abort it. Imported before, it finds none.
    import torch._dynamo  # noqa: F401

    rank = _number("RANK", most=size - 1)
    with _lost_ranks_explained():
        form_group("nccl" if device.type == "cuda" else "gloo", rank, size)
        try:
            yield Ranks(dist.group.WORLD, rank, size, device)
            dist.barrier()  # no rank leaves while another still talks to it
        finally:
            dist.destroy_process_group()


def form_group(backend: str, rank: int, size: int) -> None:
    """Makes the process group of all ranks, which wait for each other a short time only.

    Raises:
        UserError: one of them did not come.
    """
    seconds = _number(MEETING, MEETING_SECONDS, least=1)
    patience = datetime.timedelta(seconds=seconds)
    address = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", least=1, most=65535)
    if not address[0]:
        raise UserError("MASTER_ADDR must be the address of rank 0, got nothing; torchrun and --processes set it")
    again = f"a rank that has ended, or never began, cannot come; {MEETING}=600 would wait for ten minutes"
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # or torchrun does
    if not hosts and (reason := _unreachable(address, seconds)):
        raise UserError(
            f"rank 0 does not answer at {address[0]}:{address[1]} after {seconds} seconds ({reason}): {again}"
        )
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            *address, size, hosts, patience, wait_for_workers=False, multi_tenant=True
        )
        store.set(f"pglcl rank {rank}", "is here")
        names = [f"pglcl rank {other}" for other in range(size)]
        with contextlib.suppress(dist.DistStoreError):
            store.wait(names, patience)
        missing = ", ".join(str(other) for other, name in enumerate(names) if not store.check([name]))
    except dist.DistError as error:
        raise UserError(f"ranks cannot meet at {address[0]}:{address[1]}: {_first_line(error)}") from error
    if missing:
        raise UserError(f"of {size} ranks, {missing} did not come within {seconds} seconds: {again}")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    # From here on a rank may work long before the next one hears of it.
    group = dist.group.WORLD
    assert group is not None
    group.set_timeout(WORKING)


def _unreachable(address: tuple[str, int], seconds: float) -> str:
    """Why nobody listens there, tried for so long; nothing when somebody does."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address, timeout=max(1.0, until - time.monotonic())).close()
            return ""
        except OSError as error:
            if time.monotonic() > until:
                return error.strerror or str(error)
        time.sleep(0.1)


def _number(name: str, default: int | None = None, *, least: int = 0, most: int = 1 << 31) -> int:
    """A whole number from the environment, where a launcher leaves it.

    Raises:
        UserError: it is none, or out of range; or is missing where there is no `default`.
    """
    text = os.environ.get(name, "") or ("" if default is None else str(default))
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise UserError(f"{name} must be a whole number from {least} to {most}, got {text!r}; torchrun sets it")
    return int(text)


@contextlib.contextmanager
def _lost_ranks_explained() -> Iterator[None]:
    """Turns what torch.distributed raises when another rank has ended into a :class:`UserError`."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no type of its own for this
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
            raise
        raise UserError(
            f"another rank is gone: it was killed, or its own lines say why ({_first_line(error)}). --resume goes on "
            "from the last checkpoint"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


def averaging(loss: nn.Module, config: TrainConfig) -> nn.Module:
    """The same loss; its gradients are averaged over the ranks while ``backward`` runs.

    With `find_unused_parameters` a rank that has no anchors holds nobody up, and buckets stay as they are first made: a
    run that is resumed adds up in the same order.
    """
    # Without a queue, the contrast exchanges keys in its own backward pass: one bucket comes after all of that. A group
    # of its own keeps the two kinds of messages apart.
    options: dict[str, Any] = {} if config.queue_length or not config.contrast else {"bucket_cap_mb": 1 << 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a name that newer versions change
        return DistributedDataParallel(
            loss,
            process_group=dist.new_group(timeout=WORKING),
            find_unused_parameters=True,
            broadcast_buffers=False,
            **options,
        )
