"""Ranks that meet, ranks that do not come, and ranks that are lost."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pglcl import cli
from pglcl.errors import UserError
from pglcl.launcher import PARENT, own_rank
from pglcl.meeting import lost_ranks_explained
from pglcl.ranks import device_of_rank, launched_ranks

from tests.conftest import free_ports

CPU = torch.device("cpu")


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port of this machine, for two ranks to meet; this process is the first of them."""
    (number,) = free_ports()
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(number)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return number


def another_rank(work: object) -> torch.multiprocessing.SpawnProcess:
    """A process that is the second rank."""
    process = torch.multiprocessing.get_context("spawn").Process(target=work)
    before = os.environ.get("RANK", "")
    os.environ["RANK"] = "1"
    try:
        process.start()
    finally:
        os.environ["RANK"] = before
    return process


def leave_no_thread() -> None:
    with launched_ranks(CPU):
        layer = torch.nn.Linear(2, 1)
        layer(torch.ones(1, 2)).sum().backward()
        torch.optim.AdamW(layer.parameters()).step()
    threads = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads


def end_after_the_meeting() -> None:
    with launched_ranks(CPU):
        os._exit(9)


def talk() -> None:
    with launched_ranks(CPU) as group:
        for _ in range(100):
            group.sum([1.0])


def find_nobody() -> None:
    before = time.monotonic()
    with pytest.raises(UserError, match="another rank has ended: it was killed"), launched_ranks(CPU):
        pytest.fail("one rank alone begins")
    assert time.monotonic() - before < 110  # not half an hour; much else may run here


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_process_group_leaves_no_thread(port: int) -> None:
    """A thread that outlives the interpreter sometimes aborts it."""
    other = another_rank(leave_no_thread)
    leave_no_thread()
    other.join()
    assert other.exitcode == 0


@pytest.mark.parametrize(("rank", "message"), [
    ("0", "^pglcl: of 2 ranks, rank 1 did not connect within 1 seconds: check that every rank"),
    ("1", r"^pglcl, rank 1: rank 0 did not answer at localhost:\d+ within 1 seconds \(Connection refused\): check"),
])  # fmt: skip
def test_a_rank_that_does_not_connect_is_named(
    rank: str,
    message: str,
    port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("PGLCL_MEETING_SECONDS", "1")
    before = time.monotonic()
    assert cli.main(["train", str(tmp_path), "-o", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert time.monotonic() - before < 110  # not half an hour; much else may run here
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not dist.is_initialized()


@pytest.mark.usefixtures("port")
def test_a_rank_that_ends_before_the_group_is_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has announced itself, so the other rank makes the group, and must not wait longer for that, either."""
    monkeypatch.setenv("PGLCL_MEETING_SECONDS", "5")
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, 2, True, wait_for_workers=False, multi_tenant=True)
    store.set("pglcl rank 0", "is here")
    other = another_rank(find_nobody)
    other.join()
    assert other.exitcode == 0


def test_a_lost_rank_is_an_error_of_one_line(port: int) -> None:
    other = another_rank(end_after_the_meeting)
    with pytest.raises(UserError, match=r"another rank has ended: it was killed.*--resume continues"):
        talk()
    other.join()
    assert other.exitcode == 9
    assert not dist.is_initialized()


def test_other_errors_of_a_rank_are_raised_unchanged() -> None:
    with pytest.raises(RuntimeError, match="a bug"), lost_ranks_explained():
        raise RuntimeError("a bug")


@pytest.mark.parametrize(("changes", "message"), [
    ({"RANK": "2"}, "RANK must be a whole number from 0 to 1, got '2'"),
    ({"RANK": ""}, "RANK must be a whole number from 0 to 1, got ''"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number from 1 to .*, got 'two'"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT must be a whole number from 1 to 65535, got '0'"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ({"PGLCL_MEETING_SECONDS": "-1"}, "PGLCL_MEETING_SECONDS must be a whole number from 1"),
])  # fmt: skip
def test_environment_variables_of_a_launcher_are_checked(
    changes: dict[str, str], message: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), launched_ranks(CPU):
        pytest.fail("began")


def test_a_rank_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="each rank needs its own GPU: rank 3 of this machine finds 2 GPUs"):
        device_of_rank(torch.device("cuda"))
    assert device_of_rank(CPU) == CPU


def test_rank_in_the_environment_alone_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may leave RANK in the environment. The command must not do nothing and exit with 0."""
    for size, rank, own in (("", "1", 0), ("1", "1", 0), ("2", "1", 1), ("2", "x", 0), ("2", "", 0)):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", rank)
        assert own_rank() == own


def test_processes_under_torchrun_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv(PARENT, raising=False)
    assert cli.main(["train", str(tmp_path), "-o", str(tmp_path / "run"), "--processes", "2"]) == 2
    assert "--processes cannot be used under torchrun" in capsys.readouterr().err


def test_wrong_options_are_printed_by_the_first_rank_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank))
        assert cli.main(["train", "--nosuch"]) == 2
        assert capsys.readouterr().err.count("No such option: --nosuch") == said
        told = json.loads((tmp_path / rank).read_text())
        assert told["message"]["extraInfo"]["py_callstack"].startswith("Error: No such option: --nosuch")
