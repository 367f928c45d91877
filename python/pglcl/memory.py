"""Measures the free memory, refuses what would exceed it, and keeps what a step will need again."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from pglcl.errors import UserError

# Deflate compresses at most 1032 to 1.
DEFLATE_LIMIT = 1032
CGROUPS = (  # (limit, used) of a container: version 2, version 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def available_memory() -> int:
    """Bytes that this process can still get, from the machine and from its container, whichever has less."""
    free = [_machine()]
    for limit, used in CGROUPS:
        try:
            free.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no container, or one without a limit ("max")
            continue
    return max(0, min(free))


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Tells the C library to keep freed memory for the next step, instead of giving it back to the system.

    Otherwise the heap of some runs shrinks after each step, and grows again in the next one: measured are up to 15,000
    page faults and 40 ms of a step of 330 ms. :func:`require_memory` takes kept memory for free memory.
    """
    trim_threshold, mmap_threshold = -1, -3  # their names in malloc.h
    _call_glibc("mallopt", trim_threshold, 2**31 - 1)
    _call_glibc("mallopt", mmap_threshold, 2**30)


def _give_back() -> None:
    """Gives freed memory back to the system."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    """Calls a function that other C libraries lack; there, nothing happens."""
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    if function is not None:
        function(*arguments)


def in_words(size: float) -> str:
    """Bytes with a unit: 1536 is `1.5 KiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def require_memory(size: int, what: str) -> None:
    """Refuses to take more memory than there is.

    Args:
        size: bytes.
        what: the beginning of the message: a file or option, and what it asks for.

    Raises:
        UserError: `size` exceeds the free memory; the message has both numbers.
    """
    there = available_memory()
    if size > there:
        _give_back()
        there = available_memory()
    if size > there:
        raise UserError(f"{what} needs {in_words(size)} of memory, but {in_words(there)} are free")


def check_claim(path: Path, claimed: int, there: int | None = None) -> None:
    """Refuses a header that claims more voxels than the memory or the file can hold, before anything is allocated.

    Args:
        path: the file.
        claimed: bytes of voxels by the header.
        there: bytes of the file, if its voxels are raw or deflated.
    """
    if there is not None and claimed > DEFLATE_LIMIT * (there + 1024):
        raise UserError(
            f"{path}: truncated or damaged: its header claims {in_words(claimed)} of voxels, but the file has "
            f"{in_words(there)}"
        )
    require_memory(claimed, f"{path}: holds {in_words(claimed)} of voxels, which")
