"""How the processes of a run find each other, and the errors when one of them does not start or ends early."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from pglcl.errors import UserError, first_line

MEETING = "PGLCL_MEETING_SECONDS"  # the environment variable that replaces the next constant
MEETING_SECONDS = 120  # how long ranks wait for each other at their start
WORKING = datetime.timedelta(minutes=30)  # how long a rank waits for one that works, for example on volumes


def form_group(backend: str, rank: int, size: int) -> None:
    """Makes the process group of all ranks, which wait for each other only a short time.

    Raises:
        UserError: one of them did not connect in time.
    """
    seconds = number_from_environment(MEETING, MEETING_SECONDS, least=1)
    store = _wait_for_all_ranks(rank, size, seconds)
    patience = datetime.timedelta(seconds=seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    # From here on, a rank may work for a long time before the others hear from it.
    group = dist.group.WORLD
    assert group is not None
    group.set_timeout(WORKING)


def _wait_for_all_ranks(rank: int, size: int, seconds: int) -> Any:
    """The store in which all ranks have announced themselves."""
    host, port = os.environ.get("MASTER_ADDR", ""), number_from_environment("MASTER_PORT", least=1, most=65535)
    if not host:
        raise UserError("MASTER_ADDR is not set. It must be the address of rank 0; torchrun and --processes set it")
    again = f"check that every rank was started and has not ended; {MEETING}=600 waits for ten minutes"
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # otherwise torchrun keeps it
    if not keeps_store and (reason := _unreachable(host, port, seconds)):
        raise UserError(f"rank 0 did not answer at {host}:{port} within {seconds} seconds ({reason}): {again}")
    patience = datetime.timedelta(seconds=seconds)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, size, keeps_store, patience, wait_for_workers=False, multi_tenant=True
        )
        store.set(f"pglcl rank {rank}", "is here")
        names = [f"pglcl rank {other}" for other in range(size)]
        with contextlib.suppress(dist.DistStoreError):
            store.wait(names, patience)
        missing = ", ".join(f"rank {other}" for other, name in enumerate(names) if not store.check([name]))
    except dist.DistError as error:
        raise UserError(f"ranks cannot meet at {host}:{port}: {first_line(error)}") from error
    if missing:
        raise UserError(f"of {size} ranks, {missing} did not connect within {seconds} seconds: {again}")
    return store


def _unreachable(host: str, port: int, seconds: float) -> str:
    """The reason why no process answers at `host` and `port` within `seconds`; empty when one does."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, until - time.monotonic())).close()
            return ""
        except OSError as error:
            if time.monotonic() > until:
                return error.strerror or str(error)
        time.sleep(0.1)


def number_from_environment(name: str, default: int | None = None, *, least: int = 0, most: int = 1 << 31) -> int:
    """A whole number from an environment variable that a launcher sets.

    Raises:
        UserError: it is no whole number, or out of range; or it is missing and there is no `default`.
    """
    text = os.environ.get(name, "") or ("" if default is None else str(default))
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise UserError(f"{name} must be a whole number from {least} to {most}, got {text!r}; torchrun sets it")
    return int(text)


@contextlib.contextmanager
def lost_ranks_explained() -> Iterator[None]:
    """Turns the error of torch.distributed when another rank has ended into a :class:`UserError`."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
            raise
        raise UserError(
            f"another rank has ended: it was killed, or it printed why ({first_line(error)}). --resume continues from "
            "the last checkpoint"
        ) from error
