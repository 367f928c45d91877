"""A run goes on with its own data, split, options and checkpoint, and with no others."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pglcl import learner, train
from pglcl.cli import main
from pglcl.errors import UserError
from pglcl.files import load_tensors, save_tensors
from pglcl.lock import FolderLock
from pglcl.model import load_model
from pglcl.record import read_metrics
from pglcl.run_folder import FILES, read_record
from pglcl.train import Interrupted, Training

from tests.pglcl.folders import describe, nnunet, plain, save, tiny, volume

STOPPED_AT = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def ended(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "ended"
    Training(data, run, tiny(), quiet=True).run()
    return run


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that Ctrl-C stopped."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    stop_by(signal.SIGINT, data, run)
    return run


@pytest.fixture
def copies(data: Path, stopped: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A data folder and a stopped run of it, which a test may change."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "data", tmp_path / "run"


def stop_by(number: signal.Signals, data: Path, run: Path, **options: Any) -> None:
    update = learner.update_teacher

    def stopping(teacher: Any, student: Any, decay: float, step: int) -> None:
        update(teacher, student, decay, step)
        if step + 1 == STOPPED_AT:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "update_teacher", stopping)
        with pytest.raises(Interrupted, match=f"stopped after step {STOPPED_AT}"):
            Training(data, run, tiny(**options), quiet=True).run()


def resume(data: Path, run: Path, **options: Any) -> None:
    Training(data, run, tiny(**options), resume=True, quiet=True).run()


def refused(data: Path, run: Path, **options: Any) -> str:
    """The error of a resume. Checks that nothing in the folder has changed."""
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError) as caught:
        resume(data, run, **options)
    assert {n: b for n, b in before.items() if (run / n).read_bytes() != b} == {}
    return "\n".join(caught.value.lines)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run / "model.pt")["network"]


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return all(torch.equal(first[name], second[name]) for name in first)


# --- files that are already in the folder ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_folder_or_pipe_in_the_place_of_a_file_is_refused(name: str, copies: tuple[Path, Path]) -> None:
    """Reading a pipe would wait for ever."""
    data, run = copies
    (run / name).unlink(missing_ok=True)
    for make, kind in ((Path.mkdir, "folder"), (os.mkfifo, "named pipe")):
        make(run / name)
        assert refused(data, run) == f"{run / name}: must be a file, is a {kind}"
        (run / name).rmdir() if kind == "folder" else (run / name).unlink()


@pytest.mark.parametrize("name", FILES[:3] + FILES[4:])
def test_a_new_run_replaces_nothing(name: str, data: Path, tmp_path: Path) -> None:
    """It does not even replace a link to nothing, or the split file that it should read."""
    run = tmp_path / "run"
    run.mkdir()
    for make in (lambda path: path.write_text("{}"), lambda path: path.symlink_to(tmp_path / "gone")):
        make(run / name)
        with pytest.raises(UserError, match=rf"run: holds {name}, but no config\.json of a run: .* replace it"):
            Training(data, run, tiny(split_file=str(run / "split.json")), quiet=True).run()
        assert sorted(path.name for path in run.iterdir()) == [".lock", name]
        (run / name).unlink()


def test_a_start_that_was_killed_is_begun_again(data: Path, ended: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "split.json"):
        shutil.copy(ended / name, run / name)
    Training(data, run, tiny(), quiet=True).run()
    assert same_weights(run, ended)
    assert read_record(run).id != read_record(ended).id


def test_a_run_whose_options_are_gone_is_kept(copies: tuple[Path, Path]) -> None:
    data, run = copies
    (run / "config.json").unlink()
    for again in (False, True):
        with pytest.raises(UserError, match=r"run: holds metrics\.jsonl, checkpoint\.pt, but no config\.json of a run"):
            Training(data, run, tiny(), resume=again, quiet=True).run()


@pytest.mark.parametrize("link", [True, False])
def test_a_lock_file_that_links_to_another_file_leaves_it_unchanged(link: bool, data: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "thesis.txt"
    run.mkdir()
    other.write_text("text")
    (run / ".lock").symlink_to(other) if link else os.link(other, run / ".lock")
    if link:
        with pytest.raises(UserError, match="cannot be written"):
            Training(data, run, tiny(), quiet=True).run()
    else:
        with FolderLock(run), pytest.raises(UserError, match="another process writes to it"), FolderLock(run):
            pass
    assert other.read_text() == "text"


# --- data and split -------------------------------------------------------------------------------------------------


def test_added_volumes_do_not_change_a_resumed_run(copies: tuple[Path, Path], ended: Path) -> None:
    data, run = copies
    split = (run / "split.json").read_text()
    for i in range(3):
        image, label = volume(100 + i)
        save(data / "images" / f"added{i}.nii.gz", image)  # before the others by name
        save(data / "labels" / f"added{i}.nii.gz", label)
    resume(data, run)
    assert (run / "split.json").read_text() == split
    assert same_weights(run, ended)


def test_changed_files_of_the_data_are_named_and_refused(copies: tuple[Path, Path]) -> None:
    data, run = copies
    content = (data / "labels" / "case00.nii.gz").read_bytes()
    image, label = volume(77, (30, 26, 5))
    save(data / "labels" / "case00.nii.gz", label)
    save(data / "images" / "case06.nii.gz", image)
    (data / "images" / "case02.nii.gz").rename(data / "images" / "other.nii.gz")
    (data / "labels" / "case02.nii.gz").rename(data / "labels" / "other.nii.gz")
    said = refused(data, run)
    assert "labels/case00.nii.gz: its content has changed" in said
    assert "images/case06.nii.gz: its content has changed" in said
    assert "images/case02.nii.gz: was there when the run began, and is missing" in said
    assert "case01" not in said
    assert content != (data / "labels" / "case00.nii.gz").read_bytes()


def test_a_list_that_combines_the_same_files_differently_is_refused(data: Path, tmp_path: Path) -> None:
    """No file has changed. Yet a resume would learn from patients of the validation, or from another's label."""
    rows = [
        {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz" if i < 6 else "", "patient": f"p{i}"}
        for i, name in enumerate(f"case{i:02d}" for i in range(8))
    ]
    shutil.copytree(data, tmp_path / "data")
    file, run = tmp_path / "data" / "list.json", tmp_path / "run"
    file.write_text(json.dumps(rows))
    stop_by(signal.SIGINT, file, run)
    for column, said in (
        ("patient", "with the label ../labels/case00.nii.gz, of the patient p3"),
        ("label", "../images/case00.nii.gz with the label ../labels/case03.nii.gz, of the patient p0"),
    ):
        other = [dict(row) for row in rows]
        other[0][column], other[3][column] = rows[3][column], rows[0][column]
        file.write_text(json.dumps(other))
        lines = refused(file, run)
        assert "images_case00: the run began with ../images/case00.nii.gz with the label ../labels/case00" in lines
        assert f"it is now {'../images/case00.nii.gz ' if column == 'patient' else ''}{said}" in lines
        assert "images_case01" not in lines
    file.write_text(json.dumps(rows[::-1]))
    resume(file, run)


def test_an_edited_dataset_json_is_refused(tmp_path: Path) -> None:
    """The files are the same, and dataset.json now asks for other intensities, or for other names of classes."""
    root, run = nnunet(tmp_path / "data"), tmp_path / "run"
    stop_by(signal.SIGINT, root, run)
    describe(root, channel_names={"0": "zscore"})
    assert "the run began with intensities percentile" in refused(root, run)
    describe(root, channel_names={"0": "MR0"}, labels={"background": 0, "ball": 1, "ignore": 2})
    assert "the run began with the classes 0,1=ball,2=cube; the data now have 0,1=ball,2=ignore" in refused(root, run)
    describe(root, channel_names={"0": "other MR"})
    resume(root, run)


def test_files_that_were_only_touched_or_moved_are_accepted(copies: tuple[Path, Path], ended: Path) -> None:
    data, run = copies
    os.utime(data / "images" / "case00.nii.gz", (0, 0))
    moved = data.rename(data.with_name("moved"))
    assert main(["train", "--resume", str(run), "--data", str(moved), "-q"]) == 0
    assert same_weights(run, ended)
    assert json.loads((run / "config.json").read_text())["data"] == str(moved)


def test_a_test_volume_is_never_trained_on_after_the_split_was_edited(copies: tuple[Path, Path]) -> None:
    data, run = copies
    split = json.loads((run / "split.json").read_text())
    split["labelled"].append(split["test"].pop())
    (run / "split.json").write_text(json.dumps(split))
    assert "split.json: labelled has case00, case01, case05; the run began with case00, case01" in refused(data, run)


def test_an_edited_split_file_is_refused_and_a_missing_one_is_not_needed(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    split = {"labelled": ["case00"], "unlabelled": ["case06", "case07"], "validation": [], "test": ["case05"]}
    file.write_text(json.dumps(split))
    options = {"split_file": str(file)}
    stop_by(signal.SIGINT, data, tmp_path / "run", **options)
    file.write_text(json.dumps({**split, "labelled": ["case00", "case05"], "test": []}))
    assert "split.json: labelled has case00, case05; the run began with case00" in refused(
        data, tmp_path / "run", **options
    )
    file.unlink()
    resume(data, tmp_path / "run", **options)


def test_an_edited_split_is_not_scored(copies: tuple[Path, Path], capsys: Any) -> None:
    """Patients that were used to train must not be scored as test patients."""
    data, run = copies
    split = json.loads((run / "split.json").read_text())
    split["test"], split["labelled"] = split["labelled"], split["test"]
    (run / "split.json").write_text(json.dumps(split))
    for command in (["evaluate", run, data], ["report", run]):
        assert main(list(map(str, command))) == 2
        assert "split.json: test has case00, case01; the run began with" in capsys.readouterr().err
    assert not [path.name for path in run.glob("scores*")]
    assert main(["evaluate", str(run), str(data), "--part", "all"]) == 0


def changing(data: Path, when: int, change: Callable[[Path], None]) -> Callable[[Any, Any, float, int], None]:
    """A replacement for the teacher's update, which changes the validation patient's image after `when` steps."""
    update = learner.update_teacher

    def changed(teacher: Any, student: Any, decay: float, step: int) -> None:
        update(teacher, student, decay, step)
        if step + 1 == when:
            change(data / "images" / "case03.nii.gz")

    return changed


def replace_keeping_times(path: Path) -> None:
    """Replaces a file like `cp -p` of another file with the same size and times."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "message"),
    [(Path.unlink, "was removed"), (replace_keeping_times, "was changed"), (lambda path: os.utime(path, (1, 1)), "")],
)
def test_a_validation_volume_that_changes_during_the_training_is_refused(
    change: Callable[[Path], None], message: str, copies: tuple[Path, Path], ended: Path, monkeypatch: Any
) -> None:
    data, run = copies
    assert json.loads((run / "split.json").read_text())["validation"] == ["case03"]
    monkeypatch.setattr(learner, "update_teacher", changing(data, 7, change))
    if message:
        with pytest.raises(UserError, match=rf"case03\.nii\.gz: {message} while this command still needed it"):
            resume(data, run, validate_every=4)
        assert not (run / "model.pt").exists()
    else:
        resume(data, run, validate_every=4)
        assert same_weights(run, ended)


def test_a_volume_that_changes_while_it_is_read_is_refused(
    data: Path, copies: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Otherwise, the run would keep the hash of other voxels than those that it was trained on."""
    load = train.load_training_data

    def change_then_load(root: Path, *arguments: Any, **options: Any) -> Any:
        loaded = load(root, *arguments, **options)
        replace_keeping_times(root / "images" / "case00.nii.gz")
        return loaded

    monkeypatch.setattr(train, "load_training_data", change_then_load)
    with pytest.raises(UserError, match=r"case00\.nii\.gz: was changed while this command still needed it"):
        Training(copies[0], tmp_path / "new", tiny(), quiet=True).run()
    assert not (tmp_path / "new" / "checkpoint.pt").exists()


@pytest.mark.parametrize("row", [
    '{"step": 1, "loss": NaN}', '{"step": 1, "loss": "0.5"}', '{"step": 1, "seconds": null}', '{"step": true}',
    '{"step": 1, "loss": 1e999}', '{"step": 1, "loss": [1]}',
])  # fmt: skip
def test_metrics_that_are_not_numbers_are_refused(row: str, copies: tuple[Path, Path]) -> None:
    data, run = copies
    (run / "metrics.jsonl").write_text(f'{row}\n{{"step": 1}}\n')
    assert "metrics.jsonl, line 1: must be an object of numbers" in refused(data, run)


@pytest.mark.parametrize("seconds", [-1e11, 1e13])
def test_a_file_with_a_time_beyond_all_years_is_recorded(
    seconds: float, copies: tuple[Path, Path], tmp_path: Path
) -> None:
    data, run = copies[0], tmp_path / "new"
    try:
        os.utime(data / "images" / "case00.nii.gz", (seconds, seconds))
    except OSError:
        pytest.skip("this file system has no such times")
    Training(data, run, tiny(steps=1, warmup=0), quiet=True).run()
    assert len(read_record(run).files) == 9


def test_run_json_has_size_and_hash_of_every_file_that_was_read(data: Path, ended: Path) -> None:
    files = json.loads((ended / "run.json").read_text())["files"]
    read = {"labelled": ("case00", "case01"), "unlabelled": ("case02", "case06", "case07"), "validation": ("case03",)}
    images = {f"images/{name}.nii.gz" for names in read.values() for name in names}
    labels = {f"labels/{name}.nii.gz" for part in ("labelled", "validation") for name in read[part]}
    assert set(files) == images | labels
    for name, print in files.items():
        assert print["bytes"] == (data / name).stat().st_size
        assert len(print["sha256"]) == 64


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
def test_a_flipped_bit_anywhere_is_refused(name: str, ended: Path, tmp_path: Path) -> None:
    content = (ended / name).read_bytes()
    random = np.random.default_rng(0)
    places = [0, len(content) - 1, len(content) - 70, *random.integers(0, len(content), 60).tolist()]
    for place in places:
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << int(random.integers(8))
        (tmp_path / name).write_bytes(spoiled)
        with pytest.raises(UserError, match=rf"{name}: (not a checkpoint of pglcl|damaged or changed: its content)"):
            load_tensors(tmp_path / name)
    for length in (0, 1, 76, 77, 78, len(content) - 1):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"{name}: not a checkpoint of pglcl"):
            load_tensors(tmp_path / name)


def test_another_runs_checkpoint_and_model_are_refused(copies: tuple[Path, Path], ended: Path) -> None:
    data, run = copies
    shutil.copy(ended / "checkpoint.pt", run / "checkpoint.pt")
    assert "checkpoint.pt: belongs to the run" in refused(data, run)
    shutil.copy(ended / "model.pt", run / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: belongs to the run .*, not to this run"):
        load_model(run, "cpu")


def spoil(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = load_tensors(path)
    change(state)
    save_tensors(path, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(step=10**9), r"must be of step 0 to 8, got 1000000000"),
        (lambda s: s.update(step=-1), r"must be of step 0 to 8, got -1"),
        (lambda s: s.update(step="5"), r"does not name its run"),
        (lambda s: s.pop("run"), r"does not name its run"),
        (lambda s: s["optimizer"]["state"].clear(), r"its optimiser has 0 of"),
        (lambda s: s["optimizer"]["state"].popitem(), r"its optimiser has"),
        (lambda s: s.pop("contrast"), 'does not fit this run: has no entry "contrast"'),
        (lambda s: s["student"].popitem(), r"does not fit this run"),
        (lambda s: s["run"]["config"].update(learning_rate=0.5), r"--learning-rate: the run has 0.5"),
        (lambda s: s["run"]["files"].popitem(), r"run.json: its files are not those"),
        (lambda s: s["run"]["cases"].popitem(), r"run.json: its cases are not those"),
        (lambda s: s["model"].update(slice_axis=0), r"the run began with slices across axis 0; now axis 2"),
    ],
)
def test_a_valid_checkpoint_with_wrong_content_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, copies: tuple[Path, Path]
) -> None:
    data, run = copies
    spoil(run / "checkpoint.pt", change)
    assert message in refused(data, run)


