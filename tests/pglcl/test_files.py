"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pglcl.errors import UserError, WriteError
from pglcl.files import _HashedFile, load_tensors, replacing, save_tensors, write_texts
from pglcl.unfinished import remove_unfinished, unfinished


def test_a_checkpoint_that_does_not_fit_names_the_reason(tmp_path: Path) -> None:
    """torch hides the error of a write behind one about a position. The earlier checkpoint stays."""
    path = tmp_path / "checkpoint.pt"
    save_tensors(path, {"step": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1, 4096, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(WriteError, match=r"checkpoint\.pt: cannot be written: File too large$"):
                save_tensors(path, {"step": torch.ones(300_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_tensors(path)["step"].sum() == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", [1, 2, 20, 40])
def test_ctrl_c_while_a_checkpoint_is_written_is_no_error_of_the_disk(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1, 1000))
    update = _HashedFile.write

    def write(self: _HashedFile, data: bytes) -> int:
        if next(calls) == call:
            monkeypatch.setattr(self, "file", Interrupted())
        return update(self, data)

    monkeypatch.setattr(_HashedFile, "write", write)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "checkpoint.pt", {f"a{i}": torch.ones(300) for i in range(9)})
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_a_checkpoint_is_hashed_or_pickled_is_no_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "checkpoint.pt", {"a": torch.ones(300), "b": Interrupted()})
    monkeypatch.setattr("pglcl.files.hashlib.sha256", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "checkpoint.pt", {"a": torch.ones(300)})
    assert list(tmp_path.iterdir()) == []


def test_processes_with_the_same_number_write_to_different_files(tmp_path: Path) -> None:
    """Containers number their processes from 1, and may share a folder."""
    path = tmp_path / "scores.csv"
    with replacing(path) as one, replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]


class Interrupted:
    """A file, a hash or an object of a checkpoint, while the user presses Ctrl-C."""

    def write(self, data: bytes) -> int:
        raise KeyboardInterrupt

    def update(self, data: bytes) -> None:
        raise KeyboardInterrupt

    def __reduce__(self) -> str:
        raise KeyboardInterrupt


def calls(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function, whose call of this number is followed by Ctrl-C."""
    count = iter(range(1, 1000))

    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        if next(count) == number:
            raise KeyboardInterrupt
        return result

    return call


def test_files_that_belong_together_get_their_names_after_all_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, last = (tmp_path / name for name in ("first", "second", "last"))
    write_texts({first: "old", second: "old", last: "old"})
    with pytest.raises(TypeError):
        write_texts({first: "new", second: "new", last: 3})  # type: ignore[dict-item]
    assert [path.read_text() for path in (first, second, last)] == ["old"] * 3
    monkeypatch.setattr(os, "replace", calls(os.replace, 1))
    with pytest.raises(KeyboardInterrupt):
        write_texts({first: "new", second: "new", last: "new"})
    assert [path.read_text() for path in (first, second, last)] == ["old", "old", "new"]
    assert len(list(tmp_path.iterdir())) == 3
    assert not unfinished


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)  # as on FAT
    path = tmp_path / "mask"
    with replacing(path, new=True) as partial:
        partial.write_text("first")
    with pytest.raises(UserError, match="mask: appeared while this command ran"), replacing(path, new=True) as partial:
        partial.write_text("second")
    assert path.read_text() == "first"
    with replacing(path) as partial:
        partial.write_text("third")
    assert path.read_text() == "third"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_ctrl_c_during_the_cleaning_leaves_its_file_to_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "mask"):
            raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 1
    remove_unfinished()
    assert list(tmp_path.iterdir()) == []
    assert not unfinished
