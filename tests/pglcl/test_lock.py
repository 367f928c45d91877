"""Only one process at a time writes to a folder, and a killed one leaves nothing to clean up."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from pglcl.errors import UserError, WriteError
from pglcl.files import remove_orphans, replacing
from pglcl.lock import FolderLock
from pglcl.train import Training

from tests.pglcl.folders import plain, tiny

fork = multiprocessing.get_context("fork")


def hold(folder: Path, ready: Any) -> None:
    with FolderLock(folder):
        ready.set()
        signal.pause()


def wait(ready: Any) -> None:
    ready.set()
    signal.pause()


def test_the_error_names_the_owner_and_a_kill_frees_the_folder(tmp_path: Path) -> None:
    data, run, ready = plain(tmp_path / "data"), tmp_path / "run", fork.Event()
    owner = fork.Process(target=hold, args=(run, ready))
    owner.start()
    assert ready.wait(60)
    for resume in (False, True):
        with pytest.raises(UserError) as caught:
            Training(data, run, tiny(), resume=resume, quiet=True).run()
        (line,) = caught.value.lines
        assert line.startswith(f"{run}: process {owner.pid} on {os.uname().nodename}, since 20")
        assert [path.name for path in run.iterdir()] == [".lock"]
    os.kill(owner.pid or 0, signal.SIGKILL)
    owner.join()
    with FolderLock(run):
        pass


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Processes that prepare batches outlive a killed training for a while."""
    ready = fork.Event()
    with FolderLock(tmp_path):
        child = fork.Process(target=wait, args=(ready,))
        child.start()
        assert ready.wait(60)
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), FolderLock(tmp_path):
            pass
    with FolderLock(tmp_path):
        pass
    child.kill()
    child.join()


def test_a_folder_that_moves_away_is_noticed(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run") as lock:
        lock.check()
        (tmp_path / "run").rename(tmp_path / "other")
        with pytest.raises(UserError, match="was removed or renamed"):
            lock.check()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").write_text("")
        with pytest.raises(UserError, match="was removed or renamed"):
            lock.check()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(WriteError, match="cannot be written"), FolderLock(folder):
            pass


def test_only_orphans_are_removed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".partial-3-pipe")  # reading it would wait for ever
    (tmp_path / ".partial-of-others").write_text("kept")
    orphan, alive = tmp_path / ".partial-1-a.json", tmp_path / ".partial-2-b.json"
    orphan.write_text("half")
    with open(alive, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_orphans(tmp_path)
    (tmp_path / ".partial-3-pipe").unlink()
    (tmp_path / ".partial-of-others").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {alive.name}
    with replacing(tmp_path / "whole.json") as partial:
        partial.write_text("{}")
        remove_orphans(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.json"}
