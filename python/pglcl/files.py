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
from collections.abc import Iterator
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
        for partial in folder.glob(f"{PARTIAL}*"):
            with contextlib.suppress(OSError), open(partial, "rb") as file:
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


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError, RecursionError) as error:
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
        content = path.read_bytes()
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
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    changed = datetime.datetime.fromtimestamp(status.st_mtime, datetime.timezone.utc)
    return {
        "bytes": status.st_size,
        "modified": changed.isoformat(timespec="seconds"),
        "sha256": digest.hexdigest(),
    }


def check_writable(folder: Path) -> None:
    """Before an hour is spent on what cannot be kept."""
    with replacing(folder / ".writable") as partial:
        partial.write_bytes(b"")
    (folder / ".writable").unlink()
