"""The needs of a training are compared with the machine before it begins."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pglcl import limits
from pglcl.batches import StepBatches, loader
from pglcl.cli import main
from pglcl.config import TrainConfig
from pglcl.errors import UserError, WriteError
from pglcl.limits import bytes_of_a_step, check_memory, check_resources, check_threads, most_workers
from pglcl.record import MetricsLog
from pglcl.train import Training
from pglcl.training_data import load_training_data
from torch.multiprocessing import reductions

from tests.conftest import ROOT
from tests.pglcl.folders import plain, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def batches(folder: Path) -> StepBatches:
    data = load_training_data(folder, tiny())
    return StepBatches(data.labelled, data.unlabelled, tiny())


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": "1000000"},
        {"batch_size": 10**9},
        {"queue_length": 10**9},
        {"channels": "16,100000000"},
        {"embedding_dim": 10**9},
        {"spatial_dims": 3, "image_size": "4096"},
    ],
    ids=str,
)
def test_a_step_that_needs_more_memory_than_there_is_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"a step takes at least .*, but cpu has .*: reduce --batch-size"):
        check_resources(TrainConfig(**options), torch.device("cpu"), 1)


def test_bytes_of_a_step_are_those_that_autograd_keeps() -> None:
    small, large = tiny(), tiny(image_size="64")
    assert 3 < (bytes_of_a_step(large) - 1e5) / (bytes_of_a_step(small) - 1e5) < 5  # four times the pixels
    assert bytes_of_a_step(large, channels=8) > bytes_of_a_step(large)
    assert bytes_of_a_step(large, num_classes=100) > 2 * bytes_of_a_step(large)
    assert 1e6 < bytes_of_a_step(TrainConfig()) < 2**30  # the default fits anywhere
    check_resources(TrainConfig(), torch.device("cpu"), 1)


def test_prepared_volumes_and_a_step_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = tiny(), torch.device("cpu")
    step = int(bytes_of_a_step(config))
    monkeypatch.setattr(limits, "available_memory", lambda: 2 * step)
    check_memory(config, cpu, prepared=step // 2)
    with pytest.raises(UserError, match=r"the prepared volumes take .* and a step at least .*--cache DIR"):
        check_memory(config, cpu, prepared=3 * step // 2)
    check_memory(tiny(cache="folder"), cpu, prepared=3 * step // 2)
    monkeypatch.setattr(limits, "_memory_of", lambda device: 10 * step)
    check_memory(config, torch.device("cuda"), prepared=3 * step // 2)  # the step is kept elsewhere
    with pytest.raises(UserError, match=r"the prepared volumes take .* of memory are free"):
        check_memory(config, torch.device("cuda"), prepared=3 * step)


def test_too_many_workers_or_threads_are_refused(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"--workers must be at most .* got 1000"):
        check_resources(tiny(workers=1000), torch.device("cpu"), 1)
    for threads in (-1, 100000):
        with pytest.raises(UserError, match=rf"--threads must be 0 to \d+, got {threads}"):
            check_threads(threads)
        assert main(["train", str(folder), "-o", str(tmp_path / "run"), "--threads", str(threads)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    check_threads(0)
    check_threads(os.cpu_count() or 1)


def test_an_output_name_of_300_characters_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(folder), "-o", str(tmp_path / ("x" * 300)), "--labelled", "2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot be written: File name too long" in line


def test_the_number_of_workers_is_limited_by_the_shared_memory(
    batches: StepBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = 5 * batches.bytes_of_a_batch()
    batch = batches[5]
    assert sum(t.numel() * t.element_size() for t in batch.values()) <= batches.bytes_of_a_batch()
    for free, most in ((each - 1, 0), (each, 1), (3 * each, 3)):
        monkeypatch.setattr(limits.shutil, "disk_usage", lambda path, free=free: Usage(free))
        assert most_workers(batches, -1) == most
        assert most_workers(batches, most) == most
        with pytest.raises(UserError, match=rf"--workers {most + 1}: .* Use --workers {most}, or .*--shm-size"):
            most_workers(batches, most + 1)

    monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: Usage(7 * each))
    assert most_workers(batches, 3, ranks=2) == 3
    with pytest.raises(UserError, match=r"--workers 4: the batches of 2 training processes take .* Use --workers 3"):
        most_workers(batches, 4, ranks=2)


def load_with_little_shared_memory(root: str) -> None:
    """Prints the errors when it is too small, when it is full before the first batch, and when it fills up later."""
    config = tiny(image_size="128", steps=400, warmup=0)
    data = load_training_data(Path(root), config)
    batches = StepBatches(data.labelled, data.unlabelled, config)
    with contextlib.suppress(UserError):
        most_workers(batches, 100)
        print("enough for 100")
    for loaded in (0, 1):
        source = loader(batches, 0, 2)
        for _ in range(loaded):
            next(source)
        filler = Path("/dev/shm/filler")
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        try:
            print(f"{sum(1 for _ in source)} batches all the same")
        except UserError as error:
            print(*error.lines)
        filler.unlink()


def test_a_disk_that_fills_up_under_tensorboard_is_an_error_of_one_line(tmp_path: Path) -> None:
    """The error is one line, without a traceback of the thread that writes its events."""
    program = (
        "import sys; from pathlib import Path; from pglcl.record import MetricsLog\n"
        "run = Path(sys.argv[1]) / 'run'; run.mkdir(); log = MetricsLog(run, 0); log.write({'step': 1, 'a': 0.5})\n"
        "try: (run / 'fill').write_bytes(bytes(1 << 20))\n"
        "except OSError: pass\n"
        "log.file = open('/dev/null', 'w')  # for the other file there is room\n"
        "try:\n"
        "    for step in range(2, 100_000): log.write({'step': step, 'a': 0.5})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "log.close()\n"
    )
    mount = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=64k tmpfs {tmp_path} && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    command = [*mount, sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    place = tmp_path / "run" / "tensorboard"
    assert said.stdout == f"WriteError {place}: cannot be written: No space left on device\n"
    assert said.stderr == ""


def test_full_shared_memory_is_an_error_and_not_waited_for(folder: Path) -> None:
    """With a real /dev/shm of 16 MiB. A batch that does not fit must raise an error, and not be waited for."""
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small /dev/shm")
    work = f"from tests.pglcl.test_limits import *; load_with_little_shared_memory({str(folder)!r})"
    command = [*mount, sys.executable, "-W", "ignore", "-c", work]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = ended.stdout.splitlines()
    assert len(said) == 2, ended.stderr
    for line in said:
        assert line.startswith("--workers 2: shared memory (/dev/shm) is full. Use --workers 0, which needs none")


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_killed_worker_is_an_error_of_the_next_batch_that_names_workers(batches: StepBatches, seconds: float) -> None:
    """It is no error of what runs when the process ends: of a step, or of a checkpoint that is written."""
    before = children()
    source = loader(batches, 0, 1)
    next(source)
    (worker,) = children() - before
    os.kill(worker, signal.SIGKILL)
    time.sleep(seconds)  # the system tells it to this process meanwhile
    with pytest.raises(UserError, match=r"--workers 1: a process that prepares batches has ended .*--workers 0"):
        list(source)
    subprocess.run(["true"], check=True)  # the end of another child is no error


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset by peer"), EOFError(), FileNotFoundError(2, "gone")]
)
def test_a_worker_that_ends_while_it_hands_a_batch_over_is_named(
    batches: StepBatches, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """This process then asks for the shared memory of the batch, and nobody answers."""

    def rebuild_storage_fd(*arguments: object) -> None:
        raise error

    rebuild_storage_fd.__module__, rebuild_storage_fd.__qualname__ = reductions.__name__, "rebuild_storage_fd"
    monkeypatch.setattr(reductions, "rebuild_storage_fd", rebuild_storage_fd)
    with pytest.raises(
        UserError, match=r"--workers 1: a process that prepares batches has ended \(.+\)\. .*--workers 0"
    ):
        next(loader(batches, 0, 1))


class Unreadable:
    """As StepBatches, where a file was removed."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, step: int) -> None:
        raise FileNotFoundError(2, "No such file or directory", "case.nii.gz")


def test_an_error_within_a_worker_is_no_ended_worker() -> None:
    with pytest.raises(FileNotFoundError, match=r"Caught FileNotFoundError in DataLoader worker"):
        next(loader(cast(StepBatches, Unreadable()), 0, 1))


def test_the_callers_handler_of_ended_processes_is_left(batches: StepBatches) -> None:
    source = loader(batches, 0, 1)
    next(source)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    source.close()
    kept = signal.getsignal(signal.SIGCHLD)
    assert callable(kept), "DataLoader's own handler, for other loaders of this process"
    other = loader(batches, 0, 1)
    next(other)
    other.close()
    assert signal.getsignal(signal.SIGCHLD) is kept


def children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_a_full_disk_while_tensorboard_writes_is_an_error_of_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = MetricsLog(tmp_path / "log", 0)
    monkeypatch.setattr(log.board, "add_scalar", full)
    with pytest.raises(WriteError, match="tensorboard: cannot be written: No space left on device"):
        log.write({"step": 1, "segmentation": 0.5})
    log.close()
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.raises(UserError, match="tensorboard: cannot be written: No space left on device"):
        Training(folder, tmp_path / "run", tiny(), quiet=True).run()
