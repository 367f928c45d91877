"""Runs: every method, interruption and resumption, bad data, several processes, the profile."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pglcl import learner
from pglcl.errors import UserError
from pglcl.evaluate import evaluate_run
from pglcl.files import load_tensors, save_tensors
from pglcl.labels import IGNORE
from pglcl.model import load_model, network_for, weights_hash
from pglcl.organs import organs_of_masks
from pglcl.predict import Predictor
from pglcl.ranks import launched_ranks
from pglcl.record import read_metrics
from pglcl.run_folder import RunFolder
from pglcl.train import Interrupted, Training
from pglcl.training_data import load_training_data

from tests.conftest import ROOT, free_ports
from tests.pglcl.folders import TINY, decathlon, plain, save, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("plain"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run / "model.pt")["network"]


def run_to_end(folder: Path, run: Path, **options) -> dict[str, torch.Tensor]:
    Training(folder, run, tiny(**options), quiet=True).run()
    return weights(run)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_resume_after_a_kill_between_the_last_two_files_writes_both_models(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best model must not stay without the classes of which masks keep only the largest component."""
    run, options = tmp_path / "run", {"validate_every": 3, "learning_rate": 0.02}
    save, saved = RunFolder.save_model, []

    def killed(self: RunFolder, model: Any, path: Path) -> None:
        if model.organs is not None and saved:
            raise KeyboardInterrupt
        saved.extend([path] * (model.organs is not None))
        save(self, model, path)

    monkeypatch.setattr(RunFolder, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        Training(folder, run, tiny(**options), quiet=True).run()
    monkeypatch.undo()
    Training(folder, run, tiny(**options), resume=True, quiet=True).run()
    assert load_model(run).organs is not None
    assert load_model(run, weights="best").organs is not None


def test_patients_that_the_run_of_init_has_seen_are_named(folder: Path, tmp_path: Path, capsys) -> None:
    """With another split, they are the test of this run. A copy under another name is the same image."""
    run_to_end(folder, tmp_path / "first", steps=4)
    split = {"labelled": ["case04", "case05"], "unlabelled": ["case06"], "test": ["case00", "case01", "case03"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    options = {"init": str(tmp_path / "first"), "steps": 4, "split_file": str(tmp_path / "split.json")}
    options |= {"validation": -1, "test": -1}
    Training(copied, tmp_path / "second", tiny(**options)).run()
    assert "read images of 3 patients that are now held out: case00, case01, case03" in capsys.readouterr().err
    Training(copied, tmp_path / "same", tiny(init=str(tmp_path / "first"), steps=4, validation=0, test=1)).run()
    assert "now held out" not in capsys.readouterr().err


def test_a_run_of_init_on_other_voxels_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on whole slices saw them shrunk."""
    whole = {"slices": "whole", "image_size": "16", "steps": 4}
    run_to_end(folder, tmp_path / "first", **whole)
    words = "as the network sees them, in that run"
    for name, options, named in (("parts", {"steps": 4}, True), ("whole", whole, False)):
        Training(folder, tmp_path / name, tiny(init=str(tmp_path / "first"), **options)).run()
        assert (words in capsys.readouterr().err.replace("\n", " ")) == named


def test_the_best_model_of_validation_is_kept_beside_the_last(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_to_end(folder, run, validate_every=2, learning_rate=0.02)
    dice = {row["step"]: row["validation_dice"] for row in read_metrics(run) if "validation_dice" in row}
    best = load_model(run, "cpu", "best")
    assert best.step == max(dice, key=lambda step: dice[step])
    assert load_model(run, "cpu").step == 8
    found = evaluate_run(run, folder, weights="best")
    assert [path.name for path in found.files] == [
        "scores_test_best.csv",
        "scores_test_best.md",
        "scores_test_best.json",
    ]
    assert found.subject.step == best.step
    with pytest.raises(UserError, match="--weights must be last or best, got first"):
        load_model(run, "cpu", "first")
    alone = tmp_path / "alone"
    run_to_end(folder, alone, validation=0)
    with pytest.raises(UserError, match="--weights best needs a run with validation patients"):
        load_model(alone, "cpu", "best")
    assert load_model(alone, "cpu").organs is None


def test_masks_keep_the_largest_component_where_validation_patients_score_no_worse(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is nnU-Net's rule, for classes that are one organ in the labelled masks."""
    run = tmp_path / "run"
    training = Training(folder, run, tiny(), quiet=True)
    training.run()
    data = load_training_data(folder, tiny())
    model = load_model(run, "cpu")
    truth, apart = {}, True

    def said(predictor: Any, case: Any) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros(30, 30, 5, dtype=torch.uint8)
        mask[2:9, 2:9] = 1
        mask[9:12, 2:9] = 0 if apart else 2
        mask[20:29, 20:29] = 2 if apart else 0
        shown = mask.clone()
        shown[12, 12, 2] = 1  # an island
        if apart:
            shown[20:29, 24:26] = 0  # class 2 is torn apart
        truth[case.name] = mask
        return shown, mask

    monkeypatch.setattr("pglcl.organs.predicted_and_true", said)
    with launched_ranks(torch.device("cpu")) as ranks:
        assert organs_of_masks(model, data, ranks) == ((1,),)  # the classes lie apart
        two = next(one.label for one in data.labelled if one.label is not None)
        two[two == 1] = 0
        two[0, 0, 0] = two[-1, -1, -1] = 1
        data.labelled[:] = [one for one in data.labelled if one.label is two]
        assert organs_of_masks(model, data, ranks) == ()
        two[:] = 0
        two[2:9, 2:9], two[9:12, 2:9] = 1, 2  # they lie side by side
        assert organs_of_masks(model, data, ranks) == ((1,),)
        apart = False
        assert organs_of_masks(model, data, ranks) == ((1, 2), (1,), (2,))
    assert len(truth) == 1
    model.organs = ((1, 2), (1,))
    assert Predictor([model]).organs == [(1, 2), (1,)]
    assert Predictor([model], postprocess="none").organs == []
    other = load_model(run, "cpu")
    other.organs = ((2,), (1, 2))
    assert Predictor([model, other]).organs == [(1, 2)]  # only those on which all models agree


def test_the_largest_component_may_lie_in_ignored_voxels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `predict` and `evaluate`, which keep it before they know what is ignored."""
    training = Training(folder, tmp_path / "run", tiny(), quiet=True)
    training.run()
    data, model = load_training_data(folder, tiny()), load_model(tmp_path / "run", "cpu")
    shown, truth = torch.zeros(2, 30, 30, 5, dtype=torch.int32)
    shown[2:9, 2:9] = truth[2:9, 2:9] = 1
    truth[:, 15:] = IGNORE
    monkeypatch.setattr("pglcl.organs.predicted_and_true", lambda predictor, case: (shown, truth))
    with launched_ranks(torch.device("cpu")) as ranks:
        assert (1,) in (organs_of_masks(model, data, ranks) or ())
        shown[2:20, 16:28] = 1
        assert (1,) not in (organs_of_masks(model, data, ranks) or ())


@pytest.mark.parametrize("options", [
    {"method": "supervised"}, {"method": "semi", "consistency": "mean-teacher"}, {"loss": "gaussian"},
    {"patches": "crop", "amp": True}, {"queue_length": 0},
], ids=str)  # fmt: skip
def test_a_run_writes_its_files_and_can_be_scored(options: dict, folder: Path, tmp_path: Path) -> None:
    Training(folder, tmp_path / "run", tiny(validate_every=4, **options), quiet=True).run()
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "split.json", "environment.json", "metrics.jsonl", "tensorboard", "model.pt"} <= files
    assert not [name for name in files if name.startswith(".partial")]
    rows = evaluate_run(tmp_path / "run", folder).summary
    assert rows[-1]["volumes"] == 2
    assert 0 <= rows[-1]["dice"] <= 1
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert {"git", "monai", "pglcl_ext", "processor"} <= set(environment)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "validation_dice" in row] == [4, 8]


def test_volumes_with_two_channels_are_trained_and_scored(tmp_path: Path) -> None:
    data = decathlon(tmp_path / "data")
    options = {"spatial_dims": 3, "image_size": "16,16,16", "spacing": "2,2,3", "steps": 5}
    Training(data, tmp_path / "run", tiny(**options), quiet=True).run()
    assert evaluate_run(tmp_path / "run", data).summary[0]["class"] == "ball"


NETWORKS = {"basicunet": "4,8,8,8,8", "dynunet": "4,8,8", "segresnet": "8,16,32"}


@pytest.mark.parametrize("network", NETWORKS)
def test_each_network_is_trained_and_scored(network: str, folder: Path, tmp_path: Path) -> None:
    options = {"network": network, "channels": NETWORKS[network], "amp": network == "dynunet"}
    run_to_end(folder, tmp_path / "run", **options)
    assert math.isfinite(read_metrics(tmp_path / "run")[-1]["contrast"])
    assert load_model(tmp_path / "run").network.arguments["network"] == network
    assert evaluate_run(tmp_path / "run", folder).summary[-1]["volumes"] == 2
    # Its projection was trained, so the contrast received features.
    before = network_for(tiny(**options), 1, 3)
    moved = weights(tmp_path / "run")["projection.layers.0.weight"] - before.projection.layers[0].weight
    assert moved.abs().max() > 1e-4


def test_segresnet_trains_in_three_dimensions(tmp_path: Path) -> None:
    data = decathlon(tmp_path / "data")
    options = {"spatial_dims": 3, "image_size": "16,16,16", "steps": 4, "network": "segresnet", "channels": "8,16,32"}
    run_to_end(data, tmp_path / "run", **options)
    assert evaluate_run(tmp_path / "run", data).summary[0]["class"] == "ball"


def test_a_run_with_init_starts_from_the_weights_of_the_other(folder: Path, tmp_path: Path) -> None:
    first = run_to_end(folder, tmp_path / "first")
    options = {"init": str(tmp_path / "first"), "seed": 3, "steps": 6}
    # With a learning rate near 0, student and teacher keep the weights of the first run.
    still = run_to_end(folder, tmp_path / "still", **options, learning_rate=1e-12, weight_decay=0.0)
    for name in first:
        torch.testing.assert_close(still[name], first[name], atol=1e-6, rtol=0)
    record = json.loads((tmp_path / "still" / "run.json").read_text())
    assert record["initial"] == weights_hash(load_model(tmp_path / "first").network)

    straight = run_to_end(folder, tmp_path / "straight", **options)
    with pytest.raises(UserError, match="the run has other options"):
        Training(folder, tmp_path / "straight", tiny(**{**options, "init": ""}), resume=True, quiet=True).run()
    # A run that was killed before its first checkpoint reads the weights again, and they must be the same.
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "straight", again)
    for name in ("checkpoint.pt", "model.pt", "metrics.jsonl"):
        (again / name).unlink()
    Training(folder, again, tiny(**options), resume=True, quiet=True).run()
    assert_same(straight, weights(again))
    for name in ("checkpoint.pt", "model.pt", "metrics.jsonl"):
        (again / name).unlink()
    Training(folder, tmp_path / "first", tiny(steps=10), resume=True, quiet=True).run()
    with pytest.raises(UserError, match="its weights are not those that"):
        Training(folder, again, tiny(**options), resume=True, quiet=True).run()
    # After that, it does not need them any more.
    shutil.rmtree(tmp_path / "first")
    Training(folder, tmp_path / "straight", tiny(**{**options, "steps": 7}), resume=True, quiet=True).run()


def test_weights_of_init_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    run_to_end(folder, tmp_path / "first", method="supervised", steps=1)
    wrong = {
        "--network: that run has unet, got dynunet": {"network": "dynunet"},
        "--channels: that run has 4,8,8, got 4,8": {"channels": "4,8"},
        "--embedding-dim: that run has 8, got 4": {"embedding_dim": 4},
        "--spatial-dims: that run has 2, got 3": {"spatial_dims": 3, "image_size": "16,16,4", "patch_size": 4},
        "classes: that run has background,label 1,label 2, got background,one,two": {"labels": "0,1=one,2=two"},
        "classes: that run has background,label 1,label 2, got background,all": {"labels": "0,1+2=all"},
    }
    for line, options in wrong.items():
        with pytest.raises(UserError, match=f"do not fit this run:\n{line}"):
            Training(folder, tmp_path / "b", tiny(**options, init=str(tmp_path / "first")), quiet=True).run()
        assert not (tmp_path / "b" / "config.json").exists()
    with pytest.raises(UserError, match="has no trained model"):
        Training(folder, tmp_path / "b", tiny(init=str(tmp_path / "nowhere")), quiet=True).run()
    two = decathlon(tmp_path / "two")
    with pytest.raises(UserError, match="channels of the images: that run has 1, got 2"):
        Training(two, tmp_path / "b", tiny(init=str(tmp_path / "first")), quiet=True).run()


@pytest.mark.parametrize(("slices", "seed"), [("whole", 0), ("crop", 1)])
def test_training_reaches_a_high_dice_on_simple_data(slices: str, seed: int, folder: Path, tmp_path: Path) -> None:
    """Seeds differ with so short a training: parts give 0.64, 0.91 and 0.94 with seeds 0, 1 and 2."""
    run_to_end(folder, tmp_path / "run", steps=300, warmup=100, learning_rate=1e-2, slices=slices, seed=seed)
    assert evaluate_run(tmp_path / "run", folder).summary[-1]["dice"] > 0.8


def test_the_same_run_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    a = run_to_end(folder, tmp_path / "a")
    assert_same(a, run_to_end(folder, tmp_path / "b", workers=1))
    other = run_to_end(folder, tmp_path / "c", seed=1)
    assert not torch.equal(a["projection.layers.0.weight"], other["projection.layers.0.weight"])


@pytest.mark.parametrize("options", [{}, {"loss": "gaussian", "hard_negatives": True}, {"method": "semi"}], ids=str)
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_an_interrupted_run_ends_with_the_same_weights(
    stop_at: int, options: dict, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_to_end(folder, tmp_path / "straight", **options)
    run = Training(folder, tmp_path / "run", tiny(**options), quiet=True)
    update = learner.update_teacher

    def stopping(teacher, student, decay, step):
        update(teacher, student, decay, step)
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C

    monkeypatch.setattr(learner, "update_teacher", stopping)
    with pytest.raises(Interrupted, match=f"stopped after step {stop_at}"):
        run.run()
    monkeypatch.setattr(learner, "update_teacher", update)
    assert load_tensors(tmp_path / "run" / "checkpoint.pt")["step"] == stop_at
    Training(folder, tmp_path / "run", tiny(**options), resume=True, quiet=True).run()
    assert_same(straight, weights(tmp_path / "run"))
    steps = [row["step"] for row in read_metrics(tmp_path / "run")]
    assert steps == sorted(set(steps))


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "pglcl", *map(str, arguments)]


def flags(**changes) -> list[str]:
    """The options as arguments of the command line; the value "" makes a switch."""
    pairs = (("--" + name.replace("_", "-"), str(value)) for name, value in {**TINY, **changes}.items())
    return [part for pair in pairs for part in pair if part]


def test_a_killed_run_ends_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """After kill -9 at any moment, the checkpoint is whole, and the resumed run ends with the same weights."""
    options = {"steps": 60, "checkpoint_every": 2}
    straight = run_to_end(folder, tmp_path / "straight", **options)
    arguments = command(
        "train", folder, "-o", tmp_path / "run", "--threads", torch.get_num_threads(), *flags(**options)
    )
    for attempt in range(3):
        process = subprocess.Popen([*arguments, *(["--resume"] if attempt else [])], cwd=ROOT, stderr=subprocess.PIPE)
        before = time.monotonic()
        checkpoint = tmp_path / "run" / "checkpoint.pt"
        known = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and time.monotonic() - before < 120:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != known:
                time.sleep(0.05 * attempt)
                break
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert load_tensors(checkpoint)["step"] >= 0
    Training(folder, tmp_path / "run", tiny(**options), resume=True, quiet=True).run()
    assert_same(straight, weights(tmp_path / "run"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_every_process_stops_with_a_checkpoint(
    number: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    """Terminals send Ctrl-C, and schedulers their last warning, also to the processes that prepare batches."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have left it ignored
    arguments = command("train", folder, "-o", tmp_path / "run", *flags(steps=3000, workers=2, checkpoint_every=3000))
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    try:
        said = process.communicate(timeout=60)[1].decode()
    except subprocess.TimeoutExpired:
        signals = re.findall(r"^Sig.*$|^ShdPnd.*$", Path(f"/proc/{process.pid}/status").read_text(), flags=re.MULTILINE)
        os.killpg(process.pid, signal.SIGKILL)  # it would take the processor from the other tests
        said = process.communicate()[1].decode()
        pytest.fail(f"the signal stopped nothing; {', '.join(signals)}\n{said}")
    assert (process.returncode, said.count("Traceback")) == (130, 0), said
    assert load_tensors(tmp_path / "run" / "checkpoint.pt")["step"] >= 10
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("first", [True, False])
def test_ranks_that_stop_wait_until_the_checkpoint_is_written(
    first: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher gives the first rank little time once another one has ended."""
    done: list[str] = []
    run = Training(folder, tmp_path / "run", tiny(steps=50, validate_every=0), quiet=True)
    run.stop.asked = True
    monkeypatch.setattr(run.folder, "save_checkpoint", lambda state: done.append("saved"))
    ranks = SimpleNamespace(size=2, is_first=first, any_rank=bool, from_first=lambda value: done.append("waited"))
    with pytest.raises(Interrupted):
        run._after_step(SimpleNamespace(ranks=ranks, state=str), 10, {}, None)
    assert done == ["saved", "waited"][not first :]


def test_another_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    run_to_end(folder, tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        Training(folder, tmp_path / "run", tiny(), quiet=True).run()
    with pytest.raises(UserError, match=r"--learning-rate: the run has 0\.002, got 0\.1"):
        Training(folder, tmp_path / "run", tiny(learning_rate=0.1), resume=True, quiet=True).run()
    Training(folder, tmp_path / "run", tiny(checkpoint_every=7), resume=True, quiet=True).run()  # changes no weight


def test_a_file_that_is_not_a_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    run_to_end(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="not a checkpoint of pglcl"):
        Training(folder, tmp_path / "run", tiny(), resume=True, quiet=True).run()


def test_checkpoints_execute_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    save_tensors(tmp_path / "checkpoint.pt", {"step": Evil()})  # with a hash that fits
    with pytest.raises(UserError, match="not a checkpoint"):
        load_tensors(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_tensors(path, {"step": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint\.pt: cannot be written: No space left on device"):
        save_tensors(path, {"step": 2})
    assert load_tensors(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_an_output_below_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Training(folder, tmp_path / "file" / "run", tiny(), quiet=True).run()


def test_bad_data_is_refused_before_training(tmp_path: Path) -> None:
    import numpy as np

    root = plain(tmp_path / "data")
    save(root / "images" / "case06.nii.gz", np.full((30, 26, 5), 3, np.float32))
    (root / "images" / "case01.nii.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError) as caught:
        Training(root, tmp_path / "run", tiny(), quiet=True).run()
    text = "\n".join(caught.value.lines)
    assert "case06.nii.gz: is a constant image" in text
    assert "case01.nii.gz" in text
    assert "pglcl inspect" in text
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_training_on_empty_labels_is_refused(tmp_path: Path) -> None:
    import nibabel as nib
    import numpy as np

    root = plain(tmp_path / "data")
    for name in ("case00", "case01"):
        shape = nib.load(root / "images" / f"{name}.nii.gz").shape
        save(root / "labels" / f"{name}.nii.gz", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="labels of all 2 labelled volumes are empty"):
        Training(root, tmp_path / "run", tiny(), quiet=True).run()


def torchrun(folder: Path, run: Path, *more: str, **changes) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arguments = ["-m", "pglcl", "train", str(folder), "-o", str(run), *flags(**changes), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def processes(folder: Path, run: Path, *more: str, **changes: Any) -> subprocess.Popen[str]:
    """Two processes that train together, started by one command."""
    arguments = command("train", folder, "-o", run, "--processes", 2, *flags(**changes), *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_stopped_processes_end_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """They end with the same bits as two processes that were not stopped, started by one command or by torchrun."""
    options = {"steps": 40, "checkpoint_every": 1000}
    straight = torchrun(folder, tmp_path / "straight", **options)
    assert straight.returncode == 0, straight.stderr[-2000:]
    assert straight.stdout.count("done. Next") == 1  # the first rank speaks and writes
    run = processes(folder, tmp_path / "run", "--resume", **options)  # of a folder that is not there: a fresh start
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = time.monotonic()
    while run.poll() is None and time.monotonic() - before < 240 and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 130, err
    assert "stopped after step" in out
    assert 0 < load_tensors(tmp_path / "run" / "checkpoint.pt")["step"] < 40
    again = processes(folder, tmp_path / "run", "--resume", **options)
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "run"))
    assert load_tensors(tmp_path / "run" / "checkpoint.pt")["contrast"]["threshold.updates"].max() > 0


OTHER_CONTRASTS: list[dict[str, Any]] = [{"queue_length": 0}, {"loss": "gaussian", "hard_negatives": True}]


def train_other_contrasts(folder: Path, place: Path, ports: Sequence[int]) -> None:
    """Runs one of two ranks: for each contrast a run without a stop, one stopped after ten steps, and its resume."""
    torch.set_num_threads(1)
    for number, port in enumerate(ports):
        os.environ["MASTER_PORT"] = str(port)
        contrast, way = divmod(number, 3)
        name = f"{'run' if way else 'straight'}{contrast}"
        options = {"steps": 40, "checkpoint_every": 1000, **OTHER_CONTRASTS[contrast]}
        run = Training(folder, place / name, tiny(**options), resume=way == 2, quiet=True)
        run.stop.asked = way == 1
        with pytest.raises(Interrupted) if way == 1 else contextlib.nullcontext():
            run.run()


@pytest.mark.slow
def test_two_stopped_ranks_of_each_contrast_end_with_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    ports = free_ports(3 * len(OTHER_CONTRASTS))
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    context = torch.multiprocessing.get_context("spawn")
    other = context.Process(target=train_other_contrasts, args=(folder, tmp_path, ports))
    other.start()
    monkeypatch.setenv("RANK", "0")
    train_other_contrasts(folder, tmp_path, ports)
    other.join()
    assert other.exitcode == 0
    for contrast in range(len(OTHER_CONTRASTS)):
        assert_same(weights(tmp_path / f"straight{contrast}"), weights(tmp_path / f"run{contrast}"))
        state = load_tensors(tmp_path / f"run{contrast}" / "checkpoint.pt")
        assert state["contrast"]["threshold.updates"].max() > 0


def test_an_error_of_two_processes_is_one_line(folder: Path, tmp_path: Path) -> None:
    run_to_end(folder, tmp_path / "run", steps=1, method="supervised")
    refused = processes(folder, tmp_path / "run")
    _, err = refused.communicate(timeout=240)
    assert refused.returncode == 2
    line = f"{tmp_path / 'run'}: already holds a run; add --resume to continue it, or choose another --output"
    assert err.strip().splitlines() == [f"pglcl: {line}"]
    # torchrun adds its own traceback and a summary. The line comes before the traceback, and at the end of the summary.
    refused_by = torchrun(folder, tmp_path / "run")
    assert refused_by.returncode == 1
    lines = refused_by.stderr.strip().splitlines()
    assert [said for said in lines if said.startswith("pglcl")] == [f"pglcl: {line}", "pglcl FAILED"]
    assert lines[-2:] == [f"  traceback : {line}", "=" * 60]
    with pytest.raises(UserError, match="is a run of 1 processes, got 2"):
        RunFolder(tmp_path / "run", folder, tiny(steps=1, method="supervised")).open(resume=True, ranks=2)


def test_the_profile_has_every_section_of_a_step(folder: Path, tmp_path: Path) -> None:
    Training(folder, tmp_path / "run", tiny(), profile=True, quiet=True).run()
    rows = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert {"data", "teacher", "student forward", "contrast forward", "backward", "update"} <= {row[0] for row in rows}
    assert sum(row[2] for row in rows) == pytest.approx(1)
