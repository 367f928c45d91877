"""A lock that lets only one process at a time write to a folder."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import stat
from pathlib import Path

from pglcl.errors import UserError, WriteError

UNKNOWN = "another process"
_held: set[int] = set()  # file descriptors


def _release_in_child() -> None:
    """Closes the lock files. A fork shares them, but processes that prepare batches must not keep the locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


class FolderLock:
    """Locks a folder until the block or the process ends, in whatever way. A missing folder is made.

    The lock is the kernel's (``flock`` on ``.lock``), so nothing is left to clean up after ``kill -9``.

    Raises:
        UserError: another process holds it; the line says which.
        WriteError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / ".lock"
        self.descriptor = -1

    def __enter__(self) -> FolderLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # O_NOFOLLOW: a link could lead to another file, whose content would be lost.
            self.descriptor = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666
            )
        except OSError as error:
            raise WriteError(f"{self.folder}: cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._owner()
            os.close(self.descriptor)
            raise UserError(f"{self.folder}: {owner} writes to it; wait until it ends, or stop it") from None
        except OSError:
            pass  # a file system without locks
        _held.add(self.descriptor)
        with contextlib.suppress(OSError):
            if not self._is_ours():
                return self
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            os.ftruncate(self.descriptor, 0)
            myself = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
            os.pwrite(self.descriptor, json.dumps(myself).encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor in _held:
            _held.remove(self.descriptor)
            os.close(self.descriptor)

    def check(self) -> None:
        """Raises UserError when the folder was removed or renamed: files would go to a new folder of its name."""
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except OSError:
            same = False
        if not same:
            raise UserError(f"{self.folder}: was removed or renamed while the run wrote to it")

    def _is_ours(self) -> bool:
        """Whether the file is empty or names an owner. A `.lock` of another program is not written to."""
        status = os.fstat(self.descriptor)
        return stat.S_ISREG(status.st_mode) and (status.st_size == 0 or self._owner() != UNKNOWN)

    def _owner(self) -> str:
        try:
            owner = json.loads(os.pread(self.descriptor, 4096, 0))
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']},"
        except (OSError, ValueError, KeyError, TypeError):
            return UNKNOWN
