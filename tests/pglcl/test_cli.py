"""The commands as a user calls them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pglcl.cli import main
from pglcl.config import TrainConfig, read_toml
from pglcl.errors import UserError

from tests.conftest import ROOT
from tests.pglcl.folders import plain, tiny
from tests.pglcl.test_train import flags


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = plain(tmp_path_factory.mktemp("plain"))
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", str(root), "--output", str(run), "--quiet", *flags(steps=40, warmup=15)]) == 0
    return root, run


@pytest.mark.parametrize("name", ["inspect", "train", "predict", "evaluate", "report", "demo"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage" in text
    if name == "train":
        for field in dataclasses.fields(TrainConfig):
            assert "--" + field.name.replace("_", "-") in text
            assert field.metadata["help"].split()[0] in text
        assert text.count("[default:") >= 30


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plain(tmp_path)
    assert main(["inspect", str(root), "--verbose"]) == 0
    assert "no problem found" in capsys.readouterr().out
    (root / "images" / "case03.nii.gz").write_text("no image")
    assert main(["inspect", str(root)]) == 1
    assert "case03.nii.gz" in capsys.readouterr().out
    assert main(["inspect", str(root / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("pglcl: ")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    root, run = plain(tmp_path / "data"), tmp_path / "run"
    file = tmp_path / "run.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**vars(tiny()), "seed": 5, "steps": 4}.items()]
    file.write_text("\n".join(lines))
    assert main(["train", str(root), "-o", str(run), "--config", str(file), "--seed", "7", "-q"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["seed"], config["steps"], config["image_size"]) == (7, 4, "32")


def test_toml_errors(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    for text, message in (
        ("stepz = 3", "unknown option 'stepz'"),
        ("steps = 'many'", "steps must be of type int"),
        ("steps = [", "not readable as TOML"),
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
        (["--labelled", "30"], "patients with labels, 6 are there"),
        (["--device", "cuda:9"], "--device cuda:9: not available"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plain(tmp_path / "data")
    given = dict(zip(flags()[::2], flags()[1::2]))
    given.update(dict([options]))
    arguments = [part for pair in given.items() for part in pair]
    assert main(["train", str(root), "-o", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_evaluate(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    root, run = trained
    assert main(["evaluate", str(run), str(root)]) == 0
    assert "| mean |" in capsys.readouterr().out
    assert (run / "scores_test.csv").read_text().startswith("patient,case,label,class,dice,hd95_mm")
    assert main(["evaluate", str(run), str(root), "--part", "some"]) == 2


def test_predict_keeps_the_geometry(trained: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = trained
    out = tmp_path / "masks"
    assert main(["predict", str(run), str(root / "images"), "-o", str(out), "--probabilities", "--entropy"]) == 0
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
    assert "no trained model there" in capsys.readouterr().err


def test_report_is_one_whole_file(trained: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = trained
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--data", str(root), "-o", str(page)]) == 0
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert text.count("data:image/png;base64,") >= 3 * 4 + 3 + 2
    assert "viewport" in text
    for part in ("Scores on the test volumes", "Worst, median and best", "Entropy, disparity", "Embeddings", "Options"):
        assert part in text
    assert text.count("alt='") == text.count("<img")


def test_the_extra_is_named_when_it_is_missing() -> None:
    code = "import sys; sys.modules['x'] = None; import importlib.util as u; find = u.find_spec\n"
    code += "u.find_spec = lambda n, *a: None if n in ('monai', 'typer') else find(n, *a)\n"
    code += "sys.argv = ['pglcl', 'train']; from pglcl.__main__ import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 3
    assert result.stderr.strip() == "pglcl needs monai, typer. From the source folder: pip install '.[train]'"


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nilearn")
    assert main(["demo", "--output", str(tmp_path), "--steps", "20"]) == 0
    out = capsys.readouterr().out
    assert "a demonstration, not a benchmark" in " ".join(out.split())
    assert out.count("| grey matter |") == 2
    assert (tmp_path / "patchcl" / "report.html").exists()
