"""The commands as a user calls them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pglcl import evaluate as evaluation
from pglcl import report as reporting
from pglcl.cli import main
from pglcl.config import OPTIONS, flag, read_toml
from pglcl.errors import UserError
from pglcl.train import Interrupted, Training

from tests.conftest import ROOT
from tests.pglcl.folders import plain, tiny
from tests.pglcl.test_train import flags


@pytest.mark.parametrize("name", ["inspect", "train", "predict", "evaluate", "report", "export", "demo"])
def test_help_lists_every_option_with_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage" in text
    if name == "train":
        for option, described in OPTIONS.items():
            assert flag(option) in text
            assert described.help.split()[0] in text
        assert text.count("[default:") >= 30
        headings = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and line[0] != " "]
        assert headings == ["Arguments", "Options", *dict.fromkeys(option.group for option in OPTIONS.values())]


def test_inspect_names_a_damaged_file_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plain(tmp_path)
    assert main(["inspect", str(root), "--verbose"]) == 0
    assert "no problem found" in capsys.readouterr().out
    (root / "images" / "case03.nii.gz").write_text("no image")
    assert main(["inspect", str(root)]) == 1
    assert "case03.nii.gz" in capsys.readouterr().out
    assert main(["inspect", str(root / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("pglcl: ")


def test_options_take_precedence_over_the_toml_file(tmp_path: Path) -> None:
    root, run = plain(tmp_path / "data"), tmp_path / "run"
    file = tmp_path / "run.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**vars(tiny()), "seed": 5, "steps": 4}.items()]
    file.write_text("\n".join(lines))
    assert main(["train", str(root), "-o", str(run), "--config", str(file), "--seed", "7", "-q"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["seed"], config["steps"], config["image_size"]) == (7, 4, "32")


def test_the_preset_of_the_paper_trains(tmp_path: Path) -> None:
    """Gaussian loss with hard negatives, crops, two stages; small for a test."""
    root, run = plain(tmp_path / "data"), tmp_path / "run"
    small = ["--image-size", "32", "--patch-size", "16", "--channels", "4,8,8", "--steps", "6", "--batch-size", "4"]
    split = ["--labelled", "2", "--test", "2", "--workers", "0", "--threads", "1", "-q"]
    assert main(["train", str(root), "-o", str(run), "--preset", "paper", *small, *split]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["loss"], config["hard_negatives"], config["queue_length"]) == ("gaussian", True, 4096)
    assert (config["patch_size"], config["warmup"]) == (16, 1)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(row["contrast"] for row in rows if "contrast" in row) > 0
    assert main(["train", str(root), "-o", str(tmp_path / "other"), "--preset", "nature"]) == 2


def test_errors_in_a_toml_file_name_the_option(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    for text, message in (
        ("stepz = 3", "unknown option 'stepz'"),
        ("steps = 'many'", "steps must be of type int"),
        ("steps = [", "not readable as TOML"),
        ("image-size = 32\nimage_size = 64", "has the option image_size twice, with a dash and with an underscore"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_toml(file)
    file.write_text("image-size = [32, 48]\nlearning_rate = 1")
    assert read_toml(file) == {"image_size": "32,48", "learning_rate": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "magic"], "--method must be one of supervised, semi, patchcl, got magic"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--temperature", "-1"], "--temperature must be a number > 0"),
        (["--image-size", "30"], "--image-size must be a multiple of 4"),
        (["--image-size", "1,2,3"], "--image-size must be one number or 2"),
        (["--patch-size", "40"], "--patch-size must be even and at most"),
        (["--labelled", "30"], "patients with labels, but only 6 have labels"),
        (["--device", "cuda:9"], "--device cuda:9: not available"),
    ],
)
def test_bad_options_are_refused_by_name(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = plain(tmp_path / "data")
    given = dict(zip(flags()[::2], flags()[1::2], strict=True))
    given.update(dict([options]))
    arguments = [part for pair in given.items() for part in pair]
    assert main(["train", str(root), "-o", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_second_data_folder_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two, one would be left out without a word."""
    root, run = map(str, trained)
    for arguments, message in (
        (["train", root, "--data", root, "-o", str(tmp_path / "run")], "it needs --resume; a new run takes its"),
        (["train", root, "-o", run, "--resume", "--data", root], "the data folder is given twice"),
    ):
        assert main(arguments) == 2
        assert f"pglcl: --data {root}: {message}" in capsys.readouterr().err
    assert main(["train", "--resume", run, "--data", root, "-q"]) == 0  # it has ended
    # What was given is named, not the slices that the run decided on.
    assert main(["train", "--resume", run, "--spatial-dims", "3"]) == 2
    assert "--spatial-dims: the run has 2, got 3" in capsys.readouterr().err


