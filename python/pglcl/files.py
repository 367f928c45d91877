"""Files are written to a temporary name beside their own and renamed: whole, or not at all."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import hashlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from pglcl.errors import UserError, WriteError

PARTIAL = ".partial-"
MARK = b"pglcl sha256 "  # before the hash at the end of a file of tensors
DIGEST = 64  # hexadecimal digits


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name with the suffix of `path`, which takes its place when the block ends well."""
    # Only the end of a long name: with what is put before it, the whole would be longer than file systems allow.
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name[-40:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans_once(path.parent)
        with open(partial, "wb") as held:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until its writer has ended, however it ends
            yield partial
            os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def remove_orphans(folder: Path) -> None:
    """Removes what a killed process left behind. A temporary file whose writer lives is locked, and stays."""
    with contextlib.suppress(OSError):
        for partial in folder.glob(f"{PARTIAL}[0-9]*-*"):
            with contextlib.suppress(OSError, UserError), opened(partial) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()


@functools.cache
def _remove_orphans_once(folder: Path) -> None:
    remove_orphans(folder)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        # A file name may hold bytes that are no text; they are spelled out.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Raises ValueError for NaN and infinity, which JSON does not have: the caller writes None for them."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read from. Anything else of its name is refused: a named pipe would wait for ever, a device never end.

    Raises:
        OSError: as for open.
        UserError: there is no file, but something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        require_file(path, os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def require_file(path: Path, status: os.stat_result | None = None) -> None:
    """Raises UserError for what is there and is no file, and OSError where nothing is; a link counts as its target."""
    mode = (status or path.stat()).st_mode
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: must be a file, is a {kinds.get(stat.S_IFMT(mode), 'device')}")


def read_bytes(path: Path) -> bytes:
    with opened(path) as file:
        return file.read()


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content


class _HashedFile:
    """Counts what is written into a hash."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """What :func:`load_tensors` reads back: the file of torch.save, and the hash of its bytes at the end.

    Flushed to the disk before it takes the name.
    """
    with replacing(path) as partial, open(partial, "wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(state, hashed)  # type: ignore[arg-type]  # it asks for no more than write and flush
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error
        file.write(MARK + hashed.hash.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def load_tensors(path: Path) -> dict[str, Any]:
    """Raises UserError for any file that is not, bit for bit, what :func:`save_tensors` wrote."""
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    body, end = content[: -len(MARK) - DIGEST], content[-len(MARK) - DIGEST :]
    if not end.startswith(MARK):
        raise UserError(f"{path}: not a checkpoint of pglcl, or cut short: it does not end in the hash of its content")
    if end[len(MARK) :] != hashlib.sha256(body).hexdigest().encode():
        raise UserError(f"{path}: not a checkpoint of pglcl as it was written: the hash of its content does not fit")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise all sorts for a file that is none of theirs
        raise UserError(f"{path}: not a checkpoint of pglcl: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of pglcl: holds {type(state).__name__}")
    return state


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes, time of the last change, SHA-256 of the content: how a file is known again."""
    digest = hashlib.sha256()
    try:
        with opened(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return {"bytes": status.st_size, "modified": _date(status.st_mtime), "sha256": digest.hexdigest()}


def _date(seconds: float) -> str:
    """ISO 8601, UTC; the seconds themselves where a broken clock, or copying, left a year beyond 9999 or before 1."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s"


class Unchanged:
    """Files that are read more than once, and must be the same each time.

    Args:
        files: they are known again by what a change of their content changes, too: size and times, of which
            nobody can set back that of the inode. The inode itself is not the same twice on some network drives.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._states = {file: _state(file) for file in files}

    def only(self, files: Iterable[Path]) -> Unchanged:
        """Those of `files`, as they were when this was made."""
        chosen = Unchanged(())
        chosen._states = {file: self._states[file] if file in self._states else _state(file) for file in files}
        return chosen

    def check(self, hash_of: Callable[[Path], str] | None = None) -> None:
        """Raises UserError for the files that have changed since.

        Args:
            hash_of: SHA-256 of the content of each, by which one that was only touched or copied is still the same.
        """
        lines = []
        for file, before in self._states.items():
            now = _state(file)
            if now is None:
                lines.append(f"{file}: is gone, while it was still needed")
            elif now != before:
                if hash_of is None or fingerprint(file)["sha256"] != hash_of(file):
                    lines.append(f"{file}: has changed, while it was still needed")
                self._states[file] = now
        if lines:
            raise UserError(*lines)


def _state(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_writable(folder: Path) -> None:
    """Raises WriteError for a folder that cannot be written to, before time is spent on what goes there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f"{PARTIAL}{os.getpid()}-", dir=folder)
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):  # another process took it for an orphan
            os.unlink(name)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written: {error.strerror or error}") from error
