"""Reads and writes files. Each is written whole or not at all: under a temporary name beside its own, then renamed."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import hashlib
import io
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from pglcl.errors import UserError, WriteError, first_line
from pglcl.unfinished import unfinished

PARTIAL = ".partial-"
MARK = b"pglcl sha256 "  # before the hash at the end of a file of tensors
DIGEST = 64  # hexadecimal digits


@contextlib.contextmanager
def replacing(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Gives a temporary name with the suffix of `path`. Its file replaces `path` when the block ends without an error.

    Files that belong together take blocks within each other: no file gets its name before all are written, and that of
    the innermost block is the first.

    Args:
        path: the file.
        new: replace nothing, not even a file that appears while the block runs.

    Raises:
        WriteError: the system refuses to write.
        UserError: `new`, and there is a file.
    """
    # Only the end of a long name: together with the prefix, it could be longer than file systems allow. A number alone
    # could be that of a process in another container or on another machine.
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}-{path.name[-40:]}")
    unfinished.add(partial)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans_once(path.parent)
        with open(partial, "wb") as held:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the writer ends, in whatever way
            yield partial
            if new:
                _rename_to_new(partial, path)
            else:
                os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
        unfinished.discard(partial)


def _rename_to_new(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)  # unlike a renaming, it refuses to replace
        return
    except FileExistsError:
        pass
    except OSError:  # some file systems have no hard links
        if not os.path.lexists(path):
            os.rename(partial, path)
            return
    raise UserError(f"{path}: appeared while this command ran, and is kept; add --overwrite to replace it")


def remove_orphans(folder: Path) -> None:
    """Removes the temporary files of killed processes. A file whose writer still runs is locked, and stays."""
    with contextlib.suppress(OSError):
        for partial in folder.glob(f"{PARTIAL}[0-9]*-*"):
            with contextlib.suppress(OSError, UserError), opened(partial) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()


@functools.cache
def _remove_orphans_once(folder: Path) -> None:
    remove_orphans(folder)


def write_text(path: Path, text: str) -> None:
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Writes files that belong together. None gets its name before all are written, and the last one is the first."""
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            # The text may contain a file name with bytes that are no text; these are escaped.
            stack.enter_context(replacing(path)).write_text(text, encoding="utf-8", errors="backslashreplace")


def as_json(value: Any) -> str:
    """A JSON file's text. Raises ValueError for NaN and infinity, which JSON lacks: the caller must pass None."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, as_json(value))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading. Anything else is refused: a pipe may never begin, and a device may never end.

    Raises:
        OSError: as for open.
        UserError: `path` is not a file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        require_file(path, os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def require_file(path: Path, status: os.stat_result | None = None) -> None:
    """Raises UserError if `path` is not a file, and OSError if nothing is there. A link counts as its target."""
    mode = (status or path.stat()).st_mode
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: must be a file, is a {kinds.get(stat.S_IFMT(mode), 'device')}")


def read_bytes(path: Path) -> bytes:
    """Raises UserError if there is no such file, or it cannot be read."""
    try:
        with opened(path) as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    content = read_bytes(path)
    try:
        # Programs of Windows often write a byte order mark.
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Python would keep only the last of several values of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content


class _HashedFile:
    """A file that hashes what is written to it, and keeps the error of a write, which torch may hide behind others."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: BaseException | None = None  # also of Ctrl-C, which would otherwise seem to be a full disk

    def write(self, data: bytes) -> int:
        try:
            self.hash.update(data)
            return self.file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Writes a file for :func:`load_tensors`: that of torch.save, followed by the hash of its bytes.

    It is flushed to the disk before it gets its name.
    """
    with replacing(path) as partial, open(partial, "wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(state, hashed)  # type: ignore[arg-type]  # it needs only write and flush
        except RuntimeError as error:  # raised by torch when the disk is full, and in the place of Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise hashed.error or OSError(first_line(error)) from error
        file.write(MARK + hashed.hash.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def load_tensors(path: Path) -> dict[str, Any]:
    """Raises UserError for any file that is not, bit for bit, what :func:`save_tensors` wrote."""
    content = read_bytes(path)
    body, end = content[: -len(MARK) - DIGEST], content[-len(MARK) - DIGEST :]
    if not end.startswith(MARK):
        raise UserError(f"{path}: not a checkpoint of pglcl, or truncated: it does not end in the hash of its content")
    if end[len(MARK) :] != hashlib.sha256(body).hexdigest().encode():
        raise UserError(f"{path}: damaged or changed: its content does not have the hash that pglcl wrote with it")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds of errors for the files of others
        raise UserError(f"{path}: not a checkpoint of pglcl: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of pglcl: holds {type(state).__name__}")
    return state


def fingerprint(path: Path) -> dict[str, Any]:
    """The marks that identify a file: size in bytes, time of the last change, SHA-256 of the content."""
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
    """ISO 8601, UTC. For a year after 9999 or before 1, which a broken clock or copying may leave: the seconds."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s"


class Unchanged:
    """Files that are read more than once, and must be the same each time.

    A change of the content also changes the size or a time of the file. Nobody can set back the time of the inode. The
    number of the inode is not compared, since it may change on network drives.

    Args:
        files: the paths, which may be missing.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._states = {file: _state(file) for file in files}

    def only(self, files: Iterable[Path]) -> Unchanged:
        """The same check for `files` alone. A file that this one does not hold counts as it is now."""
        chosen = Unchanged(())
        chosen._states = {file: self._states[file] if file in self._states else _state(file) for file in files}
        return chosen

    def check(self, hash_of: Callable[[Path], str] | None = None) -> None:
        """Raises UserError for the files that have changed since.

        Args:
            hash_of: the SHA-256 that a file should have; so a file that was only touched or copied is unchanged.
        """
        lines = []
        for file, before in self._states.items():
            now = _state(file)
            if now is None:
                lines.append(f"{file}: was removed while this command still needed it")
            elif now != before:
                if hash_of is None or fingerprint(file)["sha256"] != hash_of(file):
                    lines.append(f"{file}: was changed while this command still needed it")
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
    """Raises WriteError for a folder that cannot be written to, before time is spent on its files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f"{PARTIAL}{os.getpid()}-", dir=folder)
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):  # another process removed it as an orphan
            os.unlink(name)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written: {error.strerror or error}") from error