@pytest.fixture
def copied(trained: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The data folder, and a run that a test may change."""
    root, run = trained
    return root, Path(shutil.copytree(run, tmp_path / "run"))


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pglcl ")
    assert main(["--nonsense"]) == 2
    assert main(["nonsense"]) == 2


def test_each_kind_of_error_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An expected error is one line. An unexpected one keeps its traceback, and is called a bug."""
    for error, code, text in (
        (UserError("a", "b"), 2, "pglcl: a\npglcl: b\n"),
        (OSError(28, "No space left on device", "file"), 2, "pglcl: file: No space left on device\n"),
        (PermissionError(13, "Permission denied", "folder"), 2, "pglcl: folder: Permission denied\n"),
        (MemoryError(), 2, "pglcl: out of memory: an allocation failed\n"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "pglcl: out of memory: CUDA out of memory"),
        (KeyboardInterrupt(), 130, "pglcl: stopped\n"),
        (EOFError("x"), 70, "Traceback"),
        (KeyError("x"), 70, "Traceback"),
    ):

        def fail(*arguments: Any, error: BaseException = error, **options: Any) -> None:
            raise error

        monkeypatch.setattr("pglcl.layouts.open_folder", fail)
        assert main(["inspect", "folder"]) == code
        captured = capsys.readouterr()
        assert captured.err.startswith(text)
        assert ("this is a bug of pglcl" in captured.err) == (code == 70)
        assert captured.out == ""


def test_an_output_stream_that_cannot_be_written_is_an_error(trained: tuple[Path, Path]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "pglcl", "inspect", str(trained[0])], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert result.returncode == 2
    assert b"No space left on device" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("closed", ["<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(closed: str, trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing fails, and no file of ours gets the number of a closed stream, to which others may print."""
    image, masks = trained[0] / "images" / "case00.nii.gz", tmp_path / "masks"
    line = f"{sys.executable} -m pglcl predict {trained[1]} {image} -o {masks} {closed}"
    assert subprocess.run(line, shell=True, cwd=ROOT).returncode == 0
    assert [path.name for path in masks.iterdir()] == ["case00.nii.gz"]
    assert subprocess.run(line, shell=True, cwd=ROOT).returncode == 2  # the mask exists


def test_characters_that_the_terminal_lacks_are_escaped(copied: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = copied
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "pglcl", "evaluate", str(run), str(root)]
    result = subprocess.run(command, cwd=ROOT, env=narrow, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("Traceback")) == (0, 0)
    assert "\\xb1" in result.stdout  # plus or minus
    assert "\u00b1" in (run / "scores_test.md").read_text(encoding="utf-8")


def test_file_names_that_are_not_utf8_work(copied: tuple[Path, Path], tmp_path: Path) -> None:
    """Every command that reads or writes files works with names whose bytes are not UTF-8."""
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/latin-\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("file names are text here")
    image, run = folder / Path(os.fsdecode(b"scan-\xff.nii.gz")), copied[1]
    image.write_bytes((copied[0] / "images" / "case00.nii.gz").read_bytes())
    assert main(["predict", str(run), str(image), "-o", str(folder / "masks")]) == 0
    assert (folder / "masks" / image.name).exists()
    assert main(["export", str(run), "--format", "torchscript", "-o", str(folder / "model.ts")]) == 0
    assert main(["report", str(run), "-o", str(folder / "report.html")]) == 0


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0, 3.5])
def test_ctrl_c_at_the_start_prints_no_traceback(seconds: float, trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Ctrl-C gives no traceback at any moment, also while packages are imported."""
    program = (
        "import signal, sys, threading, time; from pglcl.__main__ import main\n"
        f"threading.Timer({seconds}, lambda: signal.raise_signal(signal.SIGINT)).start()\n"
        "sys.exit(main())\n"
    )
    arguments = ["train", str(trained[0]), "-o", str(tmp_path / "run"), *flags(steps=3000)]
    result = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def test_only_the_first_rank_works_and_prints(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Under torchrun, every rank runs the command. Except in a training, only the first one does the work."""
    root, run = trained
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", str(run), str(root), "-o", str(tmp_path)]) == 0
    assert main(["train", str(root), "-o", str(tmp_path / "run"), "--steps", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert list(tmp_path.iterdir()) == []


def test_quiet_prints_nothing(copied: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run = copied
    scan = str(root / "images" / "case00.nii.gz")
    for command in (
        ["inspect", str(root)], ["train", str(root), "-o", str(tmp_path / "new"), *flags(steps=2, warmup=1)],
        ["predict", str(run), scan, "-o", str(tmp_path / "masks")], ["evaluate", str(run), str(root)],
        ["report", str(run)],
    ):  # fmt: skip
        assert main([*command, "--quiet"]) == 0
        captured = capsys.readouterr()
        assert captured.out == captured.err == ""


def test_evaluate_says_when_patients_are_missing(
    copied: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = copied
    data = Path(shutil.copytree(root, tmp_path / "data"))
    gone = json.loads((run / "split.json").read_text())["test"][0]
    (data / "labels" / f"{gone}.nii.gz").unlink()
    assert main(["evaluate", str(run), str(data)]) == 2
    assert f"has no labelled volume of 1 of the 2 patients of the part 'test': {gone}" in capsys.readouterr().err
    assert main(["evaluate", str(run), str(data), "--allow-missing"]) == 0
    assert f"WITHOUT 1 missing patients: {gone}" in capsys.readouterr().out
    content = json.loads((run / "scores_test.json").read_text())
    assert content["subject"]["missing"] == [gone]
    assert content["summary"][-1]["patients"] == 1
    assert main(["report", str(run), "--data", str(data)]) == 2  # a report is about all of them
    assert main(["report", str(run)]) == 0  # the scores of one patient are not those of two: both are scored anew
    assert "2 patients" in (run / "report.html").read_text()


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_volume_that_changes_while_it_is_scored_is_refused(
    command: str,
    copied: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Score files hold the hashes of the files that were scored."""
    data, run = Path(shutil.copytree(copied[0], tmp_path / "data")), copied[1]
    test = json.loads((run / "split.json").read_text())["test"][0]
    score = evaluation.score_cases

    def score_then_touch(*arguments: Any, **options: Any) -> Any:
        found = score(*arguments, **options)
        os.utime(data / "labels" / f"{test}.nii.gz")
        return found

    for module in (evaluation, reporting):
        monkeypatch.setattr(module, "score_cases", score_then_touch)
    arguments = (
        ["evaluate", str(run), str(data)] if command == "evaluate" else ["report", str(run), "--data", str(data)]
    )
    assert main(arguments) == 2
    assert f"{test}.nii.gz: was changed while this command still needed it" in capsys.readouterr().err
    assert not [path.name for path in run.iterdir() if path.suffix in (".csv", ".md", ".html")]


def test_scores_of_an_unfinished_run_say_so(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained[0], tmp_path / "run"
    training = Training(root, run, tiny(), quiet=True)
    training.stop.asked = True
    with pytest.raises(Interrupted):
        training.run()
    assert main(["evaluate", str(run), str(root)]) == 0
    assert "step 1 of 8: UNFINISHED" in capsys.readouterr().out
    assert json.loads((run / "scores_test.json").read_text())["subject"]["finished"] is False
    assert main(["predict", str(run), str(root / "images"), "-o", str(tmp_path / "masks")]) == 0
    assert f"{run}: unfinished, step 1 of 8" in capsys.readouterr().err
    assert main(["report", str(run)]) == 0
    assert "This run is unfinished: step 1 of 8" in (run / "report.html").read_text()
    Training(root, run, tiny(), resume=True, quiet=True).run()
    assert main(["report", str(run)]) == 0
    assert "unfinished" not in (run / "report.html").read_text()
    assert json.loads((run / "scores_test.json").read_text())["subject"]["step"] == 8


def test_scores_of_images_that_the_run_was_trained_on_say_so(
    copied: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other folder has an image of the training under the name of a test patient."""
    root, run = copied
    said = "run was trained on the images of 1 of these volumes: case05; their scores say nothing about new patients"
    assert main(["evaluate", str(run), str(root)]) == 0
    assert main(["evaluate", str(run), str(root), "--part", "labelled", "-o", str(tmp_path / "labelled")]) == 0
    assert main(["evaluate", str(run), str(root), "--part", "validation", "-o", str(tmp_path / "validation")]) == 0
    assert "was trained on" not in capsys.readouterr().err
    other = Path(shutil.copytree(root, tmp_path / "other"))
    for kind in ("images", "labels"):
        shutil.copy(root / kind / "case01.nii.gz", other / kind / "case05.nii.gz")
    assert main(["evaluate", str(run), str(other), "-o", str(tmp_path / "scores")]) == 0
    assert f"pglcl: {said}\n" in capsys.readouterr().err
    assert main(["report", str(run), "--data", str(other), "-o", str(tmp_path / "page.html"), "-q"]) == 0
    assert said in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert main(["evaluate", str(run), str(root), "--part", "all", "-o", str(tmp_path / "all")]) == 0
    assert "3 of these volumes: case00, case01, case02;" in capsys.readouterr().err  # one of them without its label


def test_scores_of_other_data_are_not_replaced(
    copied: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = copied
    assert main(["evaluate", str(run), str(root)]) == 0
    assert main(["evaluate", str(run), str(root)]) == 0  # renewed
    first = (run / "scores_test.json").read_bytes()
    other = Path(shutil.copytree(root, tmp_path / "other"))
    assert main(["evaluate", str(run), str(other)]) == 0  # the same files in another place
    for path in (other / "images").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), path)
    assert main(["evaluate", str(run), str(root)]) == 0
    assert main(["evaluate", str(run), str(other)]) == 2
    assert "scores_test.json: exists; add --overwrite" in capsys.readouterr().err
    assert (run / "scores_test.json").read_bytes() == first
    assert main(["evaluate", str(run), str(other), "-o", str(tmp_path / "scores")]) == 0
    changed = json.loads((tmp_path / "scores" / "scores_test.json").read_text())
    assert changed["summary"][-1]["dice"] != json.loads(first)["summary"][-1]["dice"]
    page = tmp_path / "other.html"
    assert main(["report", str(run), "--data", str(other), "-o", str(page)]) == 0
    shown = f"{changed['summary'][-1]['dice']:.3f} ± {changed['summary'][-1]['dice_std']:.3f}"
    assert shown in page.read_text()
    assert (run / "scores_test.json").read_bytes() == first


def test_evaluate_prints_and_writes_the_scores_of_the_test(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = copied
    assert main(["evaluate", str(run), str(root)]) == 0
    out = capsys.readouterr().out
    assert "| mean |" in out
    assert "run, test: 2 volumes of 2 patients, step 40" in out
    assert "UNFINISHED" not in out
    identity = json.loads((run / "scores_test.json").read_text())["subject"]
    assert (identity["step"], identity["steps"], identity["finished"]) == (40, 40, True)
    assert (run / "scores_test.csv").read_text().startswith("patient,case,class_index,label_value,class,dice,hd95_mm")
    assert main(["evaluate", str(run), str(root), "--part", "some"]) == 2


def test_predict_keeps_the_geometry(trained: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = trained
    out = tmp_path / "masks"
    plainly = ["--probabilities", "--entropy", "--postprocess", "none"]
    assert main(["predict", str(run), str(root / "images"), "-o", str(out), *plainly]) == 0
    for i in range(8):
        source = nib.load(root / "images" / f"case{i:02d}.nii.gz")
        mask = nib.load(out / f"case{i:02d}.nii.gz")
        assert mask.shape == source.shape
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, source.affine)
        for code in ("qform_code", "sform_code"):
            assert mask.header[code] == source.header[code]
        np.testing.assert_allclose(mask.header.get_zooms(), source.header.get_zooms())
        p = nib.load(out / f"case{i:02d}_probabilities.nii.gz")
        assert p.shape == (*source.shape, 3)
        np.testing.assert_allclose(p.get_fdata().sum(axis=-1), 1, atol=1e-4)
        np.testing.assert_array_equal(p.get_fdata().argmax(axis=-1), np.asarray(mask.dataobj))
        h = nib.load(out / f"case{i:02d}_entropy.nii.gz").get_fdata()
        assert h.min() >= 0
        assert h.max() <= np.log(3) + 1e-5


def test_predict_skips_a_broken_file_and_says_so(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained
    bad = tmp_path / "bad.nii.gz"
    bad.write_text("nothing")
    good = root / "images" / "case00.nii.gz"
    assert main(["predict", str(run), str(bad), str(good), "-o", str(tmp_path / "out")]) == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["case00.nii.gz"]
    captured = capsys.readouterr()
    assert "skipped" in captured.err
    assert "bad.nii.gz" in captured.err
    assert main(["predict", str(tmp_path), str(good), "-o", str(tmp_path / "out")]) == 2
    assert "has no trained model" in capsys.readouterr().err


def test_the_report_is_one_file_without_links_and_scripts(copied: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = copied
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--data", str(root), "-o", str(page)]) == 0
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert text.count("data:image/png;base64,") >= 3 * 4 + 3 + 2
    assert "viewport" in text
    for part in (
        "Scores on the test volumes",
        "The worst and best test volumes",
        "Entropy, disparity",
        "Embeddings",
        "Options",
    ):
        assert part in text
    assert text.count("alt='") == text.count("<img")


def test_a_missing_package_is_named_with_its_command() -> None:
    code = "import sys; sys.modules['x'] = None; import importlib.util as u; find = u.find_spec\n"
    code += "u.find_spec = lambda n, *a: None if n in ('monai', 'typer') else find(n, *a)\n"
    code += "sys.argv = ['pglcl', 'train']; from pglcl.__main__ import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 3
    assert result.stderr.strip() == "pglcl needs monai, typer. From the source folder: pip install '.[train]'"


@pytest.mark.slow
def test_the_demo_trains_two_runs_and_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nilearn")
    assert main(["demo", "--output", str(tmp_path), "--steps", "20"]) == 0
    out = capsys.readouterr().out
    assert "a demonstration, not a benchmark" in " ".join(out.split())
    assert out.count("| grey matter |") == 2
    assert (tmp_path / "patchcl" / "report.html").exists()
