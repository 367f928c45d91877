"""The cache of prepared volumes."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pglcl import cache
from pglcl.cache import clear_partial
from pglcl.layouts import Case
from pglcl.prepare import Prepared
from pglcl.training_data import load_training_data

from tests.pglcl.folders import decathlon, plain, save, tiny


def test_a_cache_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    """As open as the umask lets any new folder be: several users may share it."""
    before = os.umask(0o022)
    try:
        load_training_data(plain(tmp_path / "data"), tiny(cache=str(tmp_path / "cache")))
    finally:
        os.umask(before)
    entries = [*(tmp_path / "cache").iterdir()]
    assert {entry.stat().st_mode & 0o777 for entry in entries} == {0o755}
    assert {path.stat().st_mode & 0o777 for entry in entries for path in entry.iterdir()} == {0o644}


@pytest.mark.parametrize("dims", [2, 3])
def test_cached_volumes_equal_those_without_a_cache(dims: int, tmp_path: Path) -> None:
    root = decathlon(tmp_path / "data")
    options = {"spatial_dims": dims, "image_size": "16" if dims == 3 else "32"}
    plainly = load_training_data(root, tiny(**options))
    cached = [load_training_data(root, tiny(**options, cache=str(tmp_path / "cache"))) for _ in range(2)]
    entries = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(entries) == len(plainly.labelled) + len(plainly.unlabelled)
    for data in cached:
        for pool in ("labelled", "unlabelled"):
            for a, b in zip(getattr(plainly, pool), getattr(data, pool), strict=True):
                assert a.case == b.case
                assert (a.image == b.image).all()
                assert (a.label is None and b.label is None) or (a.label == b.label).all()
                assert (a.geometry, a.spacing) == (b.geometry, b.spacing)
                assert (a.foreground == b.foreground).all()
    (tmp_path / "cache" / entries[0] / "image.npy").write_bytes(b"damaged")
    (tmp_path / "cache" / ".partial-left").mkdir()
    again = load_training_data(root, tiny(**options, cache=str(tmp_path / "cache")))
    assert (again.labelled[0].image == plainly.labelled[0].image).all()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == entries


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "geometry.json"])
def test_a_cache_entry_with_a_flipped_bit_is_prepared_again(name: str, tmp_path: Path) -> None:
    root, options = decathlon(tmp_path / "data"), {"cache": str(tmp_path / "cache"), "image_size": "32"}
    whole = load_training_data(root, tiny(image_size="32")).labelled[0]  # in memory
    load_training_data(root, tiny(**options))
    (entry,) = (tmp_path / "cache").glob(f"{whole.case.name}-*")
    content = bytearray((entry / name).read_bytes())
    digit = content.index(b"20") if name == "geometry.json" else -3
    content[digit] ^= 1
    (entry / name).write_bytes(content)
    again = load_training_data(root, tiny(**options)).labelled[0]
    assert again.label is not None
    assert (again.image == whole.image).all()
    assert (again.label == whole.label).all()
    assert again.geometry == whole.geometry


def test_an_entry_that_another_process_stored_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process may have mapped it, and would find its files removed."""
    root, options = decathlon(tmp_path / "data"), {"cache": str(tmp_path / "cache"), "image_size": "32"}
    load_training_data(root, tiny(**options))
    before = {path: path.stat().st_ino for path in (tmp_path / "cache").glob("*/*")}
    load, seen = cache._load, set()

    def late(entry: Path, case: Case) -> Prepared | None:
        """At first, the entry of the other process is not there yet."""
        if entry in seen:
            return load(entry, case)
        seen.add(entry)
        return None

    monkeypatch.setattr(cache, "_load", late)
    load_training_data(root, tiny(**options))
    assert {path: path.stat().st_ino for path in (tmp_path / "cache").glob("*/*")} == before


def test_an_entry_that_another_process_removes_is_stored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That process found a damaged entry, and removes it only when this one has already replaced it."""
    root, options = decathlon(tmp_path / "data"), {"cache": str(tmp_path / "cache"), "image_size": "32"}
    store, removed = cache._store, set()

    def store_and_remove(entry: Path, prepared: Prepared) -> None:
        store(entry, prepared)
        if entry not in removed:
            shutil.rmtree(entry)
            removed.add(entry)

    monkeypatch.setattr(cache, "_store", store_and_remove)
    assert load_training_data(root, tiny(**options)).labelled
    assert removed


def test_a_volume_that_was_replaced_is_not_taken_from_a_cache(tmp_path: Path) -> None:
    """This holds even for a volume of the same size and time, as a copy that keeps times may leave."""
    root, options = plain(tmp_path / "data"), {"cache": str(tmp_path / "cache")}
    path = root / "images" / "case00.nii"
    image = nib.load(root / "images" / "case00.nii.gz").get_fdata().astype(np.float32)
    (root / "images" / "case00.nii.gz").unlink()
    for sign in (1, -1):
        save(path, sign * image)
        os.utime(path, (10, 10))
        prepared = load_training_data(root, tiny(**options)).labelled[0].image
        assert (prepared == load_training_data(root, tiny()).labelled[0].image).all()


def test_entries_of_another_run_stay_in_the_cache(tmp_path: Path) -> None:
    """A new run removes volumes that a kill left unfinished, but none that another run is writing."""
    (tmp_path / ".partial-left").mkdir()
    (tmp_path / ".partial-lives").mkdir()
    held = os.open(tmp_path / ".partial-lives", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    clear_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".partial-lives"]
    os.close(held)
    clear_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []
