"""Files are written to a temporary name beside their own and renamed: whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pglcl.errors import UserError, WriteError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name with the suffix of `path`, which takes its place when the block ends well."""
    # Only the end of a long name: with what is put before it, the whole would be longer than file systems allow.
    partial = path.with_name(f".partial-{os.getpid()}-{path.name[-40:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


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


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """What :func:`load_tensors` reads back, flushed to the disk before it takes the name."""
    with replacing(path) as partial, open(partial, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error
        file.flush()
        os.fsync(file.fileno())


def load_tensors(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except Exception as error:  # torch and pickle raise all sorts for a file that is none of theirs
        raise UserError(f"{path}: not a checkpoint of pglcl: {str(error).splitlines()[0]}") from error


def check_writable(folder: Path) -> None:
    """Before an hour is spent on what cannot be kept."""
    with replacing(folder / ".writable") as partial:
        partial.write_bytes(b"")
    (folder / ".writable").unlink()
