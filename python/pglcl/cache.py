"""Prepared volumes on the disk, for data larger than memory. Batches read only the parts that they need."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pglcl import formats
from pglcl.config import TrainConfig
from pglcl.errors import UserError
from pglcl.files import fingerprint, read_json, write_json
from pglcl.formats.names import list_folder
from pglcl.intensity import Intensity
from pglcl.labels import LabelMap
from pglcl.layouts import Case
from pglcl.prepare import Prepared, prepare
from pglcl.volumes import Geometry

VERSION = 3  # of the format; entries of another version are not used
PARTIAL = ".partial-"


def prepare_cached(
    folder: Path,
    case: Case,
    config: TrainConfig,
    slice_axis: int | None,
    intensity: Intensity,
    labels: LabelMap | None = None,
) -> Prepared:
    """The result of :func:`pglcl.prepare.prepare`, with tensors that are memory-mapped from `folder`.

    The name of an entry is a hash of the files (path, size, times of change) and of everything that their preparation
    depends on. So many runs can share a folder. A damaged entry is made again.

    Raises:
        UserError: the image cannot be read, or the entry cannot be written or read back.
    """
    entry = folder / _key(case, config, slice_axis, intensity, labels)
    found = _load(entry, case)
    if found is None:
        prepared = prepare(case, config, slice_axis, intensity, labels)
        for _ in range(3):  # another process may remove the damaged entry that it found before this one was stored
            _store(entry, prepared)
            found = _load(entry, case)
            if found is not None:
                break
        else:
            raise UserError(f"{entry}: this entry of --cache was just written and cannot be read back")
    return found


def _key(case: Case, config: TrainConfig, slice_axis: int | None, intensity: Intensity, labels: LabelMap | None) -> str:
    files = [*case.images, *([case.label] if labels and case.label else [])]
    parts = [part for path in files for part in (list_folder(path) if path.is_dir() else [path])]
    described = {
        "version": VERSION,
        "files": [_known_by(path) for path in parts],
        "size": config.size,
        "whole_slices": config.whole_slices,
        "spacing": config.target_spacing,
        "slice_axis": slice_axis,
        "intensity": intensity.state(),
        "labels": labels.state() if labels else None,
    }
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return f"{case.name[:40]}-{digest[:24]}"


def _known_by(path: Path) -> tuple[str | int, ...]:
    """Path, size and times of a file. The inode's time is one of them: `cp -p` sets back only that of the content."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _store(entry: Path, prepared: Prepared) -> None:
    """Writes under a temporary name and renames, so that no entry is incomplete. Slices follow one another."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = entry.parent / f"{PARTIAL}{secrets.token_hex(8)}"
        partial.mkdir()  # with the rights that the umask leaves: tempfile's folders are closed to other users
        held = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held as long as the writer lives
            np.save(partial / "image.npy", prepared.image.movedim(-1, 0).numpy())
            if prepared.label is not None:
                np.save(partial / "label.npy", prepared.label.movedim(-1, 0).numpy())
            geometry = prepared.geometry
            about: dict[str, Any] = {"shape": geometry.shape, "resized": geometry.resized, "spacing": prepared.spacing}
            about["files"] = {path.name: fingerprint(path)["sha256"] for path in partial.iterdir()}
            write_json(partial / "geometry.json", {**about, "sha256": _hash_of(about)})
            if entry.exists():
                if _load(entry, prepared.case) is not None:
                    return  # another process was faster, and may have mapped the entry by now
                shutil.rmtree(entry, ignore_errors=True)
            os.replace(partial, entry)
        finally:
            os.close(held)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if not entry.exists():
            raise UserError(f"{entry}: cannot be written: {error.strerror or error}") from error


def _load(entry: Path, case: Case) -> Prepared | None:
    if not (entry / "geometry.json").is_file():
        return None
    try:
        about: dict[str, Any] = read_json(entry / "geometry.json")
        if about.pop("sha256") != _hash_of(about):
            return None
        if any(fingerprint(entry / name)["sha256"] != digest for name, digest in about["files"].items()):
            return None
        image = _mapped(entry / "image.npy")
        label = _mapped(entry / "label.npy") if "label.npy" in about["files"] else None
        geometry = Geometry(tuple(about["shape"]), tuple(about["resized"]))
        return Prepared(case, image, label, geometry, tuple(about["spacing"]), formats.read_source(case.images[0]))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    except UserError:
        return None


def _hash_of(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _mapped(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c")).movedim(0, -1)


def clear_partial(folder: Path) -> None:
    """Removes the unfinished entries of killed runs. An entry that another run is writing is locked, and stays."""
    for path in folder.glob(f"{PARTIAL}*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(held)