def test_a_missing_checkpoint_is_refused(copies: tuple[Path, Path]) -> None:
    data, run = copies
    (run / "checkpoint.pt").unlink()
    assert "checkpoint.pt: is missing, although metrics.jsonl shows that the run has begun" in refused(data, run)


@pytest.mark.parametrize("name", ["config.json", "split.json", "run.json", "environment.json", "metrics.jsonl"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[1, 2]", b'"text"', b"\x93\xff\x00", b"[" * 100_000, b'{"step": "x", "labelled": 3}\n'],
    ids=["empty", "list", "text", "binary", "deep", "types"],
)
def test_json_files_of_another_kind_are_refused(name: str, content: bytes, copies: tuple[Path, Path]) -> None:
    data, run = copies
    (run / name).write_bytes(content)
    if name == "metrics.jsonl" and content in (b"", b"\x93\xff\x00", b"[" * 100_000):
        resume(data, run)  # no row, or one that a kill truncated
        return
    if name == "environment.json" and content.startswith(b'{"step'):
        resume(data, run)  # an object: it describes the machine, and nothing depends on it
        return
    with pytest.raises(UserError) as caught:
        resume(data, run)
    assert name in caught.value.lines[0] or name in "\n".join(caught.value.lines)


# --- options --------------------------------------------------------------------------------------------------------


def test_a_run_is_resumed_without_its_data_folder_and_options(
    copies: tuple[Path, Path], ended: Path, data: Path
) -> None:
    _, run = copies
    assert main(["train", "--resume", str(run), "-q"]) == 0
    assert same_weights(run, ended)


def test_a_run_of_a_version_without_parts_of_slices_sees_whole_ones(data: Path, tmp_path: Path) -> None:
    """The default has changed since. Such a run goes on, and its model predicts, as it was trained."""
    runs = tmp_path / "ended", tmp_path / "run"
    Training(data, runs[0], tiny(slices="whole"), quiet=True).run()
    stop_by(signal.SIGINT, data, runs[1], slices="whole")
    for run in runs:
        options = json.loads((run / "config.json").read_text())
        del options["slices"]
        (run / "config.json").write_text(json.dumps(options))
        for path in run.glob("*.pt"):
            spoil(path, lambda s: (s.get("model", s)["config"].pop("slices"), s["run"]["config"].pop("slices")))
    assert main(["train", "--resume", str(runs[1]), "-q"]) == 0
    assert same_weights(*runs)
    assert load_model(runs[0]).config.whole_slices


def test_a_resumed_run_keeps_its_options(copies: tuple[Path, Path], capsys: Any) -> None:
    data, run = copies
    arguments = ["train", str(data), "-o", str(run), "--resume", "-q"]
    assert main([*arguments, "--learning-rate", "0.1"]) == 2
    assert "--learning-rate: the run has 0.002, got 0.1" in capsys.readouterr().err
    assert main([*arguments, "--checkpoint-every", "4"]) == 0
    assert json.loads((run / "config.json").read_text())["checkpoint_every"] == 4


def test_a_resumed_run_may_get_more_steps(copies: tuple[Path, Path], ended: Path, tmp_path: Path) -> None:
    data, _ = copies
    run = tmp_path / "more"
    shutil.copytree(ended, run)
    assert "a run may get more steps, but not fewer" in refused(data, run, steps=6)
    assert main(["train", "--resume", str(run), "--steps", "12", "-q"]) == 0
    assert load_model(run, "cpu").step == 12
    assert json.loads((run / "config.json").read_text())["steps"] == 12
    assert not same_weights(run, ended)
    assert [row["step"] for row in read_metrics(run)] == [8, 10, 12]


def test_a_resume_with_more_steps_removes_the_earlier_last_model(ended: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ended, run)

    def stop(*arguments: Any) -> None:
        raise Interrupted("as if killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_train", stop)
        with pytest.raises(Interrupted):
            resume(data, run, steps=20)
    assert load_model(run, "cpu").step == 8  # of the checkpoint, unfinished
    assert not (run / "model.pt").exists()


def test_more_steps_do_not_change_the_warm_up(data: Path, tmp_path: Path) -> None:
    stop_by(signal.SIGINT, data, tmp_path / "run", warmup=-1)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["warmup"] == 2
    resume(data, tmp_path / "run", warmup=-1, steps=12)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["warmup"] == 2


def test_unlabelled_images_reach_the_weights_by_default(tmp_path: Path) -> None:
    """A quarter of the steps is warm-up, even if there are few."""
    models = []
    for seed in (0, 1):
        data = plain(tmp_path / f"data{seed}")
        for i in (2, 6, 7) if seed else ():  # noise in place of the unlabelled images
            shape = volume(i, (30 + i % 3, 26, 5 + i % 2))[0].shape
            save(data / "images" / f"case{i:02d}.nii.gz", np.random.default_rng(i).normal(size=shape).astype("f4"))
        Training(data, tmp_path / f"run{seed}", tiny(warmup=-1), quiet=True).run()
        models.append(tmp_path / f"run{seed}")
    assert not same_weights(*models)


def test_a_resume_with_another_number_of_threads_says_so(copies: tuple[Path, Path], capsys: Any) -> None:
    data, run = copies
    described = json.loads((run / "run.json").read_text())
    began = described["threads"]
    (run / "run.json").write_text(json.dumps({**described, "threads": began + 3}))
    spoil(run / "checkpoint.pt", lambda s: s["run"].update(threads=began + 3))
    Training(data, run, tiny(), resume=True).run()
    assert f"with --threads {began + 3} they do not" in capsys.readouterr().err


# --- signals and kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_signals_stop_with_a_checkpoint(number: signal.Signals, data: Path, tmp_path: Path) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, tests ignore SIGHUP
    try:
        stop_by(number, data, tmp_path / "run")
    finally:
        signal.signal(number, before)
    assert load_tensors(tmp_path / "run" / "checkpoint.pt")["step"] == STOPPED_AT


def test_a_hang_up_that_nohup_ignores_is_ignored(data: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(pytest.fail.Exception):
            stop_by(signal.SIGHUP, data, tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "run" / "model.pt").exists()


def test_partial_files_of_a_killed_run_are_removed(copies: tuple[Path, Path]) -> None:
    data, run = copies
    (run / ".partial-4242-checkpoint.pt").write_bytes(b"half")
    resume(data, run)
    assert not list(run.glob(".partial-*"))


@pytest.fixture
def removing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    update = learner.update_teacher

    def after(run: Path) -> None:
        def step_and_remove(teacher: Any, student: Any, decay: float, step: int) -> None:
            update(teacher, student, decay, step)
            if step == 6:
                shutil.rmtree(run)

        monkeypatch.setattr(learner, "update_teacher", step_and_remove)

    return after


def test_a_run_stops_when_its_folder_is_removed(data: Path, tmp_path: Path, removing: Callable[[Path], None]) -> None:
    removing(tmp_path / "run")
    with pytest.raises(UserError, match="run: was removed or renamed while the run wrote to it"):
        Training(data, tmp_path / "run", tiny(), quiet=True).run()
    assert not (tmp_path / "run").exists()
